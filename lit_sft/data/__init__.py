"""Rows to batches. Nothing here imports a model or Lightning."""
