"""What an optimizer step needs beside the model: optimizer, random states, metrics, operation
counts.
"""
