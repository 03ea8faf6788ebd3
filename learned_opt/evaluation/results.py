"""What a comparison found: plain numbers, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from learned_opt.evaluation.baselines import Tuning
from learned_opt.evaluation.metrics import Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss curve over tasks, at some of its steps.

    Attributes:
        steps: inner steps, ascending, the first 0 and the last the horizon.
        median, low, high: at these steps, the median over tasks and its confidence band; infinite where runs diverged.
    """

    steps: tuple[int, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds that one inner step of one task takes; `learned_opt.evaluation.cost` measures them.

    Attributes:
        gradient: the loss and its backward pass.
        step: the optimizer's own step.
    """

    gradient: float
    step: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.gradient + self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """One optimizer's numbers on one family's meta-test tasks; `learned_opt.evaluation.metrics` defines them.

    Attributes:
        num_tasks: meta-test tasks, over all seeds.
        num_diverged: those with a loss that is not finite.
        num_above_start: those that ended above their initial loss, diverged ones among them.
        num_thrown_back: those that rose above their initial loss after they had been below a tenth of it.
        final_loss, mean_loss: the mean over tasks of the final loss and of the mean loss along the way.
        final_ratio, mean_ratio: these divided by the reference's, None where there is no reference.
        task_final_ratio: the median over tasks of the final loss divided by the reference's on the same task, None
            where there is no reference.
        steps_to_reference: the median over tasks of the steps to reach the reference's final loss on the same task,
            infinite if half of them never do; None where there is no reference.
        share_reached: the share of tasks that reach it; None where there is no reference.
        speedup, horizon_speedup: the interquartile mean over tasks of the speed-up over the reference, by the two
            definitions of `learned_opt.evaluation.speedup`; None where there is no reference.
        metrics: the mean over tasks of each of the family's `eval_metrics`.
        curve: the loss curve.
        task_final_losses, task_mean_losses: one number per task, [num_tasks], infinite where it diverged.
        task_speedups, task_horizon_speedups: one number per task, [num_tasks]; None where there is no reference.
    """

    num_tasks: int
    num_diverged: int
    num_above_start: int
    num_thrown_back: int
    final_loss: Interval
    mean_loss: Interval
    final_ratio: Interval | None
    mean_ratio: Interval | None
    task_final_ratio: Interval | None
    steps_to_reference: Interval | None
    share_reached: float | None
    speedup: Interval | None
    horizon_speedup: Interval | None
    metrics: dict[str, Interval]
    curve: Curve
    task_final_losses: tuple[float, ...]
    task_mean_losses: tuple[float, ...]
    task_speedups: tuple[float, ...] | None
    task_horizon_speedups: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One row: an optimizer on a family.

    Attributes:
        family, optimizer: their labels.
        learned: whether the optimizer is an update rule rather than a baseline.
        horizon: inner steps.
        tuning: how a baseline's learning rate was chosen; None for a learned optimizer.
        scores: None for a baseline that diverged at every rate, and for an optimizer that could not run.
        note: what a reader should know of this row, or an empty string.
        cost: of an inner step; None where it was not measured.
    """

    family: str
    optimizer: str
    learned: bool
    horizon: int
    tuning: Tuning | None
    scores: Scores | None
    note: str
    cost: Cost | None = None

    @property
    def rate(self) -> float | None:
        """The learning rate; None for a learned optimizer, or where none was found."""
        return self.tuning.rate if self.tuning else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results for families × optimizers, as far as they have come.

    Attributes:
        families: label -> description.
        optimizers: labels.
        reference: label of the baseline that ratios are to; empty if it is not among the optimizers.
        num_tasks: meta-test tasks per seed.
        seeds: of the meta-test draws.
        confidence: of all intervals.
        results: in the order they were found; complete once there are `num_expected`.
    """

    families: dict[str, str]
    optimizers: tuple[str, ...]
    reference: str
    num_tasks: int
    seeds: tuple[int, ...]
    confidence: float
    results: tuple[Result, ...]

    @property
    def num_expected(self) -> int:
        """How many results a complete comparison has."""
        return len(self.families) * len(self.optimizers)

    def result(self, family: str, optimizer: str) -> Result | None:
        """The result of this optimizer on this family; None if it has not come.

        Raises:
            ValueError: a label that is not part of the comparison.
        """
        if family not in self.families:
            raise ValueError(f"family must be one of {', '.join(self.families)}; got {family!r}")
        if optimizer not in self.optimizers:
            raise ValueError(f"optimizer must be one of {', '.join(self.optimizers)}; got {optimizer!r}")
        for found in self.results:
            if (found.family, found.optimizer) == (family, optimizer):
                return found
        return None

    def ordered(self) -> list[Result]:
        """The results by family, then by optimizer, in the order of `families` and `optimizers`."""
        found = (self.result(family, optimizer) for family in self.families for optimizer in self.optimizers)
        return [result for result in found if result is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, strictly valid JSON: a number that is not finite becomes None."""
        plain = plain_values(dataclasses.asdict(self))
        plain["results"] = [plain_values(dataclasses.asdict(result)) for result in self.ordered()]
        assert isinstance(plain, dict)
        return plain

    def header(self) -> list[str]:
        """The columns of `rows`."""
        columns = ["optimizer", "rate", "final loss", "mean loss"]
        if self.reference:
            columns += [
                f"final / {self.reference}",
                f"mean / {self.reference}",
                f"steps to {self.reference}",
                "speed-up",
            ]
        return ["family", *columns, "diverged", *self._metric_names()]

    def rows(self, *, wide: bool = False) -> list[list[str]]:
        """The table's cells, one row a result, as `header` names them.

        Args:
            wide: give every mean its interval; otherwise the ratios alone have one, or, with no reference, the losses.
        """
        return [self._row(result, wide) for result in self.ordered()]

    def table(self, *, wide: bool = False) -> str:
        """Aligned plain text: a block for every family, a row for every optimizer, intervals in brackets, notes below.

        Args:
            wide: see `rows`.
        """
        header, rows = self.header()[1:], self.rows(wide=wide)
        widths = [max(len(name), *(len(row[i]) for row in rows), 0) for i, name in enumerate(header, start=1)]
        lines = ["  " + format_line(header, widths)]
        family = None
        for row in rows:
            if row[0] != family:
                lines += ["", row[0]]
            lines.append("  " + format_line(row[1:], widths))
            family = row[0]
        lines += ["", self._legend()]
        lines += [f"{r.family}, {r.optimizer}: {r.note}" for r in self.ordered() if r.note]
        return "\n".join(lines)

    def _legend(self) -> str:
        num_tasks = self.num_tasks * len(self.seeds)
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        text = f"Means over {num_tasks} meta-test tasks ({seeds}); {self.confidence:.0%} bootstrap intervals."
        if not self.reference:
            return text
        return (
            f"{text}\nRatios are to tuned {self.reference} on the same tasks; steps to {self.reference}: "
            "median steps to its final loss, and the share of tasks that reach it;\nspeed-up: its steps to that loss "
            "over the optimizer's, or, where never reached, its steps to the optimizer's final loss over all steps."
        )

    def _metric_names(self) -> list[str]:
        names: dict[str, None] = {}
        for result in self.ordered():
            names |= dict.fromkeys(result.scores.metrics if result.scores else ())
        return list(names)

    def _row(self, result: Result, wide: bool) -> list[str]:
        scores, names = result.scores, self._metric_names()
        cells = [result.family, result.optimizer, "-" if result.rate is None else f"{result.rate:.2g}"]
        if scores is None:
            diverged = "all" if result.tuning is not None else "-"
            return [*cells, *["-"] * (6 if self.reference else 2), diverged, *["-"] * len(names)]
        with_intervals = wide or not self.reference
        cells += [format_cell(scores.final_loss, 3, with_intervals), format_cell(scores.mean_loss, 3, with_intervals)]
        if self.reference:
            cells += [format_cell(ratio, 2, True) for ratio in (scores.final_ratio, scores.mean_ratio)]
            cells += [_steps(scores, result.horizon), format_cell(scores.speedup, 2, True)]
        cells.append(f"{scores.num_diverged}/{scores.num_tasks}")
        return cells + [format_cell(scores.metrics.get(name), 3, wide) for name in names]


def format_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a plain table: the first cell to the left, the others to the right."""
    parts = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
    return "  ".join(parts).rstrip()


def format_number(value: float, digits: int) -> str:
    """So many significant digits; plain notation from 0.0001 to a million."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= power < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - power, 0)}f}"


def format_cell(interval: Interval | None, digits: int, with_interval: bool) -> str:
    """A number, with its interval in brackets if asked for and if it has one; "-" for none."""
    if interval is None or math.isnan(interval.value):
        return "-"
    text = format_number(interval.value, digits)
    if not with_interval or interval.low == interval.high:
        return text
    return f"{text} [{format_number(interval.low, digits)}, {format_number(interval.high, digits)}]"


def _steps(scores: Scores, horizon: int) -> str:
    if scores.steps_to_reference is None or scores.share_reached is None:
        return "-"
    steps = scores.steps_to_reference.value
    return f"{f'{steps:g}' if math.isfinite(steps) else f'> {horizon}'} ({scores.share_reached:.0%})"


def plain_values(value: Any) -> Any:
    """What strictly valid JSON can hold: tuples become lists, and a number that is not finite None."""
    if isinstance(value, dict):
        return {name: plain_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
