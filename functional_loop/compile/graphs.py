"""Functions of tensors as compiled graphs: traced once, compiled ahead of time, kept on disk for the next process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..core.draws import DrawWatch
from ..core.record import tree_equal
from ..core.rng import torch_seeded
from ..optim.layouts import Layout, layout
from .cache import Code, Flat, find, keep, key_of
from .op_log import Tape, record

Function: TypeAlias = Callable[..., tuple[list[Tensor], Any]]


class UncompilableError(Exception):
    """Why a function can't be compiled, in words for the user."""


@attrs.frozen(eq=False)
class Graph:
    """A compiled function.

    ``run(tensors)`` takes tensors of the shapes, dtypes and strides that it was compiled for (it does not look at
    them) and never writes to them. It draws random numbers (``draws``) from torch's generator.
    """

    run: Flat
    draws: bool
    layouts: list[Layout]
    """Of what ``run`` returns."""
    _structure: pytree.TreeSpec
    _leaves: tuple[Any, ...]
    """Leaves of the tree that are not tensors; ``...`` in the places of those that are."""

    def tree(self, made: Sequence[Tensor]) -> Any:
        """The tree in what ``run`` returned, whose last tensors are its leaves."""
        if self._structure.is_leaf() and self._leaves == (...,):
            return made[-1]
        following = iter(made[len(made) - self._leaves.count(...) :])
        leaves = [next(following) if leaf is ... else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)


def compile_graph(function: Function, *columns: Sequence[Tensor]) -> Graph:
    """``function``, compiled for lists of tensors like ``columns``.

    It is called twice, with ``columns`` and with fake tensors: what it computes of Python values is computed for good.
    Tensors that it gets from elsewhere are read in every run. On the CPU the graph is compiled ahead of time and kept
    in `cache_folder`; elsewhere, or where that fails, by ``torch.compile``. Where the first call does, operator by
    operator, what one has done for which a graph was kept, that is taken.

    Args:
        function: from lists of tensors to a list of tensors and a tree; it writes to none that it is given.

    Raises:
        UncompilableError: values of tensors decide what is computed, there is no compiler, or the like.

    >>> graph = compile_graph(lambda x: ([x[0] + x[1]], {"double": 2 * x[0], "two": 2}), [torch.ones(3), torch.ones(3)])
    >>> made = graph.run([torch.arange(3.0), torch.ones(3)])
    >>> made[0], graph.tree(made)
    (tensor([1., 2., 3.]), {'double': tensor([0., 2., 4.]), 'two': 2})
    """
    inputs = [tensor for column in columns for tensor in column]
    if not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise UncompilableError("something in the batch is not a tensor")
    flat = _Flattened(function, [len(column) for column in columns])
    on_cpu = all(tensor.is_cpu for tensor in inputs)
    with _quietly():
        tape = _recorded(flat, inputs) if on_cpu else None
    if tape is not None and (kept := find(_key(tape.text, inputs))) is not None:
        return flat.graph(kept, tape.others)
    with _quietly():
        module = _trace(flat, inputs)
        others = _lift(module)
    if tape is not None and _equal(others, tape.others):
        key, kept = _key(tape.text, inputs), None
    else:
        key = _key(module.code, inputs)
        kept = find(key) if on_cpu else None
    return flat.graph(kept or _compile(module, [*inputs, *others], key), others)


@contextmanager
def _quietly() -> Iterator[None]:
    """A region without the warnings of torch's compiler about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Flattened:
    """A function of lists of tensors as one from tensors to tensors, which remembers the tree that it made last."""

    def __init__(self, function: Function, lengths: Sequence[int]) -> None:
        self._function = function
        self._lengths = lengths
        self.structure: Any = None
        self.leaves: tuple[Any, ...] = ()
        """Those of the tree, ``...`` for a tensor."""

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        following = iter(tensors)
        made, tree = self._function(*(list(islice(following, length)) for length in self._lengths))
        leaves, self.structure = pytree.tree_flatten(tree)
        self.leaves = tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return made + [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def graph(self, code: Code, others: list[Tensor]) -> Graph:
        run, draws, layouts = code
        with_others: Flat = (lambda tensors: run([*tensors, *others])) if others else run
        return Graph(with_others, draws, layouts, self.structure, self.leaves)


def _recorded(flat: _Flattened, inputs: list[Tensor]) -> Tape | None:
    draws = DrawWatch()
    draws.look()
    with torch_seeded(0):
        tape = record(flat, inputs)
    if draws.put_back():
        return None
    if tape is not None:
        tape.note([str(flat.structure), *map(repr, flat.leaves)])
    return tape


def _trace(flat: _Flattened, inputs: list[Tensor]) -> GraphModule:
    """The graph from tensors to tensors."""
    draws = DrawWatch()
    draws.look()
    try:
        # oneDNN has LSTM as one operator, for which torch's compiler makes code that fails.
        with torch.backends.mkldnn.flags(enabled=False):
            module = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        why = _BY_VALUES if type(error).__name__ in _DATA_DEPENDENT else _brief(error)
        raise UncompilableError(f"it can't be traced ({why})") from error
    if draws.put_back():
        raise UncompilableError("it draws from random or numpy, which a graph would do only once")
    if not all(leaf is ... or isinstance(leaf, (str, int, float, bool, type(None))) for leaf in flat.leaves):
        raise UncompilableError("the network returns something that is neither a tensor nor a plain value")
    return module


_DATA_DEPENDENT = {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}
_BY_VALUES = (
    "values of tensors decide what is computed, as in an if, in .item(), in x[mask], or in what torch.distributions "
    "checks without validate_args=False"
)


def _lift(module: GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds, so that it can be kept without them."""
    lifted: dict[str, Any] = {}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if not isinstance(getattr(module, name, None), Tensor):
            raise UncompilableError(f"its graph holds {name}, which is no tensor")
        if name not in lifted:
            with module.graph.inserting_after(inputs[-1]):
                inputs.append(module.graph.placeholder(name.replace(".", "_")))
            value = getattr(module, name).detach()
            inputs[-1].meta = {**node.meta, "val": value}
            lifted[name] = (inputs[-1], value)
        node.replace_all_uses_with(lifted[name][0])
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return [value for _, value in lifted.values()]


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return list(map(layout, some)) == list(map(layout, others)) and bool(tree_equal([*some], [*others]))


OPTIONS = {"fallback_random": True}
"""Of torch's compiler: what a graph draws itself are the numbers of the eager operators."""
OPTIONS_OF_DRAWS = {"cpp.max_horizontal_fusion_size": 1}
"""Of graphs that draw themselves: torch 2.13 else moves readers of a mask before the operator that fills it."""


def _compile(module: GraphModule, inputs: list[Tensor], key: str) -> Code:
    """The graph, compiled for tensors like ``inputs``."""
    draws = any(
        isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        for node in module.graph.nodes
    )
    if not all(tensor.is_cpu for tensor in inputs):
        return _just_in_time(module, inputs, draws)
    try:
        return _ahead_of_time(module, inputs, draws, key)
    except Exception as error:
        code = _just_in_time(module, inputs, draws)
        warnings.warn(
            f"compile=True: a graph can't be compiled ahead of time ({_brief(error)}); torch.compile compiles it, "
            "again in every process",
            UserWarning,
            stacklevel=2,
        )
        return code


def _ahead_of_time(module: GraphModule, inputs: list[Tensor], draws: bool, key: str) -> Code:
    with _quietly():
        library = Path(str(torch._inductor.aot_compile(module, tuple(inputs), options=_options(draws))))
    return keep(key, library, draws, lambda run: _try(run, inputs))


def _options(draws: bool) -> dict[str, Any]:
    return OPTIONS | OPTIONS_OF_DRAWS if draws else OPTIONS


def _key(text: str, inputs: Sequence[Tensor]) -> str:
    return key_of(f"{text}\0{OPTIONS}{OPTIONS_OF_DRAWS}", inputs)


def _just_in_time(module: GraphModule, inputs: list[Tensor], draws: bool) -> Code:
    compiled = torch.compile(module, fullgraph=True, dynamic=False, options=_options(draws))
    no_grad = torch.no_grad()

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with no_grad:
            return compiled(*tensors)  # type: ignore[no-any-return]

    try:
        with _quietly():
            return Code(run, draws, list(map(layout, _try(run, inputs))))
    except Exception as error:
        raise UncompilableError(f"its graph can't be compiled ({_brief(error)})") from error


def _try(run: Flat, inputs: list[Tensor]) -> Sequence[Tensor]:
    # Seeded, so that the generator of the process stays where it is.
    with torch_seeded(0):
        return run(inputs)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
