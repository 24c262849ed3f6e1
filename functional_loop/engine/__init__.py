"""The engine: how a context becomes the next one.

`runner` is the grammar of the stages; `batch` the stages of one batch, over what a program computes; `solo` the program
of a single run, `span` its consecutive batches without hooks; `training` has `train`, `iterate` and `train_step`. To
read in this order.
"""
