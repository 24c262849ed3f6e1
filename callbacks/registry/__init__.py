"""Descriptors of callbacks.

`descriptor` describes one, with its `param_set` and `packages`; `dictionary` has those that ship.
"""
