"""What benchmarks.amortization reads off validation losses along the way: a summary, a table and a picture.

Curves are [measured steps, seeds, groups], at `measured_steps` of the horizon; the words are explained there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from learned_opt.evaluation.aggregate import interquartile_mean
from learned_opt.evaluation.metrics import Array, bootstrap, mean, median
from learned_opt.evaluation.style import (
    BASELINE_COLOURS,
    DASHES,
    FAINT,
    INK,
    LEARNED_COLOURS,
    REFERENCE_COLOUR,
    Style,
    new_figure,
    tidy,
)

FINAL_SHARE = 0.05
LOOKS = {
    "adam_default": ("Adam, rate 0.001", Style(BASELINE_COLOURS[3], DASHES[1], 1.4, 2)),
    "adam": ("tuned Adam", Style(REFERENCE_COLOUR, "-", 1.8, 4)),
    "adam_per_group": ("Adam, tuned for each network", Style(REFERENCE_COLOUR, DASHES[0], 1.4, 3)),
    "adam_pooled": ("tuned Adam, from one network for all", Style(BASELINE_COLOURS[0], DASHES[2], 1.4, 3)),
    "learned": ("learned optimizer", Style(LEARNED_COLOURS[2], "-", 1.8, 4)),
    "learned_start": ("learned optimizer and start", Style(LEARNED_COLOURS[0], "-", 2.4, 5)),
    "learned_pooled": ("both, from one network for all", Style(LEARNED_COLOURS[1], "-", 2.4, 6)),
}


def measured_steps(horizon: int) -> list[int]:
    """The steps at which validation losses are measured: every one to 10, every fifth to 60, and every tenth."""
    grid = [*range(11), *range(15, 61, 5), *range(70, horizon + 1, 10)]
    return sorted({step for step in grid if step <= horizon} | {horizon})


def final(curves: Array, horizon: int) -> Array:
    """The mean over the measured steps in the last 5 % of the horizon."""
    last = np.asarray(measured_steps(horizon)) > horizon * (1 - FINAL_SHARE)
    return np.asarray(curves[last].mean(0))


def steps_to(curves: Array, targets: Array, horizon: int) -> Array:
    """The first measured step at or below each group's target; infinite if there is none."""
    reached = curves <= targets
    return np.where(reached.any(0), np.asarray(measured_steps(horizon))[reached.argmax(0)], np.inf)


def interval(statistic: Callable[[Array], Array], values: Array) -> list[float | None]:
    """A statistic of values [seeds, groups] over both, with its interval; null stands for infinity."""
    found = bootstrap(lambda *parts: statistic(np.concatenate(parts, axis=-1)), *values)
    return [round(v, 4) if np.isfinite(v) else None for v in (found.value, found.low, found.high)]


def summarize(curves: dict[str, Array], horizon: int) -> dict[str, Any]:
    """Per optimizer what is reported, of curves [measured steps, seeds, groups]."""
    adam, pooled = curves["adam"], curves["adam_pooled"]
    targets = {
        "adams_final": (adam, final(adam, horizon)),
        "adams_least": (adam, adam.min(0)),
        "pooled_final": (pooled, final(pooled, horizon)),
    }
    out: dict[str, Any] = {}
    for name, own in curves.items():
        row: dict[str, Any] = {
            "final_loss": interval(mean, final(own, horizon)),
            "least_loss": interval(mean, own.min(0)),
            "rise_after_least": interval(mean, final(own, horizon) - own.min(0)),
            "final_loss_minus_adams": interval(mean, final(own, horizon) - final(adam, horizon)),
            "final_loss_minus_pooled": interval(mean, final(own, horizon) - final(pooled, horizon)),
        }
        for target, (reference, goals) in targets.items():
            steps, theirs = steps_to(own, goals, horizon), steps_to(reference, goals, horizon)
            row[f"steps_to_{target}"] = {
                "reached": float(np.isfinite(steps).mean()),
                "median": interval(median, steps),
                "share_of_horizon_median": interval(median, steps / horizon),
                "share_of_horizon_iqm": interval(interquartile_mean, steps / horizon),
                "share_of_its_own_steps_median": interval(median, steps / np.maximum(theirs, 1)),
                "share_of_its_own_steps_iqm": interval(interquartile_mean, steps / np.maximum(theirs, 1)),
                "within_a_third_of_the_horizon": float((steps <= horizon / 3).mean()),
            }
        row["curve"] = [round(float(v), 4) for v in np.median(own.reshape(len(own), -1), axis=1)]
        out[name] = row
    return out


def table(found: dict[str, Any]) -> str:
    """The most important of it, as Markdown."""

    def cell(values: list[float | None]) -> str:
        value, low, high = ("never" if v is None else f"{v:.3g}" for v in values)
        return f"{value} [{low}, {high}]"

    lines = [
        "| optimizer | final loss | least loss | steps to Adam's final, of horizon | of Adam's own | to Adam's least | "
        "to pooled Adam's final |",
        "| --- " * 7 + "|",
    ]
    for name, row in found.items():
        last, least = row["steps_to_adams_final"], row["steps_to_adams_least"]
        cells = [row["final_loss"], row["least_loss"]]
        cells += [last["share_of_horizon_iqm"], last["share_of_its_own_steps_iqm"], least["share_of_horizon_iqm"]]
        cells += [row["steps_to_pooled_final"]["share_of_horizon_iqm"]]
        lines.append(f"| {name} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def draw(curves: dict[str, Array], horizon: int, path: Path) -> None:
    """Validation losses against steps, and the share of networks that have reached Adam's final loss."""
    figure, steps = new_figure(9.2, 3.7), measured_steps(horizon)
    left, right = figure.subplots(1, 2)
    goals = final(curves["adam"], horizon)
    for name, (label, style) in LOOKS.items():
        own = curves[name].reshape(len(steps), -1)
        look: dict[str, Any] = {"color": style.colour, "linestyle": style.dashes, "linewidth": style.width}
        if style.width > 1.5:
            low, high = np.quantile(own, [0.25, 0.75], axis=1)
            left.fill_between(steps, low, high, color=style.colour, alpha=0.13, linewidth=0)
        left.plot(steps, np.median(own, axis=1), label=label, zorder=style.order, **look)
        reached = np.sort(steps_to(curves[name], goals, horizon).ravel())
        share = [float((reached <= step).mean()) for step in steps]
        right.plot(steps, share, zorder=style.order, drawstyle="steps-post", **look)
    for panel, title in ((left, "validation loss"), (right, "share of networks at tuned Adam's final loss")):
        panel.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        panel.set_xlabel("training step", color=INK)
        panel.set_xlim(0, horizon)
        tidy(panel)
    right.set_ylim(0, 1.02)
    right.axvline(horizon / 3, color=FAINT, linewidth=0.9, linestyle=":")
    right.text(horizon / 3, 0.02, " a third of the steps", color=FAINT, fontsize=8.5)
    left.set_ylim(goals.min() * 0.97, float(np.median(curves["adam"][0])) * 1.01)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK, handlelength=2.8)
    figure.savefig(path, dpi=160, facecolor="white")
