# ruff: noqa: N803  (X is scikit-learn's name for the data)
"""The base of the learners: a training run behind the interface of scikit-learn."""

from __future__ import annotations

import secrets
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.utils.data import TensorDataset

from ..checkpoint.resume import resume
from ..core.context import Context
from ..core.measures import Measure
from ..core.record import evolve
from ..core.rng import fold_in
from ..engine.init import init
from ..engine.train import iterate
from .arrays import as_array, as_python, as_tensor, checked_integer, split
from .assembly import make_loop, predict_batch_size
from .model import TrainedModel
from .networks import mlp
from .parameters import Parameters
from .saving import Saving
from .targets import Classes
from .threads import threads


class TorchEstimator(Saving, Parameters):
    """What `TorchClassifier` and `TorchRegressor` share: their arguments, training, and files.

    Args:
        network: an ``nn.Module``, whose values are the start of every fit and which is never written to; or a class or
            function that makes one and takes any of ``n_features`` (``X.shape[1]``), ``n_outputs`` and ``input_shape``
            (``X.shape[1:]``) by name. Its output is of shape ``[rows, n_outputs]``; of several outputs the first is.
        loss: a function ``(y_hats, y) -> scalar tensor``, or a module or class of ``torch.nn`` that is one; ``None``
            for the usual one of the kind of learner.
        optimizer: a class of ``torch.optim``, or what `functional_loop.optimizer` makes.
        epochs: how many epochs `fit` trains.
        batch_size: rows per update.
        batch_size_predict: rows at a time in prediction and validation; ``None`` for ``batch_size``. With 1, the last
            bits of a prediction too are independent of the rows that it is made with.
        device: where to train and predict; ``"auto"`` for CUDA if there is any, else the CPU.
        seed: an integer, of which everything random in a fit is a function; or ``"random"`` to draw one per fit, which
            is then ``model_.seed``. The global random state is neither used nor moved.
        num_threads: how many threads torch uses in ``fit`` and ``predict``; ``None`` for as many as it uses anyway.
            Results are the same bits for the same number only.
        eval_freq: scores are made in every ``eval_freq``-th epoch and in the last.
        measures_train, measures_valid: what scores: a list of `functional_loop.measure`, or names of those that the
            kind of learner knows; ``measures_valid=None`` for the usual ones.
        validate: what validates: ``None``, the ratio of rows that are taken from the training data for it, or
            ``(X, y)``.
        patience: epochs with scores that early stopping waits for an improvement of the first of ``measures_valid``;
            ``None`` for no early stopping.
        min_delta, restore_best_weights: see `functional_loop.callbacks.control.early_stopping`.
        resume: a folder of checkpoints, as the callback ``checkpoint`` writes them: `fit` goes on from the newest, or
            starts anew if there is none. Data and parameters must be those of the run that wrote it.
        callbacks: a list of callbacks: pure ones, `CallbackSet` objects and classes, descriptors, or keys of
            ``torch_callbacks``. Each fit works on copies; what they keep is in ``model_.callbacks``.
        drop_last: whether to leave out a last batch of an epoch that is smaller.
        num_workers: processes that make the training batches; they can't change a bit.
        shuffle: whether each epoch has a random order of its own, where there is no ``sampler``.
        sampler: row numbers of an epoch, or a class or function that makes them of the training data, a
            ``torch.utils.data.TensorDataset``.
        compile: see `functional_loop.Loop`.

    Attributes:
        model_: the `TrainedModel`: ``network``, ``callbacks`` by id, ``epochs``, ``seed``, ``scores_train``,
            ``scores_valid``.
        n_features_in_, feature_names_in_: as in all of scikit-learn.
        input_shape_: the shape of a row.
        target_: how targets and predictions are encoded.

    The parameters of ``network``, ``loss``, ``optimizer`` and ``callbacks`` are parameters of the learner, for
    ``set_params`` and searches: ``network__hidden``, ``loss__label_smoothing``, ``optimizer__lr``,
    ``callbacks__checkpoint__path``.

    Data are arrays, lists, tensors or data frames of numbers, of at least two dimensions, which become float32. Object
    callbacks find the learner as ``ctx.learner``, and the data as ``ctx.task_train`` and ``ctx.task_valid``.

    Raises:
        TypeError, ValueError: in ``fit``, for arguments or data that can't work, by name.

    Resuming: see ``resume`` and `partial_fit`.

    Mirrors R's ``LearnerTorch`` (mlr3torch).
    """

    _usual_loss: ClassVar[Any]
    _measures: ClassVar[dict[str, Measure]]
    _usual_measures: ClassVar[tuple[str, ...]]
    _checks_of_y: ClassVar[dict[str, Any]]

    def __init__(
        self,
        network: Any = mlp,
        *,
        loss: Any = None,
        optimizer: Any = torch.optim.AdamW,
        epochs: int = 50,
        batch_size: int = 32,
        batch_size_predict: int | None = None,
        device: Any = "auto",
        seed: Any = 0,
        num_threads: int | None = None,
        eval_freq: int = 1,
        measures_train: Any = (),
        measures_valid: Any = None,
        validate: Any = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        restore_best_weights: bool = True,
        resume: Any = None,
        callbacks: Any = (),
        drop_last: bool = False,
        num_workers: int = 0,
        shuffle: bool = True,
        sampler: Any = None,
        compile: bool = False,
    ) -> None:
        self.network = network
        self.loss = loss
        self.optimizer = optimizer
        self.epochs = epochs
        self.batch_size = batch_size
        self.batch_size_predict = batch_size_predict
        self.device = device
        self.seed = seed
        self.num_threads = num_threads
        self.eval_freq = eval_freq
        self.measures_train = measures_train
        self.measures_valid = measures_valid
        self.validate = validate
        self.patience = patience
        self.min_delta = min_delta
        self.restore_best_weights = restore_best_weights
        self.resume = resume
        self.callbacks = callbacks
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.sampler = sampler
        self.compile = compile

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new network for ``epochs`` epochs, or go on with the run in the folder ``resume``.

        Args:
            X: rows of numbers, of at least two dimensions.
            y: a target per row.
        """
        return self._fit(*self._checked(X, y, reset=True), as_python(self.epochs))

    def partial_fit(self, X: Any, y: Any, *, epochs: int = 1) -> Self:
        """Train the network that is there for ``epochs`` more epochs, or a new one if there is none.

        On the data of `fit`, the result is that of a `fit` of all these epochs, bit for bit, where nothing depended on
        their number: no schedule of a given length, no epoch that is evaluated because it is the last. It goes on from
        the weights of the last epoch, also where those of the best were brought back. Other data are rows of the same
        kind.

        What early stopping ended is taken up again. Hyperparameters of the optimizer that were set since the run began
        take effect; the others go on as they are.

        Args:
            X, y: see `fit`.
            epochs: how many epochs to train.

        Raises:
            StateDictError: the network, optimizer, measures or callbacks are others than in the run so far.

        >>> from functional_loop.learner import TorchRegressor
        >>> x = np.linspace(0, 1, 20).reshape(-1, 1)
        >>> longer = TorchRegressor(epochs=2).fit(x, x).partial_fit(x, x, epochs=3)
        >>> np.array_equal(longer.predict(x), TorchRegressor(epochs=5).fit(x, x).predict(x))
        True
        """
        return self._partial_fit(X, y, None, epochs)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _checked(self, X: Any, y: Any, reset: bool, target: Any = None) -> tuple[Tensor, Tensor]:
        """Rows and their targets as the loop takes them; with ``reset`` their kind is learned, else it is required."""
        rows, y = validate_data(
            self, as_array(X), as_array(y), reset=reset, dtype=np.float32, allow_nd=True, **self._checks_of_y
        )
        self._check_target(y)
        if reset:
            self.__dict__.pop("model_", None)
            self.input_shape_, self.target_ = rows.shape[1:], self._target.of(y) if target is None else target
        self._check_shape(rows)
        return as_tensor(rows), self.target_.encode(y)

    def _check_target(self, y: Any) -> None:
        """Refuse targets of the wrong kind with a ValueError."""

    def _check_shape(self, rows: Any) -> None:
        if rows.shape[1:] != self.input_shape_:
            raise ValueError(f"X has rows of shape {rows.shape[1:]}, and it was fitted to {self.input_shape_}")

    def _outputs(self, X: Any) -> Tensor:
        """The outputs of the network: float32 ``[rows, n_outputs]``."""
        check_is_fitted(self)
        rows = validate_data(self, as_array(X), reset=False, dtype=np.float32, allow_nd=True)
        self._check_shape(rows)
        with threads(self.num_threads):
            return self.model_.outputs(as_tensor(rows), predict_batch_size(self))

    def _fit(self, x: Tensor, y: Tensor, epochs: int) -> Self:
        seed = self._draw_seed()
        loop = make_loop(self, *self._split(x, y, seed), epochs)
        start = init(loop, seed) if self.resume is None else resume(loop, self.resume, seed, must_exist=False)
        return self._train(start)

    def _partial_fit(self, X: Any, y: Any, target: Any, epochs: int) -> Self:
        epochs = checked_integer("epochs", epochs)
        if not self.__sklearn_is_fitted__():
            return self._fit(*self._checked(X, y, reset=True, target=target), epochs)
        x, targets = self._checked(X, y, reset=False)
        model = self.model_
        loop = make_loop(self, *self._split(x, targets, model.seed), model.epochs + epochs)
        return self._train(model.continued(loop))

    def _train(self, start: Context) -> Self:
        # A finished run that is resumed has no other place to be continued from.
        last, end = evolve(start, stage="epoch_end"), start
        with threads(self.num_threads):
            for ctx in iterate(start):
                last, end = end, ctx
        self.model_ = TrainedModel.of(end, last)
        return self

    def _draw_seed(self) -> int:
        seed = as_python(self.seed)
        if seed == "random" and self.resume is not None:
            raise ValueError("resume needs the seed of the run, an integer: seed='random' draws another one")
        if seed == "random":
            return secrets.randbelow(2**31)
        if type(seed) is not int:
            raise TypeError(f"seed is an integer or 'random', not {self.seed!r}")
        return seed

    def _split(self, x: Tensor, y: Tensor, seed: int) -> tuple[TensorDataset, TensorDataset | None]:
        """The rows to train on and those to validate on."""
        validate = as_python(self.validate)
        if validate is None:
            return TensorDataset(x, y), None
        if isinstance(validate, (tuple, list)) and len(validate) == 2:
            return TensorDataset(x, y), TensorDataset(*self._checked(validate[0], validate[1], reset=False))
        if not isinstance(validate, float) or not 0 < validate < 1:
            raise ValueError(f"validate is None, a ratio between 0 and 1, or a pair (X, y), not {self.validate!r}")
        labels = y if isinstance(self.target_, Classes) else torch.zeros(len(y), dtype=torch.int64)
        return split(x, y, validate, fold_in(seed, "validation"), labels)
