"""An optional safeguard that keeps a learned optimizer from ruining a run.

Three nets, each of which catches what falls through the one before:

1. A step with a non-finite gradient is skipped; a coordinate whose update is not finite stays. State is untouched, and
   both are counted.
2. The update of a tensor is clipped to a multiple of the norm that Adam's would have had.
3. Given the loss of every step, windows of losses are compared. Where learned steps have made matters worse, or have
   led nowhere for several windows, the parameters return to the last point that showed progress, and Adam takes over
   for a stretch. Every fallback that follows at once makes the stretch four times as long, so that a learned optimizer
   that does not fit the problem costs a vanishing share of the steps.

The third is the idea of loss-guarded learned optimizers (Prémont-Schwarz et al. 2022). They evaluate both optimizers on
held-out batches at every decision; we compare the training losses that a run has anyway, with their noise, and pay for
a wrong decision by going back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

MOMENT1, MOMENT2, ACCEPTED, ADAM_STEP = "guard.m", "guard.v", "guard.param", "guard.step"
KEYS = (MOMENT1, MOMENT2, ACCEPTED)
"""What the guard keeps for a parameter, beside the scalar `ADAM_STEP`: Adam's moments, and the last accepted point."""

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_ALARM, _ALARM_LATER = 10.0, 0.5  # a loss so many times above the reference ends a window; before and after a fallback
_LARGE = 1e18  # the square of a larger gradient overflows float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """How tight the guard is.

    Attributes:
        adam_lr: learning rate of the Adam that the learned steps are measured against and replaced by, positive.
        trust: the largest norm of a tensor's update, in norms of Adam's, at least 1.
        window: losses that are averaged and compared, at least 2.
        patience: windows without progress, where noise may hide it, after which Adam has a try, at least 1.
        stretch: Adam steps of the first fallback, at least 1; four times as many with each that follows.
        significance: how many standard errors count as a difference, positive.
        least_progress: what counts as progress, relative to the loss, in [0, 1).
    """

    adam_lr: float = 1e-3
    trust: float = 1000.0
    window: int = 10
    patience: int = 3
    stretch: int = 20
    significance: float = 2.0
    least_progress: float = 0.005

    def __post_init__(self) -> None:
        for name in ("adam_lr", "significance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"guard {name} must be positive and finite; got {getattr(self, name)}")
        if not 0 <= self.least_progress < 1:
            raise ValueError(f"guard least_progress must lie in [0, 1); got {self.least_progress}")
        for name, least in (("trust", 1), ("window", 2), ("patience", 1), ("stretch", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"guard {name} must be at least {least}; got {getattr(self, name)}")


Action = Literal["go on", "accept", "restore"]


@dataclasses.dataclass
class Watch:
    """Who takes the steps: decides it from the losses, one number a step.

    Attributes:
        adam_steps: how many steps Adam still has; 0 while the learned optimizer is at it.
        losses: of the present window.
        num_learned: steps since the learned optimizer took over; its windows grow with them.
        first: the first finite loss; None before.
        level, error, spread: of the reference window, the last that showed progress: its median, the standard error of
            that, and the noise of its losses. The first is None in the first window.
        num_flat: windows since then.
        num_failed: fallbacks in a row; a success takes one off.
        num_fallbacks, num_skipped, num_clipped, num_frozen: fallbacks to Adam, steps skipped for a non-finite gradient,
            updates clipped, coordinates that stayed for a non-finite update.
    """

    adam_steps: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    num_learned: int = 0
    first: float | None = None
    level: float | None = None
    error: float = 0.0
    spread: float = 0.0
    num_flat: int = 0
    num_failed: int = 0
    num_fallbacks: int = 0
    num_skipped: int = 0
    num_clipped: int = 0
    num_frozen: int = 0

    @property
    def learned(self) -> bool:
        """Whether the learned optimizer takes the next step."""
        return self.adam_steps == 0

    def dumps(self) -> str:
        """The watch as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> Watch:
        """The watch that `dumps` wrote."""
        return cls(**json.loads(text))

    def observe(self, loss: float, config: GuardConfig) -> Action:
        """Take note of the loss at the present parameters.

        Returns:
            "accept": the present parameters are the ones to return to from now on; "restore": return to those, and
            forget what was remembered on the way; "go on": neither.
        """
        if not math.isfinite(loss):
            loss = math.inf
        if self.first is None:
            if loss == math.inf:
                return "go on"  # nothing to compare with, and nowhere to return to
            self.first = loss
            self.losses = [loss]
            self.num_learned = 1
            return "accept"
        self.losses.append(loss)
        if not self.learned:
            self.adam_steps -= 1
            over = len(self.losses) == config.window or self.adam_steps == 0
            return self._judge_adam(config) if over else "go on"
        self.num_learned += 1
        if self._alarm(loss):
            return self._fall_back(config)
        # Late progress is slow beside the noise: windows that grow with the run can still tell it.
        over = len(self.losses) >= max(config.window, self.num_learned // 5)
        return self._judge_learned(config) if over else "go on"

    def _alarm(self, loss: float) -> bool:
        """Whether one loss is bad enough not to wait for the window's end; sooner after a fallback."""
        base, allowed = (
            (self.first, _ALARM) if self.level is None else (self.level, _ALARM_LATER if self.num_failed else _ALARM)
        )
        assert base is not None
        return not loss <= base + allowed * abs(base) + 4 * self.spread

    def _compare(self, config: GuardConfig) -> tuple[int, float, float, float]:
        """The window is over: (−1 better, 0 the same, 1 worse than the reference; median, error, spread); clears it."""
        losses, self.losses = self.losses, []
        if self.level is None:
            losses = losses[len(losses) // 2 :]  # learned optimizers like to start with a jump
        level = statistics.median(losses)
        spread = _spread(losses) if math.isfinite(level) else math.inf
        error = 1.25 * spread / math.sqrt(len(losses))  # of a median of normal numbers
        # The first window has only its own beginning to compare with: one loss, as noisy as its others.
        before, before_error = (self.first, spread) if self.level is None else (self.level, self.error)
        assert before is not None
        margin = config.significance * math.hypot(error, before_error)
        verdict = (
            -1
            if level < before - max(margin, config.least_progress * abs(before))
            else 0
            if level <= before + margin
            else 1
        )
        return verdict if math.isfinite(level) else 1, level, error, spread

    def _judge_learned(self, config: GuardConfig) -> Action:
        verdict, level, error, spread = self._compare(config)
        # Standing still needs patience only where noise could hide the progress.
        evident = 2 * config.significance * error < config.least_progress * abs(level)
        if verdict == 1 or (verdict == 0 and evident):
            return self._fall_back(config)
        if verdict == 0 and self.level is not None:
            self.num_flat += 1
            if self.num_flat >= (1 if self.num_failed else config.patience):
                return self._fall_back(config)
            return "go on"
        self.level, self.error, self.spread, self.num_flat = level, error, spread, int(verdict == 0)
        if verdict == 0:
            return "go on"
        self.num_failed = max(self.num_failed - 1, 0)
        return "accept"

    def _judge_adam(self, config: GuardConfig) -> Action:
        if not all(map(math.isfinite, self.losses)):
            self.losses = []
            return "go on"
        # What comes next is compared with where Adam got to, not with where it was on average.
        end = _end_of_trend(self.losses)
        verdict, _, error, spread = self._compare(config)
        if verdict == 1:
            return "go on"
        self.level, self.error, self.spread = end, 2 * error, spread
        return "accept"

    def _fall_back(self, config: GuardConfig) -> Action:
        self.adam_steps = config.stretch * 4**self.num_failed
        self.num_failed += 1
        self.num_fallbacks += 1
        self.num_flat = self.num_learned = 0
        self.losses = []
        return "restore"


def _spread(losses: Sequence[float]) -> float:
    """The standard deviation of losses about a falling or rising line: their noise, without their trend."""
    steps = range(len(losses))
    if len(losses) < 3:
        return 0.0
    slope, level = statistics.linear_regression(steps, losses)
    return math.sqrt(sum((y - level - slope * x) ** 2 for x, y in zip(steps, losses)) / (len(losses) - 2))


def _end_of_trend(losses: Sequence[float]) -> float:
    """Where a line through the losses ends; its standard error is about twice that of their mean."""
    if len(losses) < 3:
        return losses[-1]
    slope, level = statistics.linear_regression(range(len(losses)), losses)
    return level + slope * (len(losses) - 1)


def init_state(state: dict[str, Any], param: torch.Tensor, dtype: torch.dtype) -> None:
    """Add what the guard keeps for a parameter to its state."""
    for key in (MOMENT1, MOMENT2):
        state[key] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    state[ACCEPTED] = param.detach().clone(memory_format=torch.contiguous_format)
    state[ADAM_STEP] = torch.zeros((), dtype=torch.float32)


def usable(grads: Sequence[torch.Tensor]) -> bool:
    """Whether every gradient is finite, and its square too."""
    return all(bool((grad.abs() <= _LARGE).all()) for grad in grads)


def adam_update(state: dict[str, Any], grad: torch.Tensor, lr: float) -> torch.Tensor:
    """Adam's update [n] of one parameter for a gradient [n]; advances its moments."""
    m, v, step = state[MOMENT1].view(-1), state[MOMENT2].view(-1), state[ADAM_STEP]
    step.add_(1)
    m.lerp_(grad.to(m.dtype), 1 - _BETA1)
    v.mul_(_BETA2).addcmul_(grad.to(v.dtype), grad.to(v.dtype), value=1 - _BETA2)
    count = float(step)
    root = (v / (1 - _BETA2**count)).sqrt_().add_(_EPS)
    return m.div(root).mul_(-lr / (1 - _BETA1**count))


def clip_to(update: torch.Tensor, bound: torch.Tensor, trust: float) -> bool:
    """Scale the update, in place, to at most `trust` times the norm of `bound`; whether that was needed."""
    limit, norm = trust * float(bound.norm()), float(update.norm())
    if norm <= limit:
        return False
    update.mul_(limit / norm)
    return True


def accept(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Remember the parameter as it is."""
    state[ACCEPTED].copy_(param)


def restore(param: torch.Tensor, state: dict[str, Any]) -> None:
    """Return to the last accepted point, with a memory that has seen nothing."""
    param.copy_(state[ACCEPTED])
    for key, value in state.items():
        if key != ACCEPTED and isinstance(value, torch.Tensor):
            value.zero_()


def announce() -> None:
    """Say that Adam has taken over."""
    warnings.warn(
        "the learned optimizer made no progress here or made the loss worse; Adam takes over for a stretch, and again "
        "whenever that recurs. This is said once: optimizer.watch counts the fallbacks",
        stacklevel=6,
    )
