"""Volumes, slice by slice."""
