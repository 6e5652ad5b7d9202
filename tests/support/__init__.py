"""Helpers that several tests share; ``tests/conftest.py`` puts this folder's parent on the path."""
