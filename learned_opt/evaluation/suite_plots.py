"""Pictures of a whole suite: the speed-up of every optimizer, and performance profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from learned_opt.evaluation.aggregate import Total, performance_profile, speedup_strata
from learned_opt.evaluation.results import Comparison, format_number
from learned_opt.evaluation.style import FAINT, INK, new_figure, plain_ticks, short, styles, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _PROFILE_HEIGHT, _ROW_HEIGHT, _MARGIN = 5.2, 3.4, 0.33, 0.9
_MOST, _LEAST = 32.0, 1 / 32
_NUM_THRESHOLDS = 97


def draw_speedups(comparison: Comparison, totals: Sequence[Total]) -> Figure:
    """Every optimizer's interquartile mean of the speed-up over the reference, with its interval.

    Raises:
        ValueError: no totals.
    """
    if not totals:
        raise ValueError("totals must hold at least one optimizer; got none")
    ordered = sorted(totals, key=lambda total: total.speedup.value)
    looks = styles(comparison)
    figure = new_figure(_WIDTH, _MARGIN + _ROW_HEIGHT * len(ordered))
    panel = figure.subplots()
    panel.axvline(1.0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for row, total in enumerate(ordered):
        value, low, high = (max(v, _LEAST) for v in (total.speedup.value, total.speedup.low, total.speedup.high))
        colour = looks[total.optimizer].colour
        panel.plot([low, high], [row, row], color=colour, linewidth=4 if total.learned else 2.5, solid_capstyle="butt")
        panel.plot([value], [row], "o", color=colour, markersize=8 if total.learned else 5.5)
        text = format_number(total.speedup.value, 3)
        panel.annotate(text, (value, row), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=INK)
    panel.set_yticks(range(len(ordered)), [short(total.optimizer) for total in ordered])
    panel.set_ylim(-0.6, len(ordered) - 0.3)
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0.8), max(high, 1.25))
    plain_ticks(panel, max(high, 1.25) / min(low, 0.8), "x")
    panel.set_xlabel(f"times as fast as tuned {comparison.reference}, in steps", color=INK)
    tidy(panel)
    panel.grid(False, axis="y")
    return figure


def draw_profiles(comparison: Comparison, totals: Sequence[Total]) -> Figure:
    """The share of meta-test tasks with at least so large a speed-up, for every optimizer but the reference.

    Raises:
        ValueError: no totals.
    """
    if not totals:
        raise ValueError("totals must hold at least one optimizer; got none")
    thresholds = np.logspace(np.log2(_LEAST), np.log2(_MOST), _NUM_THRESHOLDS, base=2)
    looks = styles(comparison)
    figure = new_figure(_WIDTH, _PROFILE_HEIGHT)
    panel = figure.subplots()
    for total in totals:
        if total.optimizer == comparison.reference:
            continue
        style = looks[total.optimizer]
        strata = list(speedup_strata(comparison, total.optimizer).values())
        found = performance_profile(strata, thresholds.tolist(), num_resamples=500, confidence=comparison.confidence)
        if total.learned:
            panel.fill_between(thresholds, found.low, found.high, color=style.colour, alpha=0.18, linewidth=0)
        panel.plot(
            thresholds,
            found.share,
            color=style.colour,
            linestyle=style.dashes,
            linewidth=style.width,
            label=total.optimizer,
            zorder=style.order,
        )
    panel.axvline(1.0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    panel.set_xscale("log", base=2)
    panel.set_xlim(_LEAST, _MOST)
    panel.set_ylim(0, 1.02)
    ticks = [2.0**k for k in range(-5, 6)]
    panel.set_xticks(ticks, [f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks])
    panel.set_xlabel(f"speed-up over tuned {comparison.reference}, at least", color=INK)
    panel.set_ylabel("share of tasks", color=INK)
    tidy(panel)
    return figure
