"""The report of a comparison: one HTML page for phone, screen and paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from learned_opt.evaluation import page
from learned_opt.evaluation.aggregate import Total, totals, wall_factor
from learned_opt.evaluation.explain import Explanation
from learned_opt.evaluation.explain_plots import draw_all
from learned_opt.evaluation.metrics import Interval
from learned_opt.evaluation.plots import draw_family
from learned_opt.evaluation.results import Comparison, Result, format_cell, format_number
from learned_opt.evaluation.style import styles
from learned_opt.evaluation.suite_plots import draw_profiles, draw_speedups

_METHOD = (
    "Every optimizer runs on the same meta-test tasks: the same data, initial parameters and batches.",
    "A tuned baseline has, for every family, the rate of a half-decade grid with the least mean final loss on "
    "{tuning}; the grid is extended where the best rate lies at its edge. Its tuning runs are not counted against it.",
    "The final loss of a task is the mean of the last 5 % of its training losses; ratios are to the reference on the "
    "same task.",
    "Speed-up: the steps that the reference took to its final loss over those that the optimizer took to it, read off "
    "running means over 5 % of the horizon. Where the optimizer never reaches it, nothing is extrapolated: the steps "
    "in which the reference passed the optimizer's final loss, over the whole horizon, which is below 1. The horizon "
    "speed-up puts the horizon in place of the reference's own steps, as VeLO and Celo report it.",
    "In time: the speed-up in steps, times the reference's seconds per step (loss, backward pass and optimizer) over "
    "the optimizer's, each measured for one task of the family, unbatched, with the optimizer a user would build.",
    "Over the suite: interquartile means over all tasks of all families, with stratified percentile bootstrap "
    "intervals. A family on which an optimizer has no result counts as the worst possible.",
)


def build(
    comparison: Comparison,
    *,
    title: str,
    explanations: Mapping[str, Explanation] | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """The page, as far as the comparison has come.

    Args:
        comparison: its results.
        title: of the page.
        explanations: learned optimizer's label -> what it has learned.
        settings: name -> value, for the last section.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    sums = totals(comparison)
    parts = [f"<h1>{page.text(title)}</h1>", *_headlines(comparison, sums)]
    if len(comparison.results) < comparison.num_expected:
        done = f"{len(comparison.results)} of {comparison.num_expected}"
        parts.append(page.paragraph(f"This comparison is not complete: {done} results are here.", "note"))
    chapters = [("suite", "Over the suite", _suite(comparison, sums))] if sums else []
    chapters.append(("families", "Family by family", _families(comparison)))
    if any(result.cost for result in comparison.results):
        chapters.append(("time", "Time of a step", _times(comparison)))
    for k, (name, explanation) in enumerate((explanations or {}).items()):
        chapters.append((f"learned{k}", f"What {name} has learned", _explanation(name, explanation)))
    chapters.append(("method", "How it is measured", [_method(comparison)]))
    chapters.append(("settings", "Settings", _settings(comparison, settings or {})))
    links = " ".join(f'<a href="#{identity}">{page.text(name)}</a>' for identity, name, _ in chapters)
    parts.append(f"<nav>{links}</nav>")
    parts += [page.section(*chapter) for chapter in chapters]
    return page.page(title, parts)


def _headlines(comparison: Comparison, sums: Sequence[Total]) -> list[str]:
    """What every learned optimizer amounts to, in a sentence each."""
    out = []
    for total in sums:
        if not total.learned:
            continue
        families = {r.family: r for r in comparison.ordered() if r.optimizer == total.optimizer}
        speeds = [r.scores.speedup.value if r.scores and r.scores.speedup else 0.0 for r in families.values()]
        wall = f" and {_with_interval(total.wall_speedup)} in time" if total.wall_speedup else ""
        out.append(
            page.paragraph(
                f"{total.optimizer}: speed-up over tuned {comparison.reference} {_with_interval(total.speedup)} in "
                f"steps{wall}; at least as fast on {sum(s >= 1 for s in speeds)} of {len(speeds)} families; "
                f"of {total.num_tasks} tasks {total.num_diverged} diverged, and {total.num_thrown_back} were thrown "
                "back above their first loss from below a tenth of it.",
                "headline",
            )
        )
    return out


def _with_interval(interval: Interval | None) -> str:
    return format_cell(interval, 3, True)


def _suite(comparison: Comparison, sums: Sequence[Total]) -> list[str]:
    reference = comparison.reference
    timed = any(total.wall_speedup for total in sums)
    header = ["optimizer", "speed-up", "horizon speed-up", *(["in time"] if timed else []), "final loss ratio"]
    header += ["mean loss ratio", f"reaches {reference}'s loss", "slowest family", "diverged"]
    rows = []
    for total in sorted(sums, key=lambda total: -total.speedup.value):
        intervals = [total.speedup, total.horizon_speedup, *([total.wall_speedup] if timed else [])]
        rows.append(
            [
                page.name(total.optimizer),
                *(page.cell(_with_interval(i)) for i in (*intervals, total.final_ratio, total.mean_ratio)),
                f"{total.share_reached:.0%}",
                f"{format_number(total.worst_speedup, 2)} <small>{page.text(total.worst_family)}</small>",
                f"{total.num_diverged}/{total.num_tasks}",
            ]
        )
    marks = [t.learned for t in sorted(sums, key=lambda total: -total.speedup.value)]
    missing = [
        page.paragraph(
            f"{t.optimizer} has no result on {', '.join(t.missing)}, which counts as the worst possible.", "note"
        )
        for t in sums
        if t.missing
    ]
    captions = (f"Speed-up over tuned {reference}", "Share of all tasks with at least such a speed-up")
    figures = (draw_speedups(comparison, sums), draw_profiles(comparison, sums))
    return [
        page.paragraph(
            f"Interquartile means over all {sums[0].num_tasks} meta-test tasks, with {comparison.confidence:.0%} "
            f"intervals; speed-ups and ratios are to tuned {reference}: above 1 is faster, a ratio below 1 is a lower "
            "loss.",
            "faint",
        ),
        page.table(header, rows, marks),
        *missing,
        _key(comparison),
        page.block("wide", [page.picture(figure, words) for figure, words in zip(figures, captions)]),
        "<h3>Speed-up by family</h3>",
        _matrix(comparison),
    ]


def _matrix(comparison: Comparison) -> str:
    """Families × optimizers, coloured by the logarithm of the speed-up."""
    names = [name for name in comparison.optimizers if name != comparison.reference]
    rows = []
    for family in comparison.families:
        row = [page.name(family)]
        for name in names:
            found = comparison.result(family, name)
            if found is None:
                row.append("")
            elif found.scores is None:
                row.append(page.coloured("none", "#f4b183"))
            elif found.scores.speedup is None:
                row.append("-")
            else:
                value = found.scores.speedup.value
                row.append(page.coloured(format_number(value, 2), _colour(value)))
        rows.append(row)
    return page.table(["family", *names], rows)


def _colour(speedup: float) -> str:
    """White at one, blue for faster, orange for slower, full at four times."""
    strength = max(-1.0, min(1.0, math.log(max(speedup, 1e-9)) / math.log(4)))
    end = (122, 178, 219) if strength > 0 else (244, 177, 131)
    return "#" + "".join(f"{round(255 + (value - 255) * abs(strength)):02x}" for value in end)


def _key(comparison: Comparison) -> str:
    """A legend in HTML, so that pictures need none."""
    items = []
    for name, look in styles(comparison).items():
        dashes = "" if look.dashes == "-" else ",".join(f"{length * look.width:g}" for length in look.dashes[1])
        stroke = f'stroke="{look.colour}" stroke-width="{look.width + 0.6:g}" stroke-dasharray="{dashes}"'
        items.append(
            f'<li><svg width="34" height="8" aria-hidden="true"><line x1="0" y1="4" x2="34" y2="4" {stroke}/></svg>'
            f"{page.text(name)}</li>"
        )
    return f'<ul class="key">{"".join(items)}</ul>'


def _families(comparison: Comparison) -> list[str]:
    num_tasks = comparison.num_tasks * len(comparison.seeds)
    out = [
        page.paragraph(
            f"Training losses: the median over {num_tasks} meta-test tasks, with a {comparison.confidence:.0%} band "
            "for learned optimizers and the reference. Test losses and accuracies are those of the parameters at the "
            "end.",
            "faint",
        ),
        _key(comparison),
    ]
    header = comparison.header()
    for family, description in comparison.families.items():
        results = [result for result in comparison.ordered() if result.family == family]
        if not results:
            continue
        rows = [row for row in comparison.rows() if row[0] == family]
        # Metrics of other families only would be empty columns here.
        kept = [k for k in range(1, len(header)) if k < 5 or any(row[k] != "-" for row in rows)]
        cells = [[page.cell(row[k]) for k in kept] for row in rows]
        words = [page.paragraph(f"{description}; {results[0].horizon} steps", "faint")]
        words += [page.paragraph(f"{r.optimizer}: {r.note}", "note") for r in results if r.note]
        drawn = page.picture(draw_family(comparison, family), "", alternative=f"loss curves on {family}")
        parts = [
            f"<h3>{page.text(family)}</h3>",
            page.block("both", [drawn, page.block("", words)]),
            page.table([header[k] for k in kept], cells, [result.learned for result in results]),
        ]
        out.append(page.block("family", parts))
    return out


def _times(comparison: Comparison) -> list[str]:
    names = [name for name in comparison.optimizers if any(r.cost for r in comparison.results if r.optimizer == name)]
    rows = []
    for family in comparison.families:
        found: dict[str, Result | None] = {name: comparison.result(family, name) for name in names}
        gradients = [r.cost.gradient for r in found.values() if r and r.cost]
        if not gradients:
            continue
        reference = comparison.result(family, comparison.reference) if comparison.reference else None
        row = [page.name(family), f"{1e3 * gradients[0]:.3g}"]
        for result in found.values():
            if result is None or result.cost is None:
                row.append("-")
                continue
            factor = wall_factor(result.cost, reference.cost) if reference is not None else None
            wall = result.scores.speedup.value * factor if factor and result.scores and result.scores.speedup else None
            extra = f" <small>{format_number(wall, 2)} ×</small>" if wall is not None else ""
            row.append(f"{1e3 * result.cost.step:.3g}{extra}")
        rows.append(row)
    return [
        page.paragraph(
            "Milliseconds for one task: the loss with its backward pass, and each optimizer's own step; small, the "
            "speed-up in time. Times are those of the machine and its load at the moment.",
            "faint",
        ),
        page.table(["family", "gradient", *names], rows),
    ]


def _explanation(name: str, explanation: Explanation) -> list[str]:
    figures = draw_all(explanation, name)
    pictures = [page.picture(figure, title) for title, figure in figures.items()]
    rates = {stream: values[np.isfinite(values)] for stream, values in explanation.effective_rates.items()}
    rows = [
        [page.name(stream), *(format_number(float(values[k]), 3) for k in (0, len(values) // 2, -1))]
        for stream, values in rates.items()
        if len(values)
    ]
    return [
        page.paragraph(
            "The rule is fed gradients of our choosing, beside Adam and RMSprop at rate 1. Update maps: what it does "
            "with the newest gradient after a history of root mean square 1 and a given mean; blue is up, red is down, "
            "the line is no update. Responses are in units of each one's own step after many equal gradients. The "
            "effective learning rate divides the update by Adam's direction. Memory: rank correlations of what the "
            "rule keeps with what it might track.",
            "faint",
        ),
        page.block("pictures", pictures),
        page.table(["effective learning rate", "first step", "half way", "last step"], rows),
    ]


def _bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{page.text(line)}</li>' for line in lines)}</ul>"


def _method(comparison: Comparison) -> str:
    tuned_on_test = any(result.tuning and result.tuning.split == "meta_test" for result in comparison.results)
    tuning = "other initial parameters and batches of the reported data" if tuned_on_test else "meta-validation tasks"
    return _bullets([line.format(tuning=tuning) for line in _METHOD])


def _settings(comparison: Comparison, settings: Mapping[str, object]) -> list[str]:
    rates = []
    for result in comparison.ordered():
        if result.tuning is not None and result.tuning.num_tasks:
            rate = "none" if result.rate is None else f"{result.rate:.3g}"
            tried = f"{result.tuning.rates[0]:.2g} to {result.tuning.rates[-1]:.2g}"
            rates.append([page.text(f"{result.family}, {result.optimizer}"), rate, tried])
    lines = "\n".join(f"{name}: {value}" for name, value in settings.items())
    return [
        f"<pre>{page.text(lines)}</pre>" if lines else "",
        *(
            ["<h3>Chosen learning rates</h3>", page.table(["family, optimizer", "rate", "tried"], rates)]
            if rates
            else []
        ),
    ]
