"""Callbacks for functional_loop."""

from .history import history

__all__ = ["history"]
