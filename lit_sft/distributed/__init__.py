"""Strategies that distribute a run over devices."""
