"""What makes a step fast: kernels and memory of updates, stretches of batches, compiled graphs."""
