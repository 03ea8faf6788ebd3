"""How pictures look: colours, dashes, figures without a window, and SVG text for a page."""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING, Any, Literal

from learned_opt.evaluation.results import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common colour blindness, its yellow darkened for lines on white; dashes
# tell curves apart in black and white.
LEARNED_COLOURS = ("#D55E00", "#000000", "#E69F00")
REFERENCE_COLOUR = "#0072B2"
BASELINE_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#999999", "#B5A300")
DASHES = ((0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
INK, FAINT = "#333333", "#8A8A8A"
_MOST_LETTERS = 28

Dashes = Literal["-"] | tuple[float, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Style:
    """How one optimizer's curves look.

    Attributes:
        colour: hexadecimal.
        dashes: in matplotlib's words.
        width: in points.
        order: what is drawn over what.
    """

    colour: str
    dashes: Dashes
    width: float
    order: int


def styles(comparison: Comparison) -> dict[str, Style]:
    """Colour, dashes and weight of every optimizer: learned ones solid, heavy and in front; the reference solid."""
    learned = {result.optimizer for result in comparison.results if result.learned}
    out: dict[str, Style] = {}
    num_learned = num_others = 0
    for name in comparison.optimizers:
        if name in learned:
            colour = LEARNED_COLOURS[num_learned % len(LEARNED_COLOURS)]
            out[name] = Style(colour, "-", 2.4, 5)
            num_learned += 1
        elif name == comparison.reference:
            out[name] = Style(REFERENCE_COLOUR, "-", 1.6, 4)
        else:
            colour = BASELINE_COLOURS[num_others % len(BASELINE_COLOURS)]
            # Where colours come round again, the dashes have moved on by one.
            dashes = DASHES[(num_others + num_others // len(BASELINE_COLOURS)) % len(DASHES)]
            out[name] = Style(colour, dashes, 1.4, 3)
            num_others += 1
    return out


def short(label: str) -> str:
    """The label, its middle left out where it would push the axes out of a picture."""
    return label if len(label) <= _MOST_LETTERS else f"{label[: _MOST_LETTERS - 10]}…{label[-9:]}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pictures need matplotlib: pip install "learned-opt[eval]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(panel: Axes) -> None:
    """A light grid, two spines, quiet ticks."""
    panel.grid(True, which="major", color="#E6E6E6", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(which="both", colors=INK, labelsize=8.5, length=3)
    panel.tick_params(which="minor", length=0)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#BBBBBB")


def plain_ticks(panel: Axes, span: float, axis: str = "y") -> None:
    """Plain numbers on a logarithmic axis: every decade, with 2 and 5 in between where it covers little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ticks = panel.yaxis if axis == "y" else panel.xaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def to_svg(figure: Figure) -> str:
    """The figure as SVG, the same text for the same figure; its words are text in a font of the reader's."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "learned_opt",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()
