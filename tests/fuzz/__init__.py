"""Damaged and hostile files for the readers; see ``__main__``."""
