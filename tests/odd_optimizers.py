"""Optimizers as they are written outside of torch: what they keep, they keep in unusual places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Params = Any


class Plain(torch.optim.Optimizer):
    """Gradient descent; what else a class does, it does in `rate`."""

    def __init__(self, params: Params, lr: float = 0.1, **others: Any) -> None:
        super().__init__(params, {"lr": lr, **others})

    def rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = self.rate(group)
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-rate)


class CountingInGroups(Plain):
    """A counter, and a flag, that the first step adds."""

    def rate(self, group: dict[str, Any]) -> float:
        group["step"] = group.get("step", 0) + 1
        group.setdefault("started", True)
        return float(group["lr"]) / group["step"]


class FlagOfTheFirstStep(Plain):
    """A flag of the constructor that the first step turns; and one that is None at first."""

    def __init__(self, params: Params, lr: float = 0.1) -> None:
        super().__init__(params, lr, started=False, scale=None)

    def rate(self, group: dict[str, Any]) -> float:
        if not group["started"]:
            group["started"], group["scale"] = True, 0.5
            return 0.0
        group["scale"] *= 0.9
        return float(group["lr"]) * float(group["scale"])


class MovingBetas(Plain):
    def __init__(self, params: Params, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, lr, betas=betas)

    def rate(self, group: dict[str, Any]) -> float:
        group["betas"] = (group["betas"][0] * 0.9, group["betas"][1])
        return float(group["lr"]) * float(group["betas"][0])


class Nested(Plain):
    """Lists, tuples, dicts and tensors that steps add and change."""

    def rate(self, group: dict[str, Any]) -> float:
        history = group.setdefault("history", [])
        history.append(float(len(history)))
        group["total"] = group.get("total", torch.zeros(())) + 1
        group["pair"] = (*group.get("pair", ("a", None))[:1], len(history))
        group["stats"] = {"n": group.get("stats", {"n": 0})["n"] + 1, "name": "x"}
        assert type(group["pair"]) is tuple
        return float(group["lr"]) / (sum(history) + float(group["total"]) + group["pair"][1] + group["stats"]["n"])


class StateOfTheStart(Plain):
    """State that the constructor makes, and a list in it."""

    def __init__(self, params: Params, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"sum": torch.zeros_like(param), "norms": []}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    slot = self.state[param]
                    slot["sum"] += param.grad
                    slot["norms"] = [*slot["norms"], float(param.grad.norm())][-2:]
                    param.add_(slot["sum"], alpha=-group["lr"] / (1 + sum(slot["norms"])))


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Defazio et al., "The Road Less Scheduled", 2024, algorithm 1, in the form of the authors' package.

    The parameters are y while training, and x in evaluation: ``x = (1 - c) x + c z``, ``y = (1 - beta) z + beta x``.
    """

    def __init__(self, params: Params, lr: float = 1.0, momentum: float = 0.9, warmup_steps: int = 0) -> None:
        defaults = {"lr": lr, "momentum": momentum, "warmup_steps": warmup_steps, "k": 0, "train_mode": False}
        super().__init__(params, {**defaults, "weight_sum": 0.0, "lr_max": -1.0})

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                for param in group["params"]:
                    state = self.state[param]
                    if "z" in state:
                        param.lerp_(end=state["z"], weight=1 - 1 / group["momentum"])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                for param in group["params"]:
                    state = self.state[param]
                    if "z" in state:
                        param.lerp_(end=state["z"], weight=1 - group["momentum"])
                group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("optimizer is not in train mode: call train()")
        for group in self.param_groups:
            k, beta = group["k"], group["momentum"]
            warmup = group["warmup_steps"]
            lr = group["lr"] * (min(1.0, (k + 1) / warmup) if warmup else 1.0)
            lr_max = group["lr_max"] = max(lr, group["lr_max"])
            weight = lr_max**2
            weight_sum = group["weight_sum"] = group["weight_sum"] + weight
            share = weight / weight_sum if weight_sum else 0.0
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if "z" not in state:
                    state["z"] = torch.clone(y, memory_format=torch.preserve_format)
                z = state["z"]
                y.lerp_(end=z, weight=share)
                y.add_(y.grad, alpha=lr * (beta * (1 - share) - 1))
                z.sub_(y.grad, alpha=lr)
            group["k"] = k + 1


# ---- what can't work


class CountingInAttributes(Plain):
    def __init__(self, params: Params, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.steps = 0

    def rate(self, group: dict[str, Any]) -> float:
        self.steps += 1
        return float(group["lr"]) / self.steps


class AverageInAttributes(Plain):
    def __init__(self, params: Params, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.norm = torch.zeros(())

    def rate(self, group: dict[str, Any]) -> float:
        norm = sum(p.grad.norm() for p in group["params"] if p.grad is not None)
        self.norm.mul_(0.9).add_(norm)
        return float(group["lr"] / self.norm)


class Started(Plain):
    """An attribute that the first step sets, once, and that makes a difference."""

    started = False

    def rate(self, group: dict[str, Any]) -> float:
        rate, self.started = (float(group["lr"]) if self.started else 0.0), True
        return rate


class Cached(Plain):
    """An attribute that the first step fills, and that makes no difference."""

    size: int | None = None

    def rate(self, group: dict[str, Any]) -> float:
        self.size = self.size or sum(p.numel() for p in group["params"])
        return float(group["lr"]) / self.size


class SharedState(Plain):
    def rate(self, group: dict[str, Any]) -> float:
        shared = self.state["shared"]  # type: ignore[index]
        shared["n"] = shared.get("n", 0) + 1
        return float(group["lr"]) / shared["n"]


class FunctionInGroups(Plain):
    def rate(self, group: dict[str, Any]) -> float:
        group["function"] = lambda: 1.0
        return float(group["lr"])
