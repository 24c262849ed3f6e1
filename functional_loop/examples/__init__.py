"""Loops that run as they are: handwritten digits, and a small language model."""
