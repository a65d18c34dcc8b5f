"""Checkpoints: writing, finding, reading, and the position of a run in its data."""
