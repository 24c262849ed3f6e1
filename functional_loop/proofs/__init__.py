"""What proves a run: replay, bisection, differences, and the purity of hooks."""
