"""Callbacks that tell of a run: histories, files, displays. `row_log` and `writing` are what files have in common."""
