"""Schedules of hyperparameters: `schedule` runs any torch scheduler as a pure callback; the others are made with it."""
