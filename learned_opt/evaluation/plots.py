"""Pictures of a comparison. matplotlib is loaded when a picture is drawn, and no window system is needed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learned_opt.evaluation.results import Comparison, Result
from learned_opt.evaluation.style import FAINT as _FAINT
from learned_opt.evaluation.style import INK as _INK
from learned_opt.evaluation.style import Style, new_figure, plain_ticks, short, styles, tidy

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_HEIGHT = 3.9, 2.9, 0.75
_MAX_COLUMNS = 3
_DOTS_PER_INCH = 160
_WIDEST_RANGE = 1e12
"""The highest loss shown over the lowest: below lie zeros and rounding."""
_HEADROOM = 2.0
"""Losses up to so many times the initial one are shown: a run that blows up must not flatten the others."""


def save_curves(comparison: Comparison, path: str | Path, *, svg: bool = False) -> list[Path]:
    """Draw the loss curves of every family in a panel of its own: medians over tasks with their confidence bands.

    Args:
        comparison: what to draw; families without results yet are left out.
        path: the PNG file to write; its folder must exist.
        svg: also write the same picture as SVG beside it.

    Returns:
        The files written.

    Raises:
        ValueError: a comparison with no results.
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = draw_curves(comparison)
    png = Path(path)
    files = [png, png.with_suffix(".svg")] if svg else [png]
    for file in files:
        figure.savefig(file, dpi=_DOTS_PER_INCH, format="svg" if file is not png else "png", facecolor="white")
    return files


def draw_curves(comparison: Comparison) -> Figure:
    """The figure that `save_curves` writes."""
    panels = {
        family: [result for result in comparison.ordered() if result.family == family] for family in comparison.families
    }
    panels = {family: results for family, results in panels.items() if results}
    if not panels:
        raise ValueError("the comparison has no results to draw")
    num_columns = min(len(panels), _MAX_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    size = (_PANEL_WIDTH * num_columns, _PANEL_HEIGHT * num_rows + _LEGEND_HEIGHT)
    figure = new_figure(*size)
    looks = styles(comparison)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for i, (panel, (family, results)) in enumerate(zip(axes, panels.items())):
        _draw_panel(panel, comparison, family, results, looks)
        if i % num_columns == 0:
            panel.set_ylabel("loss", color=_INK)
        if i + num_columns >= len(panels):
            panel.set_xlabel("inner step", color=_INK)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.align_ylabels(list(axes))
    _legend(figure, axes[: len(panels)], comparison)
    return figure


def draw_family(comparison: Comparison, family: str) -> Figure:
    """One family's panel alone, without a legend; bands for the learned optimizers and the reference only.

    Raises:
        ValueError: the family has no results.
    """
    results = [result for result in comparison.ordered() if result.family == family]
    if not results:
        raise ValueError(f"the family {family!r} has no results to draw")
    figure = new_figure(_PANEL_WIDTH, _PANEL_HEIGHT)
    panel = figure.subplots()
    banded = {r.optimizer for r in results if r.learned or r.optimizer == comparison.reference}
    _draw_panel(panel, comparison, "", results, styles(comparison), banded)
    panel.set_ylabel("loss", color=_INK)
    panel.set_xlabel("inner step", color=_INK)
    return figure


def _draw_panel(
    panel: Axes,
    comparison: Comparison,
    family: str,
    results: list[Result],
    looks: dict[str, Style],
    banded: set[str] | None = None,
) -> None:
    shown: list[float] = []
    start = 0.0
    for result in results:
        if result.scores is None:
            continue
        curve = result.scores.curve
        middle, low, high = (_finite(line) for line in (curve.median, curve.low, curve.high))
        style = looks[result.optimizer]
        if banded is None or result.optimizer in banded:
            panel.fill_between(
                curve.steps, low, high, color=style.colour, alpha=0.18, linewidth=0, zorder=style.order - 2
            )
        panel.plot(
            curve.steps,
            middle,
            label=result.optimizer,
            color=style.colour,
            linestyle=style.dashes,
            linewidth=style.width,
            zorder=style.order,
        )
        shown += [value for line in (low, middle, high) for value in line if math.isfinite(value)]
        start = max(start, curve.high[0])
    panel.set_title(short(family), loc="left", fontsize=10.5, color=_INK, fontweight="bold")
    if not shown:
        panel.text(0.5, 0.5, "every optimizer diverged", ha="center", color=_FAINT, transform=panel.transAxes)
        panel.set_axis_off()
        return
    top = min(max(shown), _HEADROOM * start) if start > 0 else max(shown)
    if min(shown) >= 0 and top > 0:
        bottom = max(min((value for value in shown if value > 0), default=top), top / _WIDEST_RANGE)
        panel.set_yscale("log")
        panel.set_ylim(bottom / 1.25, top * 1.25)
        plain_ticks(panel, top / bottom)
    elif top < max(shown):
        panel.set_ylim(min(shown) - 0.05 * (top - min(shown)), top)
    panel.set_xlim(0, max(result.horizon for result in results))
    summary = _summary(comparison, results)
    if summary:
        panel.set_title(summary, loc="right", fontsize=8, color=_FAINT)
    tidy(panel)


def _summary(comparison: Comparison, results: list[Result]) -> str:
    """The first learned optimizer's final loss over the reference's."""
    for result in results:
        ratio = result.scores.final_ratio if result.scores else None
        if result.learned and ratio is not None and math.isfinite(ratio.value):
            return f"final: {ratio.value:.2f} × {comparison.reference}"
    return ""


def _legend(figure: Figure, axes: np.ndarray, comparison: Comparison) -> None:
    handles: dict[str, Artist] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    order = [name for name in comparison.optimizers if name in handles]
    if not order:
        return
    num_tasks = comparison.num_tasks * len(comparison.seeds)
    legend = figure.legend(
        [handles[name] for name in order],
        [short(name) for name in order],
        loc="outside lower center",
        ncols=min(len(order), 3 * min(len(axes), _MAX_COLUMNS)),
        frameon=False,
        fontsize=9.5,
        labelcolor=_INK,
        handlelength=2.8,
        title=f"median over {num_tasks} meta-test tasks, {comparison.confidence:.0%} band",
        title_fontsize=8.5,
    )
    legend.get_title().set_color(_FAINT)


def _finite(line: tuple[float, ...]) -> np.ndarray:
    """The line with gaps where it is not finite."""
    values = np.asarray(line, dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)
