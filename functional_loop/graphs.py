"""Functions of tensors as compiled graphs: traced once, compiled ahead of time, kept on disk for the next process."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .draws import DrawWatch
from .layouts import Layout, layout
from .rng import torch_seeded

Flat: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
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

    It is called once, with fake tensors: what it computes of Python values is computed for good. Tensors that it
    gets from elsewhere are read in every run. On the CPU the graph is compiled ahead of time and kept in
    `cache_folder`; elsewhere, or where that fails, by ``torch.compile``.

    Args:
        function: from lists of tensors to a list of tensors and a tree.

    Raises:
        UncompilableError: values of tensors decide what is computed, there is no compiler, or the like.

    >>> graph = compile_graph(lambda x: ([x[0] + x[1]], {"double": 2 * x[0], "two": 2}), [torch.ones(3), torch.ones(3)])
    >>> made = graph.run([torch.arange(3.0), torch.ones(3)])
    >>> made[0], graph.tree(made)
    (tensor([1., 2., 3.]), {'double': tensor([0., 2., 4.]), 'two': 2})
    """
    inputs = [tensor for column in columns for tensor in column]
    with warnings.catch_warnings():
        # Those of torch's compiler about itself.
        warnings.simplefilter("ignore")
        module, structure, leaves = _trace(function, inputs, [len(column) for column in columns])
        others = _lift(module)
        run, made = _compile(module, inputs + others)
    draws = any(
        isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        for node in module.graph.nodes
    )
    with_others: Flat = (lambda tensors: run([*tensors, *others])) if others else run
    return Graph(with_others, draws, list(map(layout, made)), structure, leaves)


def cache_folder() -> Path:
    """Where compiled graphs are kept, beside those of ``torch.compile``: see ``$TORCHINDUCTOR_CACHE_DIR``."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "functional_loop"


def _trace(
    function: Function, inputs: list[Tensor], lengths: list[int]
) -> tuple[GraphModule, pytree.TreeSpec, tuple[Any, ...]]:
    """The graph from tensors to tensors, and the structure of the tree with the leaves that are no tensors."""
    if not all(isinstance(tensor, Tensor) for tensor in inputs):
        raise UncompilableError("something in the batch is not a tensor")
    trees: list[Any] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        following = iter(tensors)
        made, tree = function(*(list(islice(following, length)) for length in lengths))
        leaves, structure = pytree.tree_flatten(tree)
        trees[:] = [structure, tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves)]
        return made + [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    draws = DrawWatch()
    draws.look()
    try:
        # oneDNN has LSTM as one operator, for which torch's compiler makes code that fails.
        with torch.backends.mkldnn.flags(enabled=False):
            module = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise UncompilableError(f"it can't be traced ({_brief(error)})") from error
    if draws.has_moved():
        draws.restore()
        raise UncompilableError("it draws from random or numpy, which a graph would do only once")
    structure, leaves = trees
    if not all(leaf is ... or isinstance(leaf, (str, int, float, bool, type(None))) for leaf in leaves):
        raise UncompilableError("the network returns something that is neither a tensor nor a plain value")
    return module, structure, leaves


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


def _compile(module: GraphModule, inputs: list[Tensor]) -> tuple[Flat, Sequence[Tensor]]:
    """The graph, and what it makes of ``inputs``."""
    compiled = _ahead_of_time(module, inputs) if all(tensor.is_cpu for tensor in inputs) else None
    return compiled or _just_in_time(module, inputs)


def _ahead_of_time(module: GraphModule, inputs: list[Tensor]) -> tuple[Flat, Sequence[Tensor]] | None:
    folder = cache_folder() / _key(module, inputs)
    try:
        if not (folder / "graph.so").exists():
            _keep(Path(str(torch._inductor.aot_compile(module, tuple(inputs)))), folder)
        run: Flat = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / "graph.so"), 1).run
        return run, _try(run, inputs)
    except Exception:
        return None


def _keep(library: Path, folder: Path) -> None:
    """Put a compiled library into the cache; of two processes that do so at once, the first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "graph"
        made.mkdir()
        # Beside the library may be a description of the operators that it calls through Python's side of torch.
        for suffix in (".so", ".json"):
            if library.with_suffix(suffix).exists():
                shutil.copyfile(library.with_suffix(suffix), made / f"graph{suffix}")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "graph.so").exists():
                raise


def _just_in_time(module: GraphModule, inputs: list[Tensor]) -> tuple[Flat, Sequence[Tensor]]:
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    no_grad = torch.no_grad()

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with no_grad:
            return compiled(*tensors)  # type: ignore[no-any-return]

    try:
        return run, _try(run, inputs)
    except Exception as error:
        raise UncompilableError(f"its graph can't be compiled ({_brief(error)})") from error


def _try(run: Flat, inputs: list[Tensor]) -> Sequence[Tensor]:
    # Seeded, so that the generator of the process stays where it is.
    with torch_seeded(0):
        return run(inputs)


def _key(module: GraphModule, inputs: list[Tensor]) -> str:
    """A hash of all that the compiled code depends on."""
    from torch._inductor import config

    parts = [
        module.code,
        str([(tensor.dtype, tensor.shape, tensor.stride()) for tensor in inputs]),
        torch.__version__,
        str(config.get_hash()),
        # The number of threads is written into the code.
        str(torch.get_num_threads()),
        str(torch.are_deterministic_algorithms_enabled()),
        torch.get_float32_matmul_precision(),
        _processor(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _processor() -> str:
    """What the processor can do: the cache may be in a folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()} {flags}"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
