"""Callbacks around the training loop, one file per concern."""
