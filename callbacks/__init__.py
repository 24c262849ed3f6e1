"""Callbacks for functional_loop."""
