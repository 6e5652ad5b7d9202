"""Recall exemplars, segment an image from them, and say how far the answer can be trusted."""
