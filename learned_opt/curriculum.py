"""Schedules over outer steps, as pure functions of plain state: growing horizons, and parts of theta held fixed.

The curriculum (Chen et al. 2020) trains at one horizon of 100, 200, 500, 1000, 1500, 2000, … at a time and validates
at the next. While that improves it stays; once it has stopped improving, theta goes back to its best and the horizon
becomes the next one. The meta-trainer asks for the horizons, reports validation scores, and does what the answer says.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import math
from collections.abc import Iterable, Sequence

HORIZONS = (100, 200, 500, 1000, 1500, 2000)
"""The horizons of Chen et al. 2020; the curriculum continues in steps of 500."""

_STEP = 500


class Action(enum.Enum):
    """What the meta-trainer does after a validation."""

    CONTINUE = "continue"
    KEEP = "keep"
    """The score is the best at this horizon: remember theta."""
    ADVANCE = "advance"
    """Go back to the remembered theta, and train at the next horizon."""
    FINISH = "finish"
    """Go back to the remembered theta; there is no further horizon."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumState:
    """Where a curriculum stands: plain numbers.

    Attributes:
        stage: index of the horizon trained at.
        best: lowest validation score at this stage; infinity before the first.
        num_bad: validations in a row without improvement.
        finished: whether the last stage is over.
    """

    stage: int = 0
    best: float = math.inf
    num_bad: int = 0
    finished: bool = False

    def state_dict(self) -> dict[str, int | float | bool]:
        """Plain values; `CurriculumState(**state_dict)` is the inverse."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Horizons that grow when validation at the next horizon stops improving.

    Attributes:
        horizons: increasing inner steps, at least one.
        longest: the last horizon trained at; horizons beyond the listed ones follow in steps of 500. 0 for the last
            listed.
        patience: validations in a row without improvement before advancing, at least 1.
        min_improvement: by how much a score must be lower to count, non-negative.
    """

    horizons: tuple[int, ...] = HORIZONS
    longest: int = 0
    patience: int = 3
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizons", tuple(self.horizons))
        if not self.horizons or self.horizons[0] < 1 or any(a >= b for a, b in zip(self.horizons, self.horizons[1:])):
            raise ValueError(f"horizons must be increasing and at least 1; got {self.horizons}")
        if self.longest and self.longest < self.horizons[0]:
            raise ValueError(
                f"longest must be 0 or at least the first horizon ({self.horizons[0]}); got {self.longest}"
            )
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1; got {self.patience}")
        if not self.min_improvement >= 0:
            raise ValueError(f"min_improvement must be non-negative; got {self.min_improvement}")

    def _at(self, stage: int) -> int:
        extra = stage - len(self.horizons) + 1
        return self.horizons[stage] if extra <= 0 else self.horizons[-1] + extra * _STEP

    @property
    def num_stages(self) -> int:
        """How many horizons are trained at."""
        longest = self.longest or self.horizons[-1]
        count = 0
        while self._at(count) <= longest:
            count += 1
        return count

    def horizon(self, state: CurriculumState) -> int:
        """Inner steps of the episodes to meta-train on."""
        return self._at(state.stage)

    def validation_horizon(self, state: CurriculumState) -> int:
        """Inner steps to validate at: the next horizon, also at the last stage."""
        return self._at(state.stage + 1)

    def observe(self, state: CurriculumState, score: float) -> tuple[CurriculumState, Action]:
        """Take in one validation score (lower is better; one that is not finite never improves).

        Returns:
            (new state, what to do now).

        Raises:
            ValueError: the curriculum has finished.
        """
        if state.finished:
            raise ValueError("the curriculum has finished; there is nothing to observe")
        if math.isfinite(score) and (state.best == math.inf or score < state.best - self.min_improvement):
            return dataclasses.replace(state, best=score, num_bad=0), Action.KEEP
        if state.num_bad + 1 < self.patience:
            return dataclasses.replace(state, num_bad=state.num_bad + 1), Action.CONTINUE
        if state.stage + 1 == self.num_stages:
            return dataclasses.replace(state, num_bad=state.num_bad + 1, finished=True), Action.FINISH
        return CurriculumState(stage=state.stage + 1), Action.ADVANCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Outer steps in which a part of theta is learned and the rest held fixed.

    Attributes:
        num_outer_steps: how many, at least 1.
        trainable: names of theta's tensors, with shell wildcards ("output.*"); at least one.
    """

    num_outer_steps: int
    trainable: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainable", tuple(self.trainable))
        if self.num_outer_steps < 1:
            raise ValueError(f"num_outer_steps must be at least 1; got {self.num_outer_steps}")
        if not self.trainable:
            raise ValueError('trainable is empty; name at least one tensor of theta, or "*" for all')


def frozen_names(stages: Sequence[Stage], outer_step: int, names: Iterable[str]) -> tuple[str, ...]:
    """The names in theta that are held fixed at this outer step: `Workload.frozen`.

    The meta-optimizer must be given no gradient (None) for them: Adam moves on with its momentum when given zeros.

    Args:
        stages: one after another; after the last, all of theta is learned.
        outer_step: counted from 0.
        names: of theta's tensors.

    Raises:
        ValueError: a pattern of any stage that matches no name.
    """
    names = list(names)
    for stage in stages:
        for pattern in stage.trainable:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"trainable pattern {pattern!r} matches nothing in theta; it has {', '.join(names)}")
    for stage in stages:
        if outer_step < stage.num_outer_steps:
            return tuple(n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in stage.trainable))
        outer_step -= stage.num_outer_steps
    return ()
