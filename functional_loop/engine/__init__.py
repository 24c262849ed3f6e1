"""The engine: how a context becomes the next one.

To read in this order: `loop` (what to train), `init` (the first context), `runner` (the grammar of the stages),
`batch` (the stages of one batch, over what a program computes), `solo` (the program of one run), `step` (the tensors
of one batch), `span` and `in_place` (consecutive batches that no hook observes), `train`.
"""
