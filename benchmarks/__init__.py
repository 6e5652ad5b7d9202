"""Latency, memory, retrieval and accuracy: each figure with its machine, settings and quality."""
