"""Private APIs of torch."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def fake_mode() -> Any:
    """A mode in which tensors have a form, and neither memory nor values; tensors from outside of it are taken.

    Raises:
        ImportError: this version of torch has none.
    """
    # Imported when it is needed, so that everything else works without it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: object) -> bool:
    """Whether a tensor was made in a `fake_mode`."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def known_value(tensor: Tensor) -> Tensor | None:
    """The tensor with the values of a fake one, if they are known."""
    return getattr(tensor, "constant", None)


def without_modes() -> AbstractContextManager[Any]:
    """A region in which no dispatch mode is active."""
    return torch.utils._python_dispatch._disable_current_modes()
