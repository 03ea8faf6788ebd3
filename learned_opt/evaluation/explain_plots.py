"""Pictures of what an update rule has learned; one picture a question, small enough for a column of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from learned_opt.evaluation.explain import EVENT, Explanation, Response
from learned_opt.evaluation.memory import FEATURES
from learned_opt.evaluation.metrics import Array
from learned_opt.evaluation.style import DASHES, FAINT, INK, LEARNED_COLOURS, REFERENCE_COLOUR, new_figure, short, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 3.6, 2.9
_COLOURS = {"rule": LEARNED_COLOURS[0], "adam": REFERENCE_COLOUR, "rmsprop": "#009E73"}
_STREAM_COLOURS = (LEARNED_COLOURS[0], "#0072B2", "#009E73", "#CC79A7", "#999999")
_SHOWN_CELLS = 40
_TALLEST = 4.0


def draw_all(explanation: Explanation, name: str) -> dict[str, Figure]:
    """Every picture by a title for it, in reading order.

    Args:
        explanation: of one rule.
        name: what to call the rule.
    """
    out = {}
    for who, updates in explanation.update_map.updates.items():
        title = name if who == "rule" else f"{who}, learning rate 1"
        out[f"Update of {title}"] = draw_update_map(explanation, updates)
    for signal, response in explanation.responses.items():
        out[f"Response: {signal}"] = draw_response(response, _steady(explanation), name)
    out["Step size against gradient size"] = draw_scales(explanation)
    out["Effective learning rate over time"] = draw_rates(explanation)
    if explanation.memory.cells:
        out["What the memory goes with"] = draw_memory(explanation)
    return out


def _steady(explanation: Explanation) -> dict[str, float]:
    """Every optimizer's step after many equal gradients; 1 where it takes none."""
    constant = next(iter(explanation.responses.values()))
    return {who: float(abs(updates[-1])) or 1.0 for who, updates in constant.updates.items()}


def draw_update_map(explanation: Explanation, updates: Array) -> Figure:
    """Updates [M, G] over gradient and momentum; its colours have their own scale, which the bar gives."""
    found = explanation.update_map
    figure = new_figure(_WIDTH, _HEIGHT)
    panel = figure.subplots()
    largest = float(np.abs(updates).max()) or 1.0
    extent = (found.gradients[0], found.gradients[-1], found.momenta[0], found.momenta[-1])
    image = panel.imshow(
        updates, origin="lower", extent=extent, aspect="auto", cmap="RdBu", vmin=-largest, vmax=largest
    )
    if updates.min() < 0 < updates.max():
        panel.contour(found.gradients, found.momenta, updates, levels=[0.0], colors=INK, linewidths=1.0)
    bar = figure.colorbar(image, ax=panel, shrink=0.9)
    bar.ax.tick_params(labelsize=7.5, length=2)
    panel.set_xlabel("newest gradient / root mean square", fontsize=8.5, color=INK)
    panel.set_ylabel("momentum / root mean square", fontsize=8.5, color=INK)
    panel.tick_params(labelsize=8, length=3)
    return figure


def draw_response(response: Response, steady: dict[str, float], name: str) -> Figure:
    """Updates to one signal, each optimizer's in units of its own step after many equal gradients."""
    figure = new_figure(_WIDTH, _HEIGHT)
    panel = figure.subplots()
    for k, (who, updates) in enumerate(response.updates.items()):
        panel.plot(
            -updates / steady[who],
            color=_COLOURS[who],
            linewidth=2.2 if who == "rule" else 1.4,
            linestyle="-" if who == "rule" else DASHES[k - 1],
            label=short(name) if who == "rule" else who,
            zorder=3 if who == "rule" else 2,
        )
    before = response.gradients[:EVENT]
    if (before == before[0]).all() and response.gradients[EVENT] != before[0]:
        panel.axvline(EVENT, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
    panel.axhline(0, color=FAINT, linewidth=0.8)
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, -_TALLEST), min(high, _TALLEST))  # RMSprop's first steps are many times its later ones
    panel.set_xlabel("step", color=INK)
    panel.set_ylabel("step down / steady step", color=INK, fontsize=8.5)
    panel.legend(frameon=False, fontsize=8, labelcolor=INK)
    tidy(panel)
    return figure


def draw_scales(explanation: Explanation) -> Figure:
    """The size of the update against that of a constant gradient."""
    figure = new_figure(_WIDTH, _HEIGHT)
    panel = figure.subplots()
    shown = explanation.scale_updates > 0
    panel.loglog(explanation.scales[shown], explanation.scale_updates[shown], color=_COLOURS["rule"], linewidth=2.2)
    if shown.any():
        low, high = explanation.scale_updates[shown].min(), explanation.scale_updates[shown].max()
        panel.set_ylim(low / 10, high * 10)
    panel.set_xlabel("gradient", color=INK)
    panel.set_ylabel("update after 50 steps", color=INK)
    tidy(panel)
    return figure


def draw_rates(explanation: Explanation) -> Figure:
    """The effective learning rate over time, a line a stream of gradients."""
    figure = new_figure(_WIDTH, _HEIGHT)
    panel = figure.subplots()
    for k, (stream, rates) in enumerate(explanation.effective_rates.items()):
        panel.plot(
            np.where(rates > 0, rates, np.nan),
            color=_STREAM_COLOURS[k % len(_STREAM_COLOURS)],
            linewidth=1.6,
            linestyle="-" if not k else DASHES[(k - 1) % len(DASHES)],
            label=stream,
        )
    panel.set_yscale("log")
    panel.set_xlabel("step", color=INK)
    panel.set_ylabel("|update| / |Adam's direction|", color=INK, fontsize=8.5)
    panel.legend(frameon=False, fontsize=7.5, labelcolor=INK)
    tidy(panel)
    return figure


def draw_memory(explanation: Explanation) -> Figure:
    """Rank correlations of cells with features; the forty that go with anything most clearly, by what they track."""
    table = explanation.memory.correlations
    strength = np.nan_to_num(np.abs(table))
    kept = np.argsort(-strength.max(1), kind="stable")[:_SHOWN_CELLS]
    kept = kept[np.lexsort((-strength[kept].max(1), strength[kept].argmax(1)))]
    figure = new_figure(_WIDTH, 1.1 + 0.17 * len(kept))
    panel = figure.subplots()
    image = panel.imshow(table[kept], aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    panel.set_yticks(range(len(kept)), [explanation.memory.cells[k] for k in kept])
    panel.set_xticks(range(len(FEATURES)), FEATURES, rotation=40, ha="right")
    panel.tick_params(labelsize=7.5, length=2, colors=INK)
    bar = figure.colorbar(image, ax=panel, shrink=min(1.0, 8 / max(len(kept), 8)))
    bar.ax.tick_params(labelsize=7.5, length=2)
    return figure
