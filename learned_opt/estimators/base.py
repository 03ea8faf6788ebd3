"""The interface of a meta-gradient estimator: what turns one truncation of particles into a meta-gradient."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan
from learned_opt.rules.base import UpdateRule
from learned_opt.task import Tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What an estimator runs on: a rule on particles of one family.

    Attributes:
        rule: the update rule.
        batched: the family.
        plan: names the particles' tasks and horizons.
        meta_loss: the scalar to lower.
        truncation: inner steps per meta-gradient, at least 1.
        frozen: names in theta that are held fixed: they are not perturbed, and their meta-gradient is zero.
        initial: name in theta of the learned initial parameters, [num_parameters], that episodes start from; empty for
            those that the family draws.
    """

    rule: UpdateRule
    batched: BatchedFamily
    plan: EpisodePlan
    meta_loss: MetaLoss
    truncation: int
    frozen: tuple[str, ...] = ()
    initial: str = ""

    def initial_params(self, theta: Tensors) -> torch.Tensor | None:
        """The learned initial parameters in theta, of one set or of one set per particle; None without."""
        return theta[self.initial] if self.initial else None

    def __post_init__(self) -> None:
        if self.truncation < 1:
            raise ValueError(f"truncation must be at least 1; got {self.truncation}")
        horizons = self.plan.horizons
        if horizons is not None and self.truncation > horizons.longest:
            raise ValueError(
                f"truncation ({self.truncation}) must not exceed the longest horizon ({horizons.longest}); "
                "shorten the truncation or lengthen the horizon"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One truncation's meta-gradient.

    Attributes:
        grads: like theta.
        meta_loss: its value on this truncation.
        num_inner_steps: inner steps x particles spent.
        num_invalid: particles with a non-finite loss or gradient, left out and restarted.
        num_clipped: losses above the meta-loss's clip.
        metrics: further numbers to log, by name; their names depend on the estimator.
    """

    grads: Tensors
    meta_loss: float
    num_inner_steps: int
    num_invalid: int
    num_clipped: int
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


class Estimator(ABC):
    """Estimates the gradient of the meta-loss with respect to theta.

    An estimator's state (its particles, and whatever it accumulates over truncations) is an object that it makes
    in `init` and advances in place in `estimate`; `state_dict` and `load_state_dict` turn it into plain tensors and
    back.
    """

    kind: ClassVar[str]

    trains_initial_params: bool = True
    """Whether learned initial parameters (`Workload.initial`) get a meta-gradient."""

    @abstractmethod
    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> Any:
        """The state before the first truncation, for particles with these indices in the whole run."""

    @abstractmethod
    def estimate(self, work: Workload, theta: Tensors, state: Any) -> Estimate:
        """Advance the state by one truncation and return its meta-gradient."""

    @abstractmethod
    def horizons(self, state: Any) -> list[int]:
        """The horizons of the episodes in flight."""

    @abstractmethod
    def state_dict(self, state: Any) -> dict[str, Any]:
        """The state as plain tensors, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> Any:
        """The state that `state_dict` described."""
