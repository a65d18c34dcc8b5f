"""Packed attention: no token sees another example of its row."""
