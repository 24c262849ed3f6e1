"""``torch._foreach_...`` under ``torch.func.vmap``, which has no rules for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_PREFIX = "_foreach_"
_OTHER_NAMES = {"norm": torch.linalg.vector_norm, "clone": torch.clone}


class ForeachApart(TorchFunctionMode):
    """A region in which operators on lists of tensors are made of those on their tensors.

    >>> def total_norm(tensors):
    ...     return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    >>> with ForeachApart():
    ...     torch.func.vmap(total_norm)([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [1.0]])])
    tensor([5., 1.])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not name.startswith(_PREFIX):
            return func(*args, **kwargs)
        name = name.removeprefix(_PREFIX)
        single = _OTHER_NAMES.get(name) or getattr(torch, name, None) or getattr(torch.Tensor, name)
        count = len(args[0])
        rows = zip(*(value if isinstance(value, (list, tuple)) else [value] * count for value in args), strict=True)
        made = [single(*row, **kwargs) for row in rows]
        return None if name.endswith("_") else made
