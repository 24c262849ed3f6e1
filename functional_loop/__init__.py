"""functional_loop: training as a pure function of one frozen record, ``train: Context -> Context``."""

from . import testing
from .checkpoint.digests import digest
from .checkpoint.identity import fingerprint
from .checkpoint.resume import resume
from .checkpoint.state import load_state_dict, state_dict
from .checkpoint.store import CheckpointStore
from .core.callback import Callback, Hook, compose, every, when
from .core.context import Context, boundary, context_of
from .core.errors import CheckpointError, FunctionalLoopError, PurityError, StateDictError, StoreInUseError
from .core.measures import Measure, measure
from .core.record import evolve, record, static, tree_equal, tree_map
from .core.rng import fold_in, seeded
from .core.stages import STAGES
from .data.chosen_batches import overfit
from .data.same_order import same_order
from .data.sources import Batch, BatchSource, as_batch, batches
from .derivatives.curvature import hessian_vector_product, top_eigenvalues
from .derivatives.losses import loss_function, trainable_params
from .derivatives.per_sample import gradient_noise_scale, per_sample_gradients, per_sample_norms
from .derivatives.unroll import detached, unroll
from .engine.donation import DonatedError
from .engine.evaluate import predict, validate
from .engine.history import History
from .engine.init import init
from .engine.loop import Loop
from .engine.signals import Signals
from .engine.train import iterate, train, train_step
from .ensembles.ensemble import stack, unstack
from .ensembles.grid import best, grid, predict_ensemble
from .ensembles.mode import ensemble_mode
from .interop.files import from_checkpoint, from_safetensors, to_checkpoint, to_safetensors
from .interop.modules import to_module, to_optimizer
from .optim.optimizer import Optimizer, optimizer
from .purity.dry_run import dry_run
from .replay.bisect import bisect
from .replay.differences import Difference, differences
from .replay.replay import replay, verify

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
    "History",
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
    "best",
    "bisect",
    "boundary",
    "compose",
    "context_of",
    "detached",
    "differences",
    "digest",
    "dry_run",
    "ensemble_mode",
    "every",
    "evolve",
    "fingerprint",
    "fold_in",
    "from_checkpoint",
    "from_safetensors",
    "gradient_noise_scale",
    "grid",
    "hessian_vector_product",
    "init",
    "iterate",
    "load_state_dict",
    "loss_function",
    "measure",
    "optimizer",
    "overfit",
    "per_sample_gradients",
    "per_sample_norms",
    "predict",
    "predict_ensemble",
    "record",
    "replay",
    "resume",
    "same_order",
    "seeded",
    "stack",
    "state_dict",
    "static",
    "testing",
    "to_checkpoint",
    "to_module",
    "to_optimizer",
    "to_safetensors",
    "top_eigenvalues",
    "train",
    "train_step",
    "trainable_params",
    "tree_equal",
    "tree_map",
    "unroll",
    "unstack",
    "validate",
    "verify",
    "when",
]
