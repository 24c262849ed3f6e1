"""Callbacks on gradients and parameters: clipping, averages, private and sharpness-aware steps, unfreezing."""
