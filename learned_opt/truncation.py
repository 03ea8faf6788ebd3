"""Horizons: how long an episode is, and where the first ones are cut so that particles do not reset together."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

SCHEDULES = ("fixed", "log_uniform")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HorizonSchedule:
    """Draws the horizon of an episode.

    Attributes:
        kind: "fixed" (always `longest`) or "log_uniform" in [shortest, longest].
        longest: inner steps, at least 1.
        shortest: inner steps, between 1 and `longest`; only read by "log_uniform".
        random_offsets: cut each particle's first episode to a uniformly drawn length, so that
            particles reset at different times. Otherwise all start together.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    kind: str = "fixed"
    longest: int = 100
    shortest: int = 20
    random_offsets: bool = True

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"horizon kind must be one of {', '.join(SCHEDULES)}; got {self.kind!r}")
        if self.longest < 1:
            raise ValueError(f"longest horizon must be at least 1; got {self.longest}")
        if self.kind == "log_uniform" and not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest horizon must lie in [1, longest={self.longest}]; got {self.shortest}")

    def draw(self, run_seed: int, particle: int, episode: int) -> int:
        """The horizon of a particle's episode, a function of its arguments alone.

        Args:
            run_seed: the run's seed.
            particle: the particle's index in the whole run, whatever process it lives in.
            episode: 0 for its first.

        Returns:
            Inner steps, at least 1.
        """
        if self.kind == "fixed" and not (episode == 0 and self.random_offsets):
            return self.longest
        random = np.random.default_rng([run_seed, particle, episode, 1])
        horizon = self.longest
        if self.kind == "log_uniform":
            horizon = round(math.exp(random.uniform(math.log(self.shortest), math.log(self.longest))))
        if episode == 0 and self.random_offsets:
            return int(random.integers(1, horizon + 1))
        return horizon
