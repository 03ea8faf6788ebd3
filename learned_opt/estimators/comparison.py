"""Which estimator to use: bias, variance, signal-to-noise ratio and cost of each, for a rule, a family and a theta.

Every estimator is asked for the same thing: the gradient of the mean loss over a whole horizon, at one theta. One
sample starts particles on fresh tasks and averages the meta-gradients of the truncations that make up the horizon,
with theta held; what an estimator leaves out, because it looks at one truncation at a time, is its bias. The reference
is exact backpropagation through the whole horizon on the same tasks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.estimators.antithetic import flatten
from learned_opt.estimators.backprop import TruncatedBackprop
from learned_opt.estimators.base import Estimator, Workload
from learned_opt.estimators.statistics import Quality, quality
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan
from learned_opt.rules.base import UpdateRule
from learned_opt.task import TaskFamily, Tensors
from learned_opt.truncation import HorizonSchedule

_MEASURES = ("cosine", "norm_ratio", "projection", "variance", "signal_to_noise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One estimator at one truncation.

    Attributes:
        estimator: its label.
        truncation: inner steps.
        quality: bias and noise of one sample.
        seconds: per sample, wall clock.
        inner_steps_per_second: inner steps x particles.
        num_invalid: particles left out because their loss was not finite, in all samples.
    """

    estimator: str
    truncation: int
    quality: Quality
    seconds: float
    inner_steps_per_second: float
    num_invalid: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of `compare`.

    Attributes:
        settings: what was compared, as plain values.
        rows: one per estimator and truncation.
    """

    settings: dict[str, Any]
    rows: list[Row]

    def table(self) -> str:
        """A table in Markdown; intervals are at 95 %."""
        head = ("estimator", "truncation", *(m.replace("_", " ") for m in _MEASURES), "inner steps/s", "s/sample")
        lines = [head, tuple("---" for _ in head)]
        for row in self.rows:
            measures = (str(getattr(row.quality, m)) for m in _MEASURES)
            lines.append(
                (
                    row.estimator,
                    str(row.truncation),
                    *measures,
                    f"{row.inner_steps_per_second:,.0f}",
                    f"{row.seconds:.3g}",
                )
            )
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def to_json(self) -> str:
        """Settings and rows; numbers that are undefined are null."""
        return json.dumps(
            _plain({"settings": self.settings, "rows": [dataclasses.asdict(r) for r in self.rows]}), indent=2
        )

    def metrics(self, prefix: str = "estimators") -> dict[str, float]:
        """Flat numbers to log: "<prefix>/<estimator>/<truncation>/<measure>"; undefined ones are left out."""
        out: dict[str, float] = {}
        for row in self.rows:
            at = f"{prefix}/{row.estimator}/{row.truncation}"
            values = {m: getattr(row.quality, m).value for m in _MEASURES}
            values["inner_steps_per_second"] = row.inner_steps_per_second
            out |= {f"{at}/{name}": value for name, value in values.items() if math.isfinite(value)}
        return out

    def plot(self, path: str | Path) -> None:
        """Write a picture: cosine, norm ratio, signal-to-noise ratio and speed over the truncation."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2)
        titles = {"cosine": "cosine to the full gradient", "norm_ratio": "norm over the full gradient's"}
        titles["signal_to_noise"] = "signal-to-noise ratio of one sample"
        for axes, (measure, title) in zip(panels.flat, titles.items()):
            for index, label in enumerate(dict.fromkeys(row.estimator for row in self.rows)):
                found = [(r.truncation, getattr(r.quality, measure)) for r in self.rows if r.estimator == label]
                # Side by side, so that no interval hides another.
                at = [truncation * 1.05**index for truncation, interval in found if math.isfinite(interval.value)]
                intervals = [interval for _, interval in found if math.isfinite(interval.value)]
                values = [i.value for i in intervals]
                bars = [[max(i.value - i.low, 0.0) for i in intervals], [max(i.high - i.value, 0.0) for i in intervals]]
                axes.errorbar(at, values, yerr=bars, marker="o", capsize=2, label=label)
            axes.set(title=title, xlabel="truncation (inner steps)", xscale="log")
        panels[0, 0].axhline(0, color="black", linewidth=0.8)
        for axes in panels[0]:
            axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        panels[1, 0].set_yscale("symlog", linthresh=0.01)
        panels[1, 0].set_ylim(bottom=0)
        for label in dict.fromkeys(row.estimator for row in self.rows):
            rows = [r for r in self.rows if r.estimator == label]
            panels[1, 1].plot(
                [r.truncation for r in rows], [r.inner_steps_per_second for r in rows], marker="o", label=label
            )
        panels[1, 1].set(title="inner steps x particles per second", xlabel="truncation (inner steps)", xscale="log")
        panels[1, 1].set_ylim(bottom=0)
        panels[1, 1].legend()
        figure.savefig(path, dpi=150)


def _plain(value: Any) -> Any:
    """JSON values, with null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    rule: UpdateRule,
    family: TaskFamily,
    theta: Tensors,
    estimators: Mapping[str, Estimator],
    *,
    horizon: int,
    truncations: Sequence[int],
    num_particles: int = 16,
    num_samples: int = 16,
    reference: Estimator | None = None,
    meta_loss: MetaLoss | None = None,
    run_seed: int = 0,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Measure estimators against the gradient of a whole horizon.

    Args:
        rule: the update rule.
        family: whose tasks to run, of the meta-train split.
        theta: the meta-parameters to take the gradient at; its dtype is used throughout.
        estimators: label -> estimator.
        horizon: inner steps of an episode, at least 1.
        truncations: each a divisor of the horizon.
        num_particles: tasks or arms in flight in one sample, even for the evolution strategies.
        num_samples: independent samples per estimator and truncation, at least 4.
        reference: what counts as the full gradient, run with a truncation as long as the horizon; exact
            backpropagation with recomputation by default. Give an evolution strategy for losses without a second
            derivative.
        meta_loss: the scalar, with average "mean".
        run_seed: names the tasks.
        device: where everything runs.

    Returns:
        Rows in the order of `estimators`, then of `truncations`.

    Raises:
        ValueError: an argument out of its range, named with the remedy.
    """
    meta_loss = meta_loss or MetaLoss()
    if meta_loss.average != "mean":
        raise ValueError(
            f"meta_loss must have average='mean', since only means over truncations add up to that over the horizon; "
            f"got {meta_loss.average!r}"
        )
    if num_samples < 4:
        raise ValueError(f"num_samples must be at least 4, for confidence intervals; got {num_samples}")
    if not estimators:
        raise ValueError("estimators is empty; name at least one")
    for truncation in truncations:
        if truncation < 1 or horizon % truncation:
            raise ValueError(f"truncations must divide the horizon ({horizon}); got {truncation}")
    dtype = next(iter(theta.values())).dtype
    theta = {n: v.detach().to(device) for n, v in theta.items()}
    batched = BatchedFamily(family, device=device, dtype=dtype)

    def work(truncation: int, sample: int) -> Workload:
        schedule = HorizonSchedule(longest=horizon, random_offsets=False)
        plan = EpisodePlan(split="meta_train", run_seed=run_seed * 100_003 + sample, horizons=schedule)
        return Workload(rule=rule, batched=batched, plan=plan, meta_loss=meta_loss, truncation=truncation)

    def measure(estimator: Estimator, truncation: int) -> tuple[torch.Tensor, float, int, int]:
        """(samples [num_samples, num_theta], seconds, inner steps x particles, invalid particles)."""
        rows, seconds, steps, invalid = [], 0.0, 0, 0
        for sample in range(num_samples):
            at = work(truncation, sample)
            state = estimator.init(at, theta, range(num_particles))
            parts = []
            _synchronize(device)
            began = time.perf_counter()
            for _ in range(horizon // truncation):
                estimate = estimator.estimate(at, theta, state)
                parts.append(flatten(estimate.grads))
                steps += estimate.num_inner_steps
                invalid += estimate.num_invalid
            rows.append(torch.stack(parts).mean(0).cpu())  # which waits for the device
            seconds += time.perf_counter() - began
        return torch.stack(rows), seconds, steps, invalid

    full, *_ = measure(reference or TruncatedBackprop(order=2, recompute=True), horizon)
    rows = []
    for label, estimator in estimators.items():
        for truncation in truncations:
            samples, seconds, steps, invalid = measure(estimator, truncation)
            rows.append(
                Row(
                    estimator=label,
                    truncation=truncation,
                    quality=quality(samples, full),
                    seconds=seconds / num_samples,
                    inner_steps_per_second=steps / seconds,
                    num_invalid=invalid,
                )
            )
    settings = {
        "rule": rule.kind,
        "rule_settings": rule.settings(),
        "family": family.describe(),
        "horizon": horizon,
        "truncations": list(truncations),
        "num_particles": num_particles,
        "num_samples": num_samples,
        "meta_loss": dataclasses.asdict(meta_loss),
        "run_seed": run_seed,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Comparison(settings=settings, rows=rows)


def _synchronize(device: torch.device | str) -> None:
    """Wait for work in flight, so that clocks see it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
