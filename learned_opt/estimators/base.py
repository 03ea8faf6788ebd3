"""The interface of a meta-gradient estimator: what turns one truncation of particles into a meta-gradient."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.distributed import ALONE, Ranks
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
        ranks: the processes that share the run's particles.
    """

    rule: UpdateRule
    batched: BatchedFamily
    plan: EpisodePlan
    meta_loss: MetaLoss
    truncation: int
    frozen: tuple[str, ...] = ()
    initial: str = ""
    ranks: Ranks = ALONE

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
        metrics: further numbers to log, by name; their names depend on the estimator, and they are the same on every
            rank.
        weight: how much `grads` and `meta_loss` count in the mean over ranks: the number of particles (or of pairs)
            that they are the mean of.
    """

    grads: Tensors
    meta_loss: float
    num_inner_steps: int
    num_invalid: int
    num_clipped: int
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    weight: float = 1.0


class Estimator(ABC):
    """Estimates the gradient of the meta-loss with respect to theta.

    An estimator's state (its particles, and whatever it accumulates over truncations) is an object that it makes
    in `init` and advances in place in `estimate`; `state_dict` and `load_state_dict` turn it into plain tensors and
    back.

    A state is of the particles that it was made for, and an estimate is of those. Where several ranks share a run's
    particles, `sharded` gives an estimator for the particles of all: it makes the state of this rank's share and leaves
    the mean over ranks to `mean_over_ranks`.
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

    def units(self, work: Workload, ids: Sequence[int]) -> list[list[int]]:
        """The particles in groups that one rank must hold as a whole, all of one size.

        Raises:
            ValueError: the particles do not fill whole groups.
        """
        return [[i] for i in ids]

    def nothing(self, work: Workload, theta: Tensors) -> Estimate:
        """The estimate of a rank that holds no particle of this family."""
        return Estimate(
            grads={n: torch.zeros_like(v) for n, v in theta.items()},
            meta_loss=0.0,
            num_inner_steps=0,
            num_invalid=0,
            num_clipped=0,
            weight=0.0,
        )

    def merge(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The `state_dict` of all particles, from those of the ranks' shares; as one process would have made it."""
        raise NotImplementedError(f"{self.kind} cannot join the states of several ranks")

    def part(self, saved: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
        """This rank's share of such a `state_dict`; None for no particle."""
        raise NotImplementedError(f"{self.kind} cannot share its state among ranks")
