"""What the rounds amount to: medians, spreads, ratios within a round, and the share of the arithmetic floor."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.meta_training.worker import CONTENDERS
from benchmarks.meta_training.workloads import TITLES, SpeedWorkload, floors

Rounds = dict[str, list[dict[str, Any]]]
"""Contender -> its answers, one a round."""


def summarize(workload: SpeedWorkload, rounds: Rounds, notes: dict[str, Any]) -> dict[str, Any]:
    """Everything about one workload and number of threads.

    Ratios are formed round by round, of measurements that were taken one after the other, and their median is reported
    with the least and the greatest.
    """
    products = [answer["rate"] for answer in rounds["products"]]
    rule_floor, floor = floors(workload, statistics.median(products))
    out: dict[str, Any] = {
        "workload": workload.name,
        "particles_are": "antithetic pairs" if workload.pairs else "tasks",
        "num_particles": workload.num_particles,
        "num_parameters": workload.num_parameters,
        "truncation": workload.truncation,
        "gigaflops_per_second": spread([p / 1e9 for p in products]),
        "rule_megaflops": workload.rule_flops / 1e6,
        "task_megaflops": workload.task_flops / 1e6,
        "floor_of_the_rule": rule_floor,
        "floor": floor,
        "contenders": {},
    }
    ours = [answer["rate"] for answer in rounds.get("ours", [])]
    for name, answers in rounds.items():
        if name == "products":
            continue
        rates = [answer["rate"] for answer in answers]
        reached = [rate / floors(workload, product)[1] for rate, product in zip(rates, products)]
        out["contenders"][name] = {
            "rate": spread(rates),
            "peak_mib": max(answer["peak_mib"] for answer in answers),
            "of_floor": spread(reached),
            "ours_is_faster_by": spread([a / b for a, b in zip(ours, rates)]) if ours else None,
            **notes[name],
            "rounds": answers,
        }
    return out


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text, a line for each contender."""
    head = f"{'':36}{'steps x particles / s':>30}{'of floor':>10}{'ours / it':>22}{'peak MiB':>10}"
    lines = [head]
    for row in rows:
        gigaflops = row["gigaflops_per_second"]["median"]
        lines.append(
            f"{row['workload'].upper()}, {TITLES[row['workload']]}, {row['threads']} thread(s): floor "
            f"{row['floor']:,.0f} at {gigaflops:.0f} GFLOP/s (rule alone {row['floor_of_the_rule']:,.0f})"
        )
        for name, found in row["contenders"].items():
            ratio = found["ours_is_faster_by"]
            cells = [f"    {CONTENDERS[name]:32}", f"{_cell(found['rate'], ',.0f'):>30}"]
            cells += [f"{found['of_floor']['median']:>10.0%}", f"{_cell(ratio, '.2f') if ratio else '':>22}"]
            lines.append("".join(cells) + f"{found['peak_mib']:>10,.0f}")
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The same as a table for the documentation, medians with the range over the rounds."""
    lines = [
        "| workload | threads | contender | inner steps x particles per second | of the floor | ours is faster by "
        "| peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for name, found in row["contenders"].items():
            ratio = found["ours_is_faster_by"]
            cells = [f"{row['workload'].upper()}, {TITLES[row['workload']]}", str(row["threads"]), CONTENDERS[name]]
            cells += [_cell(found["rate"], ",.0f"), f"{found['of_floor']['median']:.0%}"]
            cells += [_cell(ratio, ".2f") if ratio and name != "ours" else "", f"{found['peak_mib']:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, float], form: str) -> str:
    return f"{found['median']:{form}} [{found['least']:{form}}, {found['greatest']:{form}}]"
