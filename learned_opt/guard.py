"""An optional safeguard that keeps a learned optimizer from ruining a run: who takes the next step, and how far.

Four nets, each of which catches what falls through the one before:

1. A step with a non-finite gradient is skipped; a coordinate whose update is not finite stays. State is untouched, and
   both are counted.
2. The update of a tensor is clipped to a multiple of the norm that Adam's would have had: 1000 at first, a tenth of
   that after every fallback in a row. It is 10 where one of the first steps promises, to first order, to lower the
   loss by more than 0.6 of all there is of it: the gradient says little about where such a step leads, and the first
   steps of a learned optimizer, its longest, can do lasting harm.
3. Losses that rise by far more than their noise end the learned steps: the parameters return to the last point that
   showed progress, and Adam at its default rate takes over for a stretch. So they do where there has been no progress
   yet and patience is over. Every fallback in a row makes the stretch four times as long, and between two stretches
   the learned optimizer must make more progress than Adam did, and significantly so, or lose its turn at once.
4. Where the learned steps stand still, or gain less than Adam's promise to first order along the way, Adam has a
   trial from where they are, for a tenth of the steps so far or one stretch. It stays if the trial gained
   significantly more than the learned steps did; otherwise the wait before the next trial doubles.

Every comparison is one of medians over windows of losses that grow with the run, against the noise of these losses
about their trend. While the learned optimizer does well none of this changes a bit of the run.

What this can and cannot promise. All that is seen is one noisy loss a step, along one path: where Adam alone would be
by now is unknown, and no test of these losses can tell. Guaranteed are nets 1 and 2, and that the share of Adam's steps
tends to one for a learned optimizer that fails every time. Not guaranteed is that a run ends near or below where Adam
would have ended; `benchmarks/guard.py` measures that. A learned optimizer that goes down quickly, into a region that is
hard to leave, looks right until it stands still. Where noise hides all progress, it is stopped for want of patience and
not on evidence, and a slow one is found out late. The steps until then, some tens or a part of the run, are lost.

The third is the idea of loss-guarded learned optimizers (Prémont-Schwarz et al. 2022). They evaluate both optimizers on
held-out batches at every decision; we compare the training losses that a run has anyway.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Literal

_MOST_LOSSES = 500  # of a window; they travel in the state
_EVIDENT = 0.02  # noise of a comparison, relative to the loss, below which standing still is told from slow progress
_CREDIBLE = 0.01  # share of the loss that a step of Adam is believed to gain


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """How tight the guard is.

    Attributes:
        adam_lr: learning rate of the Adam that the learned steps are measured against and replaced by, positive.
        trust: the largest norm of a tensor's update, in norms of Adam's, at least 1.
        cautious_trust: the same where the first steps promise too much, at least 1; `trust` if that is less.
        promise: how much of the loss one of the first steps may promise, positive.
        window: losses that are at least averaged and compared, at least 2.
        patience: windows without progress after which something is done, at least 1.
        stretch: Adam steps of the first fallback, at least 1; four times as many with each that follows.
        significance: how many standard errors count as a difference, positive.
        least_progress: what counts as progress, relative to the loss, in [0, 1).
        slow: share of Adam's promise that the learned steps must gain to be left alone, in [0, 1].
    """

    adam_lr: float = 1e-3
    trust: float = 1000.0
    cautious_trust: float = 10.0
    promise: float = 0.6
    window: int = 10
    patience: int = 3
    stretch: int = 20
    significance: float = 2.0
    least_progress: float = 0.005
    slow: float = 0.9

    def __post_init__(self) -> None:
        for name in ("adam_lr", "significance", "promise"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"guard {name} must be positive and finite; got {getattr(self, name)}")
        if not 0 <= self.least_progress < 1:
            raise ValueError(f"guard least_progress must lie in [0, 1); got {self.least_progress}")
        if not 0 <= self.slow <= 1:
            raise ValueError(f"guard slow must lie in [0, 1]; got {self.slow}")
        for name, least in (("trust", 1), ("cautious_trust", 1), ("window", 2), ("patience", 1), ("stretch", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"guard {name} must be at least {least}; got {getattr(self, name)}")


Action = Literal["go on", "accept", "restore"]


@dataclasses.dataclass
class Watch:
    """Who takes the steps: decides it from the losses, one number a step.

    Attributes:
        adam_steps: how many steps Adam still has; 0 while the learned optimizer is at it.
        trial: whether those steps are a trial.
        losses: of the present window.
        num_steps: losses seen after the first.
        num_turn: of these, those since the learned optimizer, or Adam, took over; trials do not end a turn.
        num_flat: learned steps since the reference.
        num_since_trial: learned steps since Adam's last steps.
        first: the first finite loss; None before.
        level, error, spread: of the reference, the last window that showed progress: where the loss was, the standard
            error of that, and the noise of single losses. The first is None before there is one.
        promised: what Adam's steps have promised since the reference.
        adam_rate, learned_rate: progress a step in Adam's last turn, and of the learned steps before a trial.
        proven: whether the learned optimizer has made progress since it took over.
        cautious: whether the first steps promised too much.
        num_failed: fallbacks in a row; a success takes one off.
        num_vain: trials in a row that found Adam no better.
        num_trials, num_fallbacks: trials of Adam, and fallbacks to it.
        num_skipped, num_clipped, num_frozen: steps skipped for a non-finite gradient, updates clipped, coordinates that
            stayed for a non-finite update.
    """

    adam_steps: int = 0
    trial: bool = False
    losses: list[float] = dataclasses.field(default_factory=list)
    num_steps: int = 0
    num_turn: int = 0
    num_flat: int = 0
    num_since_trial: int = 0
    first: float | None = None
    level: float | None = None
    error: float = 0.0
    spread: float = 0.0
    promised: float = 0.0
    adam_rate: float = 0.0
    learned_rate: float = 0.0
    proven: bool = False
    cautious: bool = False
    num_failed: int = 0
    num_vain: int = 0
    num_trials: int = 0
    num_fallbacks: int = 0
    num_skipped: int = 0
    num_clipped: int = 0
    num_frozen: int = 0

    @property
    def learned(self) -> bool:
        """Whether the learned optimizer takes the next step."""
        return self.adam_steps == 0

    def trust(self, config: GuardConfig) -> float:
        """The present bound on a tensor's update, in norms of Adam's."""
        start = min(config.cautious_trust, config.trust) if self.cautious else config.trust
        return max(start * 10.0**-self.num_failed, 1.0)

    def dumps(self) -> str:
        """The watch as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> Watch:
        """The watch that `dumps` wrote; what other versions kept beside is left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def hear(self, promise: float, adam_promise: float, loss: float, config: GuardConfig) -> None:
        """Take note of by how much the learned step, and Adam's in its place, lower the loss to first order."""
        if self.num_steps < config.window and promise > config.promise * abs(loss):
            self.cautious = True
        self.promised += min(max(adam_promise, 0.0), _CREDIBLE * abs(loss))

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
            self.first = self.level = loss
            return "accept"
        self.num_steps += 1
        self.num_turn += 1
        self.losses = [*self.losses[1 - _MOST_LOSSES :], loss]
        if not self.learned:
            self.adam_steps -= 1
            return self._judge_adam(config) if self.adam_steps == 0 else "go on"
        self.num_flat += 1
        self.num_since_trial += 1
        if self._alarm(loss):
            return self._fall_back(config)
        return self._judge_learned(config) if len(self.losses) >= self._window(config) else "go on"

    @property
    def _retry(self) -> bool:
        """Whether the learned optimizer has come back from a fallback and has shown nothing yet."""
        return self.num_failed > 0 and not self.proven

    def _window(self, config: GuardConfig) -> int:
        """Late progress is slow beside the noise: windows that grow with the run can still tell it."""
        share = config.stretch * 4**self.num_failed // 40 if self._retry else self.num_turn // 5
        return min(max(config.window, share), _MOST_LOSSES)

    def _room(self) -> float:
        """What may be lost of the loss, noise apart: a tenth of what the run has gained; little in a retry."""
        assert self.first is not None and self.level is not None
        if self.proven:
            return 0.1 * max(self.first - self.level, 0.0)
        return 0.02 * abs(self.level) if self.num_failed else 0.0

    def _alarm(self, loss: float) -> bool:
        """Whether one loss is bad enough not to wait for the window's end; sooner in a retry."""
        assert self.first is not None and self.level is not None
        if self._retry:
            return not loss <= self.level + self._room() + 6 * self.spread
        return not loss <= self.level + 10 * self.spread + max(10 * abs(self.first), 5 * (self.first - self.level))

    def _judge_learned(self, config: GuardConfig) -> Action:
        losses, self.losses = self.losses, []
        assert self.level is not None
        initial = not self.spread and not self.num_failed and not self.proven
        spread = _spread(losses)
        if initial:
            losses = losses[len(losses) // 2 :]  # learned optimizers like to start with a jump
            spread = max(spread, _spread(losses))
        level, few = statistics.median(losses), 1 + 3 / len(losses)  # of few losses less is known
        if not math.isfinite(level):
            return self._fall_back(config)
        error = few * 1.25 * spread / math.sqrt(len(losses))  # of a median
        # The first window has only its own beginning to compare with: one loss, as noisy as its others.
        noise = config.significance * math.hypot(error, few * spread if initial else self.error)
        gain, steps = self.level - level, self.num_flat
        slow = gain + noise < config.slow * self.promised
        better = gain > max(noise, config.least_progress * abs(self.level)) + (self.adam_rate * steps * self._retry)
        if better:
            self._refer(level, error, spread)
            self.num_failed = max(self.num_failed - 1, 0)
            self.proven = True
        elif self._retry or -gain > 1.5 * noise + self._room():
            return self._fall_back(config)
        elif initial:
            self.level, self.error, self.spread = level, error, spread  # one loss was a poor reference
        elif gain > 0 and error < 0.5 * self.error:
            better = True  # not significantly lower, but far better known
            self._refer(level, error, spread)
        evident = noise < _EVIDENT * abs(level)
        wait = config.patience * config.window * (1 if self.proven or evident or self.cautious else 2)
        wait = max(wait, self.num_turn // 4)
        flat, due = self.num_flat >= wait, self.num_since_trial >= wait * 2**self.num_vain
        if due and flat and not self.proven:
            return self._fall_back(config)
        if due and (slow or (flat and evident)):
            self.learned_rate = max(gain / steps, 0.0)
            self.adam_steps, self.trial = max(config.stretch, self.num_steps // 10), True
            self.num_trials += 1
            self._refer(level, error, spread)
            return "accept"
        return "accept" if better else "go on"

    def _judge_adam(self, config: GuardConfig) -> Action:
        losses, self.losses = self.losses, []
        assert self.first is not None and self.level is not None
        trial, self.trial = self.trial, False
        self.num_flat = self.num_since_trial = 0
        self.promised = 0.0
        num_steps = len(losses) if trial else self.num_turn
        if not all(map(math.isfinite, losses)):
            self.num_turn, self.proven = 0, False
            return "go on"
        # What comes next is compared with where Adam got to, not with where it was on average.
        losses = losses[-max(len(losses) // 2, min(len(losses), config.window)) :]
        end, spread = _end_of_trend(losses), _spread(losses)
        error = 2 * spread / math.sqrt(len(losses))
        gain = self.level - end
        noise = config.significance * math.hypot(error, self.error)
        if trial:
            led_nowhere = self.level > self.first - 0.1 * abs(self.first)  # then the smaller steps are the safer ones
            least = max(noise, config.least_progress * abs(self.level)) + self.learned_rate * num_steps
            if gain <= least and not led_nowhere:
                self.num_vain += 1
                return "restore" if -gain > noise else "go on"
            self.adam_steps = config.stretch * 4**self.num_failed
            self.num_failed += 1
            self.num_fallbacks += 1
            self.num_vain = 0
        self.num_turn = 0
        self.proven = False
        self.adam_rate = max(gain / num_steps, 0.0)
        if -gain > noise + self._room():
            return "go on"
        self._refer(end, error, spread)
        return "accept"

    def _refer(self, level: float, error: float, spread: float) -> None:
        """Compare with this from now on."""
        self.level, self.error, self.spread = level, error, spread
        self.num_flat, self.promised = 0, 0.0

    def _fall_back(self, config: GuardConfig) -> Action:
        self.adam_steps = config.stretch * 4**self.num_failed
        self.num_failed += 1
        self.num_fallbacks += 1
        self.num_turn = self.num_flat = self.num_since_trial = 0
        self.promised = 0.0
        self.proven = False
        self.losses = []
        return "restore"


def _spread(losses: Sequence[float]) -> float:
    """The standard deviation of losses about a falling or rising line: their noise, without their trend."""
    if len(losses) < 3 or not all(map(math.isfinite, losses)):
        return 0.0 if len(losses) < 3 else math.inf
    slope, level = statistics.linear_regression(range(len(losses)), losses)
    return math.sqrt(sum((y - level - slope * x) ** 2 for x, y in enumerate(losses)) / (len(losses) - 2))


def _end_of_trend(losses: Sequence[float]) -> float:
    """Where a line through the losses ends; its standard error is about twice that of their mean."""
    if len(losses) < 3:
        return losses[-1]
    slope, level = statistics.linear_regression(range(len(losses)), losses)
    return level + slope * (len(losses) - 1)


def announce() -> None:
    """Say that Adam has taken over."""
    warnings.warn(
        "the learned optimizer made no progress here or made the loss worse; Adam takes over for a stretch, and again "
        "whenever that recurs. This is said once: optimizer.watch counts the fallbacks",
        stacklevel=6,
    )
