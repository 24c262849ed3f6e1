"""functional_loop: training as a pure function of one frozen record, ``train: Context -> Context``."""

from . import testing
from .bisection import bisect
from .chosen_batches import overfit
from .context import Context, boundary
from .data import Batch, BatchSource, as_batch, batches
from .differences import Difference, differences
from .donation import DonatedError
from .dry_run import dry_run
from .errors import CheckpointError, FunctionalLoopError, PurityError, StateDictError, StoreInUseError, context_of
from .evaluation import predict, validate
from .exchange import from_checkpoint, from_safetensors, to_checkpoint, to_safetensors
from .export import to_module, to_optimizer
from .identity import fingerprint
from .loop import Loop, init
from .measures import Measure, measure
from .optimizers import Optimizer, optimizer
from .record import evolve, record, static, tree_equal, tree_map
from .replay import replay, verify
from .resuming import resume
from .rng import fold_in, seeded
from .signals import Signals
from .stages import STAGES, Callback, Hook, compose, every, when
from .state import digest, load_state_dict, state_dict
from .store import CheckpointStore
from .training import iterate, train, train_step

__version__ = "0.1.0"

__all__ = [
    "STAGES",
    "Batch",
    "BatchSource",
    "Callback",
    "CheckpointError",
    "CheckpointStore",
    "Context",
    "Difference",
    "DonatedError",
    "FunctionalLoopError",
    "Hook",
    "Loop",
    "Measure",
    "Optimizer",
    "PurityError",
    "Signals",
    "StateDictError",
    "StoreInUseError",
    "as_batch",
    "batches",
    "bisect",
    "boundary",
    "compose",
    "context_of",
    "differences",
    "digest",
    "dry_run",
    "every",
    "evolve",
    "fingerprint",
    "fold_in",
    "from_checkpoint",
    "from_safetensors",
    "init",
    "iterate",
    "load_state_dict",
    "measure",
    "optimizer",
    "overfit",
    "predict",
    "record",
    "replay",
    "resume",
    "seeded",
    "state_dict",
    "static",
    "testing",
    "to_checkpoint",
    "to_module",
    "to_optimizer",
    "to_safetensors",
    "train",
    "train_step",
    "tree_equal",
    "tree_map",
    "validate",
    "verify",
    "when",
]
