"""functional_loop: training as a pure function of one frozen record, ``train: Context -> Context``."""

from . import testing
from .chosen_batches import overfit
from .context import Context, boundary, context_of
from .data import Batch, BatchSource, as_batch, batches
from .derivatives.curvature import hessian_vector_product, top_eigenvalues
from .derivatives.losses import loss_function, trainable_params
from .derivatives.per_sample import gradient_noise_scale, per_sample_gradients, per_sample_norms
from .derivatives.unroll import detached, unroll
from .digests import digest
from .donation import DonatedError
from .dry_run import dry_run
from .ensembles.ensemble import stack, unstack
from .ensembles.grid import best, grid, predict_ensemble
from .ensembles.mode import ensemble_mode
from .errors import CheckpointError, FunctionalLoopError, PurityError, StateDictError, StoreInUseError
from .evaluation import predict, validate
from .exchange import from_checkpoint, from_safetensors, to_checkpoint, to_safetensors
from .export import to_module, to_optimizer
from .history import History
from .identity import fingerprint
from .init import init
from .loop import Loop
from .measures import Measure, measure
from .optimizers import Optimizer, optimizer
from .proofs.bisection import bisect
from .proofs.differences import Difference, differences
from .proofs.replay import replay, verify
from .record import evolve, record, static, tree_equal, tree_map
from .resuming import resume
from .rng import fold_in, seeded
from .same_order import same_order
from .signals import Signals
from .stages import STAGES, Callback, Hook, compose, every, when
from .state import load_state_dict, state_dict
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
