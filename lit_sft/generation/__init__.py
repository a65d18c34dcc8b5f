"""Prompts to answers, and answers to scores."""
