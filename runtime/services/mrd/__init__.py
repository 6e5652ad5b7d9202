"""MRD streaming (ISMRMRD), as FIRE, OpenRecon and Gadgetron speak it: images in, masks out."""
