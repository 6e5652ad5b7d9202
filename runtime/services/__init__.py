"""Whatever waits for others: streams, watched folders, the C library; outputs and records."""
