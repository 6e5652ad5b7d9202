"""The networks of one bundle and the buffers they work in: an image in, masks out."""
