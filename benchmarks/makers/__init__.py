"""Measurements for who makes RecallSeg: in the repository, and not in the wheel."""
