"""A Triton model repository from a bundle. Imports no torch."""
