"""The built-in model and task."""
