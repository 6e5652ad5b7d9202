"""Faults of the system, injected into everything that writes: ``python -m faults --help``."""
