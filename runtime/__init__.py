"""Library, retrieval, segmentation and the services around them. Depends on ``engines`` only."""
