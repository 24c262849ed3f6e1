"""Optimizers as pure functions: any `torch.optim` class, with its bits.

`optimizer` is the record; `torch_update` steps a private instance on copies; `fast_update` with `kernels` and `mover`
is the same arithmetic without the Python of `torch.optim`. A `carry` steps in place; `formulas` are for graphs.
"""
