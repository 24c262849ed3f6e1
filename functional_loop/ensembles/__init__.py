"""Ensembles: many runs of one loop as one stacked context."""
