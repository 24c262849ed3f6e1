"""Derivatives beyond those of a step: through training, of single rows, of second order."""
