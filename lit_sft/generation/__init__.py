"""Prompts -> answers -> scores."""
