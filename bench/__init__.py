"""Benchmarks of functional_loop, side by side with other ways to do the same work: ``python -m bench --help``."""
