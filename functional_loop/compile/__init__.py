"""Compiled steps: one graph for a batch, compared once with the eager step.

`program` decides and falls back; `tracing` makes the functions that `graphs` compiles, `draws` takes random numbers
out of them; `span` runs a graph batch after batch; `cache` and `op_log` find a graph of an earlier process.
"""
