"""What the guard is worth: hostile tasks with it on, and what it costs on ordinary ones.

    python benchmarks/guard.py WEIGHTS … [--sets development held_out] [--seeds 2] [--processes 1]
        [--json benchmarks/results/guard.json]

Every task is trained by `torch.optim.Adam` at its default rate, by the learned optimizer alone, and by it under the
guard, from the same start and on the same batches. Losses are compared at the end, on batches that are not trained on
and without the noise that was added. On a hostile task the guarded run must end at most 1.1 times above Adam's and not
above the start; on an ordinary one, where the learned optimizer alone beats Adam, at most 1.03 times above its own
without the guard, in the geometric mean. WEIGHTS are exported files or names of shipped optimizers; to them come plain
gradient descent at a rate of 1, and a copy of the first LSTM whose steps are ten times too large.

The rules of the guard's decisions were chosen on the set "development"; "held_out" has other families, networks and
seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tasks
from learned_opt import Artifact, LearnedOptimizer, load, rules
from learned_opt.guard import GuardConfig
from learned_opt.task import TaskFamily, Tensors, draw_batches, draw_task, generator_for, task_seed

NUM_FINAL = 64  # batches of the final loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function(TaskFamily):
    """A test function that the task zoo has no use for, from a start drawn around one point.

    Attributes:
        kind: "steep" (curvature grows exponentially away from the optimum), "product" (a chain of eight factors must
            multiply to 1), "saturated" (a mean of sigmoids, started where they are flat).
    """

    name = "function"
    kind: str = "steep"

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return {}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        noise = torch.randn(16, generator=generator)
        starts = {"steep": 0.6 * noise, "product": 1.3 + 0.2 * noise, "saturated": 5 + 0.5 * noise}
        return {"p": starts[self.kind]}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        p = params["p"]
        if self.kind == "steep":
            return torch.cosh(8 * p).mean() + p.square().sum()
        if self.kind == "product":
            return (p.view(2, 8).prod(1) - 1).square().mean()
        return torch.sigmoid(p).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A task to train.

    Attributes:
        name: a label.
        family: its family.
        hostile: which bound holds for it.
        num_steps: of training.
        scale: factor on the loss.
        noise: standard deviation of a random tilt of the loss, different at every step, so that losses and gradients
            are noisy.
    """

    name: str
    family: TaskFamily
    hostile: bool
    num_steps: int = 500
    scale: float = 1.0
    noise: float = 0.0


def _hostile(name: str, family: TaskFamily, **settings: Any) -> Case:
    return Case(name=name, family=family, hostile=True, **settings)


def _ordinary(name: str, lengths: Iterable[int], **settings: Any) -> list[Case]:
    family = tasks.get("image_mlp", **settings)
    return [Case(name=f"{name}, {n} steps", family=family, hostile=False, num_steps=n) for n in lengths]


def development() -> list[Case]:
    """The tasks that the guard was developed on."""
    digits = tasks.get("image_mlp")
    deep = tasks.get("image_mlp", hidden=(16,) * 6, activation="relu", init="fan_in", init_scale=2.0)
    return [
        _hostile("digits x 1e-8", digits, scale=1e-8),
        _hostile("tabular x 1e8", tasks.get("tabular"), scale=1e8),
        _hostile("digits, gradient noise", tasks.get("gradient_noise", family=digits, std=0.1)),
        _hostile("tabular, tilted losses", tasks.get("tabular"), noise=0.3),
        _hostile("rosenbrock", tasks.get("rosenbrock")),
        _hostile("steep", Function(kind="steep")),
        _hostile("plateau", tasks.get("plateau")),
        _hostile("deep ReLU network", deep),
        _hostile("ReLU regression", tasks.get("forecasting")),
        _hostile("sinusoid", tasks.get("sinusoid")),
        *_ordinary("digits", (100, 400)),
        *_ordinary("batches of 8", (100, 400), batch_size=8),
        *_ordinary("40 units", (100, 400), hidden=(40,)),
        *_ordinary("ReLU", (100, 400), activation="relu"),
    ]


def held_out() -> list[Case]:
    """The tasks that are reported."""
    convolution = tasks.get("image_conv")
    return [
        _hostile("autoencoder x 1e-8", tasks.get("image_autoencoder"), scale=1e-8),
        _hostile("logistic regression x 1e8", tasks.get("logistic_regression"), scale=1e8),
        _hostile("forecasting, gradient noise", tasks.get("gradient_noise", family=tasks.get("forecasting"), std=0.1)),
        _hostile("digits, tilted losses", tasks.get("image_mlp", activation="tanh"), noise=0.1),
        _hostile("ackley", tasks.get("ackley")),
        _hostile("product", Function(kind="product")),
        _hostile("saturated", Function(kind="saturated")),
        _hostile("character transformer", tasks.get("char_transformer"), num_steps=300),
        _hostile("character RNN", tasks.get("char_rnn"), num_steps=300),
        _hostile("convolutions", convolution, num_steps=300),
        _hostile("matrix factorization", tasks.get("matrix_factorization")),
        *_ordinary("two layers", (100, 500), hidden=(20, 20)),
        *_ordinary("batches of 12, GELU", (100, 500), batch_size=12, activation="gelu"),
        *_ordinary("30 units, tanh", (100, 500), hidden=(30,), activation="tanh"),
        *_ordinary("labels wrong in places", (100, 500), label_noise=0.1),
    ]


SETS: dict[str, Callable[[], list[Case]]] = {"development": development, "held_out": held_out}
FIRST_SEED = {"development": 101, "held_out": 102}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def train(case: Case, seed: int, make: Make) -> tuple[float, float, torch.optim.Optimizer]:
    """(loss at the start, loss at the end, the optimizer) of one run."""
    constants, start = draw_task(case.family, "meta_test", seed)
    task = {**constants, **case.family.shared_data()}
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    batches = draw_batches(case.family, constants, seed, 0, case.num_steps)
    generator = generator_for(seed, 1)
    optimizer = make(list(params.values()))

    def final() -> float:
        rows = draw_batches(case.family, constants, seed, 1_000_000, NUM_FINAL)
        with torch.no_grad():
            losses = [
                case.family.loss(dict(params), task, {name: value[k] for name, value in rows.items()})
                for k in range(NUM_FINAL if rows else 1)
            ]
        value = statistics.fmean(loss.item() for loss in losses) * case.scale
        return value if math.isfinite(value) else math.inf

    before = final()
    least = 1e-6 * abs(before)  # differences below are not a result
    for step in range(case.num_steps):
        loss = case.family.loss(dict(params), task, {name: value[step] for name, value in batches.items()})
        if case.noise:
            loss = loss + case.noise * sum(
                (torch.randn(p.shape, generator=generator) * p).sum() for p in params.values()
            )
        optimizer.zero_grad()
        (loss * case.scale).backward()
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.step(loss=loss.detach() * case.scale)
        else:
            optimizer.step()
    return before, max(final(), least), optimizer


def wild() -> Artifact:
    """Plain gradient descent at a rate of 1."""
    return Artifact.of(rules.get("sgd"), {"log_lr": torch.tensor(0.0)}, name="gradient_descent")


def ten_times(artifact: Artifact) -> Artifact | None:
    """The same LSTM with steps ten times as large; None for other rules."""
    if artifact.rule.kind != "lstm":
        return None
    scale = artifact.rule.settings()["output_scale"]
    rule = rules.get("lstm", **{**artifact.rule.settings(), "output_scale": 10 * scale})
    return Artifact.of(rule, artifact.theta, name=f"{artifact.name}_x10")


Job = tuple[str, Case, int, str, Artifact | None, bool | GuardConfig]


def work(job: Job) -> dict[str, Any]:
    """One run as a row: the set, the case, the seed, the optimizer, and where it ended."""
    torch.set_num_threads(1)
    set_name, case, index, label, artifact, guard = job
    seed = task_seed("meta_test", FIRST_SEED[set_name], index)
    make: Make = torch.optim.Adam if artifact is None else lambda p: LearnedOptimizer(p, artifact, guard=guard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after, optimizer = train(case, seed, make)
    row = {"set": set_name, "case": case.name, "hostile": case.hostile, "seed": index, "weights": label}
    row |= {"guard": bool(guard), "before": before, "after": after}
    watch = getattr(optimizer, "watch", None)
    return (
        row
        if watch is None
        else {**row, "fallbacks": watch.num_fallbacks, "trials": watch.num_trials, "clipped": watch.num_clipped}
    )


def jobs(sets: Iterable[str], subjects: dict[str, Artifact], num_seeds: int) -> list[Job]:
    """All runs: Adam's, the learned ones, and the guarded ones."""
    out: list[Job] = []
    for name in sets:
        for case in SETS[name]():
            for index in range(num_seeds):
                out.append((name, case, index, "Adam", None, False))
                out += [
                    (name, case, index, label, a, guard) for label, a in subjects.items() for guard in (False, True)
                ]
    return out


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By set, case and weights: the worst ratio of seeds to Adam, and the geometric mean of those to no guard."""
    found = {(r["set"], r["case"], r["seed"], r["weights"], r["guard"]): r for r in rows}
    out = []
    for name, case, label in dict.fromkeys((r["set"], r["case"], r["weights"]) for r in rows if r["guard"]):
        mine = [r for key, r in found.items() if (key[0], key[1], key[3], key[4]) == (name, case, label, True)]
        adam = [found[name, case, r["seed"], "Adam", False] for r in mine]
        alone = [found[name, case, r["seed"], label, False] for r in mine]
        fair = [(r["after"], u["after"]) for r, u, a in zip(mine, alone, adam) if u["after"] <= a["after"]]
        out.append(
            {
                "set": name,
                "case": case,
                "hostile": mine[0]["hostile"],
                "weights": label,
                "to_adam": max(r["after"] / a["after"] for r, a in zip(mine, adam)),
                "to_start": max(r["after"] / r["before"] for r in mine),
                "alone_to_adam": max(u["after"] / a["after"] for u, a in zip(alone, adam)),
                "cost": math.exp(statistics.fmean(math.log(r / u) for r, u in fair)) if fair else None,
                **{name: max(r[name] for r in mine) for name in ("trials", "fallbacks", "clipped")},
            }
        )
    return out


def show(table: list[dict[str, Any]]) -> str:
    """The summary as text; what misses its bound is marked."""
    lines = [
        "| set | task | weights | to Adam | to start | to no guard | no guard to Adam | trials | fallbacks | clipped |",
        "| --- " * 10 + "|",
    ]
    for row in table:
        cost = "" if row["cost"] is None else f"{row['cost']:.3f}"
        bad = row["to_adam"] > 1.1 or row["to_start"] > 1 if row["hostile"] else (row["cost"] or 0) > 1.03
        numbers = f"{row['to_adam']:.3g} | {row['to_start']:.3g} | {cost} | {row['alone_to_adam']:.3g}"
        counts = f"{row['trials']} | {row['fallbacks']} |{' !' if bad else ''}"
        lines.append(f"| {row['set']} | {row['case']} | {row['weights']} | {numbers} | {counts}")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    subjects: dict[str, Artifact] = {}
    for path in arguments.weights:
        artifact = load(path)
        label = Path(path).parent.name or artifact.name if Path(path).suffix else path
        subjects[label] = artifact
        larger = ten_times(artifact)
        if larger is not None and len(subjects) == 1:
            subjects[f"{label} x 10"] = larger
    subjects["gradient descent at 1"] = wild()
    todo = jobs(arguments.sets, subjects, arguments.seeds)
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        rows = pool.map(work, todo, chunksize=4)
    table = summary(rows)
    print(show(table))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"summary": table, "runs": rows, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
