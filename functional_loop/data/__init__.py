"""Sources of batches: every batch is a function of (seed, epoch, step).

`sources` has `batches`; `tensors`, `datasets` and `loaders` are the three kinds of source, `order` the order of rows.
`reader` reads an epoch from any place on, and finds where it ends.
"""
