"""Files in and out: images, label maps, annotated pairs, and their import into a library."""
