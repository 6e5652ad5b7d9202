"""Checkpoints in, bundle out. The only room that imports torch and transformers."""
