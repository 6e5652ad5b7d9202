"""``bench gpu``: everything that a GPU has to show, in pieces of some minutes, each one a file."""
