"""What comparisons over a suite come to, without curves and the numbers of single tasks: small enough to commit.

    python evaluate_optimizer.py compact seed1=FILE --suite test --horizons 500 --baselines adam --out runs/500
    python -m benchmarks.suite_summary runs/500/results.json [runs/2000/results.json ...] \
        --command "python evaluate_optimizer.py …" --out benchmarks/results/suite_test_seeds.json

For every comparison, which has one horizon for all families, and every optimizer in it: the interquartile means of the
speed-up over the reference and of the final loss over its own, with 95 % intervals; how many tasks diverged and how
many were thrown back above their first loss; and both ratios by family. Of the reference there are the learning rates
that it was tuned to and how many of its tasks were thrown back. Where costs were measured (`--cost-seconds`) there are,
too, the speed-ups in wall-clock time and what a gradient and a step take, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.documents import write
from learned_opt.evaluation.aggregate import wall_factor
from learned_opt.evaluation.results import Cost


def rounded(interval: dict[str, float | None] | None) -> list[float | None] | None:
    """[value, low, high] of an interval as a comparison writes it, four digits of each."""
    if interval is None:
        return None
    found = (interval[bound] for bound in ("value", "low", "high"))
    return [None if number is None else float(f"{number:.4g}") for number in found]


def cost_of(row: dict[str, Any]) -> Cost | None:
    """What a row's steps cost; None where that was not measured, or is not finite."""
    cost = row["cost"]
    return None if cost is None or None in cost.values() else Cost(**cost)


def in_time(mine: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The speed-up of a family in wall-clock time and what makes it up; nothing where costs were not measured."""
    speedup, cost, of_reference = mine["scores"]["speedup"], cost_of(mine), cost_of(reference)
    factor = wall_factor(cost, of_reference)
    if factor is None or speedup is None:
        return {}
    assert cost is not None and of_reference is not None
    costs = {"gradient": cost.gradient, "step": cost.step, f"{reference['optimizer']}'s step": of_reference.step}
    return {
        "wall_speedup": rounded({bound: value * factor for bound, value in speedup.items()}),
        "milliseconds": {name: float(f"{1e3 * seconds:.3g}") for name, seconds in costs.items()},
    }


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """{optimizer: numbers} of one finished comparison, and the reference's rates."""
    comparison = document["comparison"]
    reference = comparison["reference"]
    out: dict[str, Any] = {}
    of_reference = {row["family"]: row for row in comparison["results"] if row["optimizer"] == reference}
    for total in document["totals"]:
        name = total["optimizer"]
        rows = [row for row in comparison["results"] if row["optimizer"] == name and row["scores"] is not None]
        if name == reference:
            rates = {row["family"]: float(f"{row['tuning']['rate']:.4g}") for row in rows}
            out |= {f"{name} rates": rates, name: {"num_thrown_back": total["num_thrown_back"]}}
            continue
        families = {
            row["family"]: {which: rounded(row["scores"][which]) for which in ("speedup", "final_ratio")}
            | in_time(row, of_reference[row["family"]])
            for row in rows
        }
        counts = {which: total[which] for which in ("num_diverged", "num_thrown_back", "num_tasks")}
        over_all = {which: rounded(total[which]) for which in ("speedup", "final_ratio")}
        if total["wall_speedup"]:
            over_all["wall_speedup"] = rounded(total["wall_speedup"])
        out[name] = {**over_all, **counts, "families": families}
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json of evaluate_optimizer.py")
    parser.add_argument("--command", default="", help="what made them, for the reader")
    parser.add_argument("--note", default="", help="what else the reader should know")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    document: dict[str, Any] = {"command": options.command, "left_out": "curves and numbers of single tasks"}
    if options.note:
        document["note"] = options.note
    for path in options.results:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not read["complete"] or not read.get("totals"):
            parser.error(f"{path} is of a comparison that is not finished; the command that began it goes on with it")
        horizons = {row["horizon"] for row in read["comparison"]["results"]}
        if len(horizons) > 1:
            parser.error(f"{path} must have one horizon for all families (--horizons); got {sorted(horizons)}")
        optimizers = document.setdefault("optimizers", read["settings"]["optimizers"])
        if optimizers != read["settings"]["optimizers"]:
            parser.error(f"{path} compares other optimizers than {options.results[0]}")
        found = document[f"{horizons.pop()} steps"] = summary(read)
        for name, numbers in found.items():
            if "families" in numbers:
                print(f"{path}: {name} {numbers['speedup']}, final {numbers['final_ratio']}", end="")
                print(f", {numbers['num_thrown_back']} thrown back, {numbers['num_diverged']} diverged")
    document |= {"torch": read["torch"]}
    write(options.out, document)


if __name__ == "__main__":
    main()
