"""Object callbacks: `CallbackSet`, and the `adapter` that makes a pure `Callback` of one.

A `view` is what ``self.ctx`` shows; `mirror` and `mirrored_optimizer` are the module and optimizer in it; `build` makes
classes from functions.
"""
