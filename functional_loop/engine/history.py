"""A ring of contexts: the recent past of a run, kept to go back to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import overload

from ..core.callback import Callback
from ..core.context import Context, boundary, check_boundary


class History(Sequence[Context]):
    """The last ``n`` contexts after every ``every``-th batch, oldest first.

    Contexts are values that share what has not changed, so that one costs no more than the tensors in which it differs
    from its neighbours: usually parameters and the state of the optimizer. Use it as a callback, where it also goes on
    under `train`, or call `add` in a loop of your own. It is about this process and no part of the run: it changes no
    bit of it, isn't saved, and is empty after a restart. A run that goes back has one past: a context that comes at or
    before those kept takes their place.

    Args:
        n: how many contexts are kept.
        every: keeps the contexts after the batches whose number in the run is a multiple of this.
        id: of the callback, unique in a loop.

    Raises:
        ValueError: ``n`` or ``every`` is not a positive integer.

    >>> import functional_loop as fl
    >>> from functional_loop.examples.digits import loop
    >>> history = fl.History(3, every=2)
    >>> ctx = fl.train(fl.init(fl.evolve(loop(), callbacks=[history])), steps=9)
    >>> history
    History of steps 4, 6, 8
    >>> fl.digest(fl.train(history.before(7), steps=3)) == fl.digest(ctx)
    True
    """

    for_one_run = True

    def __init__(self, n: int, every: int = 1, id: str = "contexts") -> None:
        for name, value in (("n", n), ("every", every)):
            if type(value) is not int or value < 1:
                raise ValueError(f"History: {name} must be a positive integer, not {value!r}")
        self.every = every
        self.id = id
        self._kept: deque[Context] = deque(maxlen=n)

    def add(self, ctx: Context) -> None:
        """Keep ``ctx``, if it is one to keep.

        Raises:
            TypeError, ValueError: it is no context, or one from inside a stage.
        """
        check_boundary(ctx, "History.add")
        if ctx.stage != "batch_end" or ctx.global_step % self.every:
            return
        while self._kept and self._kept[-1].global_step >= ctx.global_step:
            self._kept.pop()
        self._kept.append(ctx)

    def before(self, global_step: int) -> Context:
        """The newest context from before the batch of that number.

        Raises:
            LookupError: there is none.
        """
        for ctx in reversed(self._kept):
            if ctx.global_step < global_step:
                return ctx
        raise LookupError(f"no context from before batch {global_step} is kept: {self!r}")

    @overload
    def __getitem__(self, index: int) -> Context: ...
    @overload
    def __getitem__(self, index: slice) -> list[Context]: ...
    def __getitem__(self, index: int | slice) -> Context | list[Context]:
        return list(self._kept)[index] if isinstance(index, slice) else self._kept[index]

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"History of steps {', '.join(str(ctx.global_step) for ctx in self._kept) or 'none'}"

    def as_callback(self) -> Callback:
        """The callback that adds every context, after all others have done with it."""

        def add(ctx: Context) -> Context:
            self.add(boundary(ctx, "batch_end"))
            return ctx

        return Callback(self.id, last=True, weight=math.inf, replays=False, source=self, batch_end=add)
