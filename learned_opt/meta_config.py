"""How a meta-trainer learns: its configuration, validated when made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import ClassVar

import torch

from learned_opt.curriculum import Curriculum, CurriculumState, Stage
from learned_opt.initial_params import InitialParamsConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.truncation import HorizonSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTrainerConfig:
    """How theta is learned.

    Attributes:
        outer_steps: updates of theta, at least 1.
        num_particles: tasks in flight per family, at least 1.
        truncation: inner steps per meta-gradient, at least 1.
        horizons: how long episodes are.
        curriculum: lets the longest horizon grow: `horizons.longest` and `validation_horizon` then follow it, and
            validation decides when. None for a fixed schedule.
        stages: which parts of theta are learned at first, the rest held fixed; after the last stage, all of it.
        initial_params: families whose tasks start from learned parameters, held in theta beside the rule's weights;
            none by default.
        meta_loss: the scalar to lower.
        optimizer: name of a class in `torch.optim`, the meta-optimizer.
        learning_rate: of the meta-optimizer, positive.
        final_learning_rate: the learning rate at the last outer step as a share of `learning_rate`, in (0, 1]; a half
            cosine leads there.
        clip_norm: bound on the global norm of the meta-gradient, positive.
        accumulation: truncations averaged per outer step, at least 1.
        families_per_step: families that each outer step uses, in turn; 0 for all.
        balance_families: divide every family's meta-gradient by a running average of its own norm before they are
            averaged: families whose losses fall by decades then do not drown those that end on a noise floor.
        validation_every: outer steps between validations; 0 for none before the last step.
        validation_tasks: meta-validation tasks per family.
        validation_horizon: inner steps of each; 0 for the longest training horizon.
        seed: names the tasks, their batches, and theta's initial values; non-negative.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    outer_steps: int = 500
    num_particles: int = 8
    truncation: int = 20
    horizons: HorizonSchedule = HorizonSchedule()
    curriculum: Curriculum | None = None
    stages: tuple[Stage, ...] = ()
    initial_params: InitialParamsConfig = InitialParamsConfig()
    meta_loss: MetaLoss = MetaLoss()
    optimizer: str = "Adam"
    learning_rate: float = 3e-3
    final_learning_rate: float = 0.03
    clip_norm: float = 1.0
    accumulation: int = 1
    families_per_step: int = 0
    balance_families: bool = False
    validation_every: int = 50
    validation_tasks: int = 16
    validation_horizon: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("outer_steps", "num_particles", "truncation", "accumulation", "validation_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("families_per_step", "validation_every", "validation_horizon", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be non-negative; got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not 0 < self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must lie in (0, 1]; got {self.final_learning_rate}")
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.curriculum is not None and not self.validation_every:
            raise ValueError("a curriculum advances on validation; set validation_every to at least 1")
        optimizer_class(self.optimizer)

    def horizons_at(self, curriculum: CurriculumState) -> HorizonSchedule:
        """The schedule of horizons where the curriculum stands."""
        if self.curriculum is None:
            return self.horizons
        return dataclasses.replace(self.horizons, longest=self.curriculum.horizon(curriculum))

    def validation_horizon_at(self, curriculum: CurriculumState) -> int:
        """The inner steps of a validation where the curriculum stands."""
        if self.curriculum is None:
            return self.validation_horizon or self.horizons.longest
        return self.curriculum.validation_horizon(curriculum)

    def learning_rate_at(self, outer_step: int, peak: float | None = None) -> float:
        """The meta-optimizer's learning rate at this outer step, counted from 0; `peak` instead of `learning_rate`."""
        progress = min(outer_step / max(self.outer_steps - 1, 1), 1.0)
        low = self.final_learning_rate
        return (self.learning_rate if peak is None else peak) * (
            low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        )


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The torch.optim class of this name; those that need a closure or sparse gradients are left out."""
    unfit = ("Optimizer", "LBFGS", "SparseAdam")
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or name in unfit:
        names = [
            n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
        ]
        near = difflib.get_close_matches(name, [n for n in names if n not in unfit], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"optimizer must name a torch.optim class for dense gradients; got {name!r}{hint}")
    return found
