"""Callbacks that save, stop or go back: checkpoints, early stopping, signals, rollback."""
