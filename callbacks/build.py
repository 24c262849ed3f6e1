"""Object callbacks from functions: a class by `callback_set`, a descriptor by `torch_callback`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypedDict, Unpack

from ..stages import STAGES
from .callback_set import CallbackSet
from .descriptor import TorchCallback
from .param_set import ParamSet

Method = Callable[[Any], None]


class Methods(TypedDict, total=False, extra_items=Any):  # type: ignore[call-arg]
    on_begin: Method | None
