"""Callbacks: the object-oriented face of the loop, and those that ship with it."""

from .control.checkpoint import CallbackSetCheckpoint, checkpoint
from .control.early_stopping import early_stopping
from .control.rollback import rollback
from .control.stop_on_signal import CallbackSetStopOnSignal, stop_on_signal
from .control.terminate_on_nan import terminate_on_nan
from .control.timer import CallbackSetTimer, timer
from .gradients.averaging import averaged, ema, swa
from .gradients.clipping import clip_grad_norm, clip_grad_value
from .gradients.dp_sgd import dp_epsilon, dp_sgd
from .gradients.monitors import grad_norm, param_norm
from .gradients.sam import sam
from .gradients.unfreeze import unfreeze
from .logs.csv_log import CallbackSetCSVLog, csv_log
from .logs.digest_trace import digest_trace, first_parting
from .logs.history import history, to_frame
from .logs.json_log import CallbackSetJSONLog, json_log
from .logs.progress import CallbackSetProgress, progress
from .logs.tb import CallbackSetTB, tb
from .logs.throughput import CallbackSetThroughput, throughput
from .objects.build import callback_set, torch_callback
from .objects.callback_set import CallbackSet
from .objects.lambda_callback import lambda_callback
from .objects.view import ContextView
from .registry.descriptor import TorchCallback
from .registry.dictionary import (
    CallbackDictionary,
    as_torch_callback,
    as_torch_callbacks,
    t_clbk,
    t_clbks,
    torch_callbacks,
)
from .registry.param_set import Param, ParamSet
from .schedules.lr_composed import lr_chained, lr_sequential
from .schedules.lr_custom import as_lr_scheduler, lr_lambda, lr_multiplicative
from .schedules.lr_cycles import lr_cyclic, lr_one_cycle
from .schedules.lr_plateau import lr_reduce_on_plateau
from .schedules.lr_schedulers import (
    lr_constant,
    lr_cosine_annealing,
    lr_exponential,
    lr_linear,
    lr_multi_step,
    lr_polynomial,
    lr_step,
    lr_warm_restarts,
)

__all__ = [
    "CallbackDictionary",
    "CallbackSet",
    "CallbackSetCSVLog",
    "CallbackSetCheckpoint",
    "CallbackSetJSONLog",
    "CallbackSetProgress",
    "CallbackSetStopOnSignal",
    "CallbackSetTB",
    "CallbackSetThroughput",
    "CallbackSetTimer",
    "ContextView",
    "Param",
    "ParamSet",
    "TorchCallback",
    "as_lr_scheduler",
    "as_torch_callback",
    "as_torch_callbacks",
    "averaged",
    "callback_set",
    "checkpoint",
    "clip_grad_norm",
    "clip_grad_value",
    "csv_log",
    "digest_trace",
    "dp_epsilon",
    "dp_sgd",
    "early_stopping",
    "ema",
    "first_parting",
    "grad_norm",
    "history",
    "json_log",
    "lambda_callback",
    "lr_chained",
    "lr_constant",
    "lr_cosine_annealing",
    "lr_cyclic",
    "lr_exponential",
    "lr_lambda",
    "lr_linear",
    "lr_multi_step",
    "lr_multiplicative",
    "lr_one_cycle",
    "lr_polynomial",
    "lr_reduce_on_plateau",
    "lr_sequential",
    "lr_step",
    "lr_warm_restarts",
    "param_norm",
    "progress",
    "rollback",
    "sam",
    "stop_on_signal",
    "swa",
    "t_clbk",
    "t_clbks",
    "tb",
    "terminate_on_nan",
    "throughput",
    "timer",
    "to_frame",
    "torch_callback",
    "torch_callbacks",
    "unfreeze",
]
