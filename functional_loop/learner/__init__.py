"""The loop as scikit-learn estimators: `TorchClassifier` and `TorchRegressor`."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("the learners need scikit-learn: pip install 'functional-loop[sklearn]'") from error

from .classifier import TorchClassifier
from .estimator import TorchEstimator
from .model import TrainedModel
from .networks import mlp
from .regressor import TorchRegressor

__all__ = ["TorchClassifier", "TorchEstimator", "TorchRegressor", "TrainedModel", "mlp"]
