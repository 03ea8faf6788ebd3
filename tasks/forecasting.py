"""One forecasting network per series, on generated series with a known generator: traffic-like and finance-like."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors
from tasks.supervised import apply_mlp, check_network, init_mlp

KINDS = ("traffic", "finance")
_DAY, _WEEK = 24, 168
_SIGNAL_TO_NOISE = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecasting(TaskFamily):
    """Mean squared error of an MLP that predicts a series' next value from its last `num_lags`.

    "traffic" is hourly: a daily and a weekly season of random shape, a slow trend, and Gaussian noise whose variance is
    a tenth of the rest's. "finance" is the log of the size of returns whose volatility jumps between a calm and a wild
    regime (a Markov chain), 3 to 10 times as wild. Each series is standardized by its training part. Training windows
    end in its first three quarters; `eval_metrics` reports the "test_loss" of those whose target lies in the last
    quarter. Parameters are those of `tasks.supervised.init_mlp`. Reference: predicting the mean has loss about 1; for
    traffic no predictor does better than the task's constant "noise_variance" in expectation, for finance that is what
    one has who is told the regime.

    Attributes:
        kind: "traffic" or "finance".
        length: values per series; at least 4 · (num_lags + 1).
        num_lags: values that the network sees; at least 1.
        batch_size: windows per mini-batch, drawn with replacement; at least 1.
        hidden: widths of the hidden layers, () for a linear autoregression.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init: "normal" or "fan_in"; see `tasks.supervised.init_mlp`.
        init_scale: see init.
    """

    name: ClassVar[str] = "forecasting"
    kind: str = "traffic"
    length: int = 672
    num_lags: int = 24
    batch_size: int = 32
    hidden: tuple[int, ...] = (16,)
    activation: str = "relu"
    init: str = "fan_in"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_network(self.hidden, self.activation, self.init, self.init_scale)
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        for name in ("num_lags", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.length < 4 * (self.num_lags + 1):
            raise ValueError(
                f"length must be at least 4 · (num_lags + 1) = {4 * (self.num_lags + 1)}; got {self.length}"
            )

    @property
    def _first_test(self) -> int:
        """The first value that only `eval_metrics` predicts."""
        return self.length - self.length // 4

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        series, noise = self._traffic(generator) if self.kind == "traffic" else self._finance(generator)
        seen = series[: self._first_test]
        variance = seen.var()
        return {"series": (series - seen.mean()) / variance.sqrt(), "noise_variance": noise / variance}

    def _traffic(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        hours = torch.arange(self.length)
        signal = torch.randn((), generator=generator) * (hours / _WEEK - 1)
        for period, harmonics, size in ((_DAY, 3, 1.0), (_WEEK, 2, 0.5)):
            for k in range(1, harmonics + 1):
                phase = 2 * math.pi * torch.rand((), generator=generator)
                height = size / k * torch.randn((), generator=generator)
                signal = signal + height * torch.sin(2 * math.pi * k * hours / period + phase)
        noise = signal.var() / _SIGNAL_TO_NOISE
        return signal + noise.sqrt() * torch.randn(self.length, generator=generator), noise

    def _finance(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = 3 + 7 * torch.rand((), generator=generator)
        stay = 0.95 + 0.04 * torch.rand((), generator=generator)
        changes = torch.rand(self.length, generator=generator) > stay
        wild = changes.cumsum(0) % 2
        returns = torch.randn(self.length, generator=generator) * ratio**wild
        # The log of a χ² variable of one degree of freedom has variance π²/2; half of the log a quarter of it.
        return returns.abs().clamp_min(1e-4).log(), torch.tensor(math.pi**2 / 8)

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return init_mlp([self.num_lags, *self.hidden, 1], self.init, self.init_scale, generator)

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        count = self._first_test - self.num_lags
        return {"windows": torch.randint(count, (num_steps, self.batch_size), generator=generator)}

    def _error(self, params: Tensors, series: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        values = series[windows[:, None] + torch.arange(self.num_lags + 1, device=windows.device)]
        return F.mse_loss(apply_mlp(params, self.activation, values[:, :-1]), values[:, -1:])

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self._error(params, task["series"], batch["windows"])

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" on the last quarter of the series."""
        last = torch.arange(self._first_test, self.length, device=task["series"].device)
        return {"test_loss": self._error(params, task["series"], last - self.num_lags)}
