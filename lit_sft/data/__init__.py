"""Rows to batches: one stage per file, plain Python, torch and datasets."""
