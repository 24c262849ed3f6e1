"""What a function of tensors computes, written down operator by operator: how its compiled graph is found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
READERS = {
    *(Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage),
    *(Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__),
}
"""Ways from a tensor to its values that are no operators."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A region whose operators are written down, with what each is given and where that comes from.

    Runs of one ``text`` on inputs of the same layouts compute the same. It says nothing (``is_whole`` is false) where
    values of tensors could have decided what is computed, or something can't be written down.

    >>> x = torch.ones(2)
    >>> with Tape([x]) as tape:
    ...     made = x * 2 + 1
    >>> print(tape.text)
    %0 = torch.float32 cpu (2,) (1,)
    %1 = torch.float32 cpu (2,) (1,)
    aten.mul.Tensor((%0,2),{}) -> %1
    %2 = torch.float32 cpu (2,) (1,)
    aten.add.Tensor((%1,1),{}) -> %2
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers = WeakTensorKeyDictionary()
        self._count = 0
        self._lines: list[str] = []
        self.is_whole = True
        self.others: list[Tensor] = []
        """Tensors that were neither given nor made, in the order of their first use."""
        for tensor in inputs:
            self._number(tensor)

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def note(self, made: Any) -> None:
        """Write down what the region has made."""
        self._lines.append(self._written(made))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = f"{func}({self._written(args)},{self._written(kwargs)})"
        made = func(*args, **kwargs)
        outputs = made if isinstance(made, (list, tuple)) else [made]
        if not BY_VALUE.isdisjoint(func.tags) or not all(isinstance(out, (Tensor, type(None))) for out in outputs):
            self.is_whole = False
        for out in outputs:
            if isinstance(out, Tensor) and out not in self._numbers:
                self._number(out)
        self._lines.append(f"{given} -> {self._written(made)}")
        return made

    def _number(self, tensor: Tensor) -> None:
        self._numbers[tensor] = self._count
        # What a factory makes depends on defaults that it is not given.
        form = f"{tensor.dtype} {tensor.device} {tuple(tensor.shape)} {tensor.stride()}"
        self._lines.append(f"%{self._count} = {form}")
        self._count += 1

    def _written(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if value not in self._numbers:
                self._number(value)
                self.others.append(value)
                return f"other %{self._numbers[value]}"
            return f"%{self._numbers[value]}"
        if isinstance(value, (list, tuple)):
            return f"({','.join(map(self._written, value))})"
        if isinstance(value, dict):
            return f"{{{','.join(f'{key}={self._written(part)}' for key, part in value.items())}}}"
        self.is_whole = self.is_whole and isinstance(value, PLAIN)
        return repr(value)


class _Watch(TorchFunctionMode):
    """A region in which a tape stops being whole when values of tensors are read past the operators."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READERS:
            self._tape.is_whole = False
        return func(*args, **(kwargs or {}))


def record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Tape | None:
    """The tape of a call of ``function``, or ``None`` where what it computes can't be told from that.

    >>> record(lambda x: x + 1, [torch.ones(2)]).text.splitlines()[2:]
    ['aten.add.Tensor((%0,1),{}) -> %1', '(%1)']
    >>> record(lambda x: x + 1 if x.sum() > 0 else x, [torch.ones(2)]) is None
    True
    """
    tape = Tape(inputs)
    try:
        with tape, _Watch(tape):
            made = function(*inputs)
        tape.note([made] if isinstance(made, Tensor) else made)
    except Exception:
        return None
    return tape if tape.is_whole else None
