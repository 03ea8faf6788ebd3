"""Amortization on real grouped data: what meta-training on a third of the groups saves on groups never seen.

    python -m benchmarks.amortization

The data and the network are those of examples/own_problem.py: one small network for every source file of Python's
standard library, which predicts the next character. A third of the files is meta-train, a sixth meta-validation, and
half of them meta-test; no file is in two. Of every file a quarter of the rows is held out, and *validation loss* is
the mean loss on those rows of the file.

Everything is chosen on meta-validation files alone: checkpoints, and all learning rates (a half-decade grid; the least
mean final validation loss wins). Then every meta-test file's network is trained by

- `learned`: the meta-trained optimizer, from PyTorch's own initial parameters;
- `learned_start`: the same from initial parameters that were meta-trained with it (`trainer.initial_params`);
- `adam` (the reference), `nesterov`, `sgd`: the best rate for the family, from PyTorch's own initial parameters;
- `adam_default`: rate 0.001; `adam_soonest`: the rate with which Adam reaches, on meta-validation files, the final
  loss of `adam` soonest, which is for speed alone what tuning can do;
- `adam_per_group`: for every file the rate that is best for it, found by trying all of them on its own held-out rows;
- `adam_start`: tuned Adam from the initial parameters of `learned_start`; `adam_pooled`: tuned Adam from one network
  that tuned Adam trained on the rows of all meta-train files together. Both say how much a start alone is worth;
- `learned_pooled`: as `learned_start`, its initial parameters meta-trained from that one network on. It was added, with
  nothing of it tuned, after the others had been looked at on meta-test files.

Validation losses are measured at the same steps for all: every step to 10, every fifth to 60, then every tenth. A
network's *final validation loss* is the mean of those measured in the last 5 % of the steps, so where the loss rises
again because a small file is overfitted, that rise is in it; the horizon is about where that of tuned Adam stops
falling. The *least validation loss along the way*, what stopping early at the best possible moment would have given
Adam, is the stricter target; it is chosen on the held-out rows themselves, in Adam's favour. A third target is the
final validation loss of `adam_pooled`. *Steps to a target* are the first measured step at or below it, as a share of
the horizon and of the step at which `adam` itself was first there (for the third target `adam_pooled`); never reached
counts as infinite. All optimizers start from the same initial parameters, but for those that bring their own, and see
the same batches. Medians and interquartile means are over all meta-test files and seeds of meta-training, their 95 %
intervals from a bootstrap that draws files again, each with all of its seeds.

The picture goes to docs/amortization.png, the numbers to benchmarks/results/amortization.json.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.amortization_report import draw, final, measured_steps, steps_to, summarize, table
from benchmarks.conditions import conditions
from benchmarks.few_shot import meta_train
from examples.own_problem import network, source_files
from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation.baselines import half_decades
from learned_opt.evaluation.metrics import Array, median
from learned_opt.files import write_atomically
from learned_opt.initial_params import InitialParamsConfig, flat_params, name_of
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.particles import EpisodePlan, Particles, place, start_particles, take
from learned_opt.task import Tensors
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import Move, inner_steps, learned_move
from tasks import ModuleFamily
from tasks.data.grouped import GroupedData

ROOT = Path(__file__).parent.parent
SHARES = (1 / 3, 1 / 6, 1 / 2)
LABEL = "files"
GROUPS_PER_METRIC = 26

LEARNED = ("learned_pooled", "learned_start", "learned")
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adam": torch.optim.Adam,
    "nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "sgd": torch.optim.SGD,
}
RATES = {
    "adam": half_decades(-3, -1),
    "nesterov": half_decades(-2, 0)[1:],
    "sgd": half_decades(-2, 0)[1:],
    "adam_start": half_decades(-4, -2),
    "adam_pooled": half_decades(-4, -2),
}
DEFAULT_RATE = RATES["adam"][0]
RECIPE: dict[str, Any] = {
    "rule": "mixture",
    "num_particles": 8,
    "truncation": 20,
    "longest": 100,
    "learning_rate": 3e-3,
    "start_rate": 0.1,
    "pooled_rate": 3e-3,
}


class Groups:
    """All groups of a split, each once, at the start of an episode.

    Args:
        family: what to train.
        split: of the groups.
        most: so many groups at most; 0 for all.
    """

    def __init__(self, family: BatchedFamily, data: GroupedData, split: str, most: int = 0) -> None:
        plan, found = EpisodePlan(split=split, run_seed=0), dict[int, int]()
        wanted = sorted(group.first for group in data.ranges[split])[: most or None]
        index = 0
        while len(found) < len(wanted):
            tasks, _ = family.start(split, [plan.draw(index, 0)[0]])
            if int(tasks["first_row"]) in wanted:
                found.setdefault(int(tasks["first_row"]), index)
            index += 1
        self.family = family
        self.particles = start_particles(family, None, plan, [found[first] for first in wanted])

    def start(self, copies: int = 1, initial_params: torch.Tensor | None = None) -> Particles:
        """Fresh particles, all groups `copies` times over, at their own initial parameters or at these."""
        particles = take(self.particles, list(range(len(self.particles))) * copies)
        if initial_params is not None:
            place(self.family, particles, initial_params)
        return particles


@torch.no_grad()
def validation_curves(family: BatchedFamily, particles: Particles, horizon: int, move: Move) -> Array:
    """Advance the particles to the horizon; their validation losses [measured steps, particles]."""
    rows, done = [], 0
    for step in measured_steps(horizon):
        for _ in inner_steps(family, particles, step - done, move) if step > done else ():
            pass
        done = step
        losses = []
        for first in range(0, len(particles), GROUPS_PER_METRIC):
            some = slice(first, first + GROUPS_PER_METRIC)
            tasks = {name: value[some] for name, value in particles.tasks.items()}
            losses.append(family.eval_metrics(particles.params[some], tasks)["test_loss"])
        rows.append(torch.cat(losses))
    return np.asarray(torch.stack(rows).double().nan_to_num(nan=float("inf"), posinf=float("inf")))


def torch_curves(
    name: str, groups: Groups, rates: Sequence[float], horizon: int, initial_params: torch.Tensor | None = None
) -> Array:
    """Validation losses [measured steps, rates, groups] of a torch optimizer; all of ours treat coordinates apart."""
    particles = groups.start(len(rates), initial_params)
    leaves = list(particles.params.clone().chunk(len(rates)))
    optimizer = OPTIMIZERS[name]([{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, rates)])

    def move(params: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        for leaf, grad in zip(leaves, grads.chunk(len(leaves))):
            leaf.grad = grad
        optimizer.step()
        return torch.cat(leaves)

    curves = validation_curves(groups.family, particles, horizon, move)
    return curves.reshape(len(curves), len(rates), -1)


def learned_curves(trainer: MetaTrainer, groups: Groups, horizon: int) -> Array:
    """Validation losses [measured steps, groups] of the trainer's best checkpoint."""
    theta = trainer.best_theta or trainer.theta
    particles = groups.start(initial_params=theta.get(name_of(LABEL)))
    size = particles.params.numel()
    particles.rule_state = trainer.rule.init_state(size)
    own = {name: value for name, value in theta.items() if name != name_of(LABEL)}
    return validation_curves(groups.family, particles, horizon, learned_move(trainer.rule, own, particles))


def best_rate(curves: Array, rates: Sequence[float], horizon: int) -> int:
    """The index of the rate with the least mean final validation loss; it must not be at the grid's edge."""
    best = int(final(curves, horizon).mean(-1).argmin())
    if best in (0, len(rates) - 1):
        print(f"note: the best rate, {rates[best]:.3g}, is at the edge of the grid")
    return best


def trainer_of(family: ModuleFamily, options: argparse.Namespace, seed: int, name: str, pooled: Tensors) -> MetaTrainer:
    """The recipe, chosen on meta-validation files; `pooled` is where the start of `learned_pooled` is learned from."""
    rule = rules.get(RECIPE["rule"])
    rate = RECIPE["pooled_rate" if name == "learned_pooled" else "start_rate"]
    families = () if name == "learned" else (LABEL,)
    config = MetaTrainerConfig(
        outer_steps=options.outer_steps,
        num_particles=RECIPE["num_particles"],
        truncation=RECIPE["truncation"],
        horizons=HorizonSchedule(kind="log_uniform", shortest=RECIPE["truncation"], longest=RECIPE["longest"]),
        initial_params=InitialParamsConfig(families=families, learning_rate=rate),
        meta_loss=MetaLoss(normalization="log"),
        learning_rate=RECIPE["learning_rate"],
        validation_every=max(options.outer_steps // 10, 1),
        validation_tasks=16,
        seed=seed,
    )
    theta = rule.init_theta(torch.Generator().manual_seed(seed)) | (pooled if name == "learned_pooled" else {})
    return MetaTrainer(rule, {LABEL: family}, config, estimators.get("backprop"), theta=theta)


def pooled_starts(family: BatchedFamily, data: GroupedData, num_steps: int) -> Iterator[torch.Tensor]:
    """Networks that Adam, its rate decayed to zero, trained on all meta-train files together, at several rates."""
    rows = torch.cat([torch.arange(group.first, group.first + group.num_train) for group in data.ranges["meta_train"]])
    for rate in half_decades(-3, -2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = network()
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            chosen = rows[torch.randint(len(rows), (64,), generator=generator)]
            optimizer.zero_grad()
            F.cross_entropy(module(data.inputs[chosen]), data.targets[chosen]).backward()
            optimizer.step()
            schedule.step()
        yield flat_params(LABEL, {n: p.detach() for n, p in module.named_parameters()}, family)


class Comparison:
    """The optimizers, tuned on meta-validation files when made; `curves` runs them.

    What was computed is kept in `options.folder`, so that the same command continues one that was stopped.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.horizon = options, options.horizon
        self.data = source_files(SHARES)
        self.meta_family = ModuleFamily(network, F.cross_entropy, self.data, batch_size=64, judge="query")
        # The same tasks and batches; the rows that judge are of meta-training alone.
        self.family = BatchedFamily(ModuleFamily(network, F.cross_entropy, self.data, batch_size=64))
        self.groups: dict[str, Groups] = {}
        options.folder.mkdir(parents=True, exist_ok=True)
        self.pooled = self._kept("pooled", self._pooled)
        self.trainers: dict[int, dict[str, MetaTrainer]] = {}
        for seed in options.seeds:
            self.trainers[seed] = {}
            for name in LEARNED:
                trainer = trainer_of(self.meta_family, options, seed, name, {name_of(LABEL): self.pooled})
                folder, label = options.folder / f"{name}-{seed}-{options.outer_steps}", f"{name} {seed}"
                meta_train(trainer, folder, lambda text, label=label: print(f"{label}: {text}", flush=True))
                print(f"{label}: the best outer step is {trainer.best_step}", flush=True)
                self.trainers[seed][name] = trainer
        self.rates = {"adam_default": DEFAULT_RATE}
        for name in ("adam", "nesterov", "sgd", "adam_start", "adam_pooled"):
            self._tune(name)
        print("rates:", {name: f"{rate:.3g}" for name, rate in self.rates.items()}, flush=True)

    def _kept(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` returns, or returned before with the same settings."""
        options = self.options
        settings = [options.horizon, options.outer_steps, options.most_groups, options.pooled_steps]
        path = options.folder / f"{name}.pt"
        if path.exists() and (found := torch.load(path, weights_only=True))["settings"] == settings:
            return found["value"]
        buffer, value = io.BytesIO(), compute()
        torch.save({"settings": settings, "value": value}, buffer)
        write_atomically(path, buffer.getvalue())
        print(f"{name}: done", flush=True)
        return value

    def _groups(self, split: str) -> Groups:
        if split not in self.groups:  # found by drawing until every group has come up
            self.groups[split] = Groups(self.family, self.data, split, self.options.most_groups)
        return self.groups[split]

    def _start_of(self, seed: int) -> torch.Tensor:
        """The learned initial parameters."""
        trainer = self.trainers[seed]["learned_start"]
        return (trainer.best_theta or trainer.theta)[name_of(LABEL)]

    def _pooled(self) -> torch.Tensor:
        groups, best = self._groups("meta_validation"), (float("inf"), torch.zeros(()))
        for start in pooled_starts(self.family, self.data, self.options.pooled_steps):
            particles = groups.start(initial_params=start)
            score = float(validation_curves(self.family, particles, 0, lambda params, _: params).mean())
            best = min(best, (score, start), key=lambda pair: pair[0])
        return best[1]

    def _torch(self, name: str, split: str, rates: Sequence[float], seed: int = -1) -> Array:
        """Curves [measured steps, rates, groups] of a torch optimizer from its own start."""
        optimizer, _, begin = name.partition("_")
        start = {"": None, "pooled": self.pooled}[begin] if begin != "start" else self._start_of(seed)
        label = f"{name}{seed if seed >= 0 else ''}-{split}-" + "-".join(f"{rate:.3g}" for rate in rates)
        return self._kept(
            label, lambda: torch.from_numpy(torch_curves(optimizer, self._groups(split), rates, self.horizon, start))
        ).numpy()

    def _tune(self, name: str) -> None:
        rates, horizon = RATES[name], self.horizon
        seed = self.options.seeds[0] if name == "adam_start" else -1
        curves = self._torch(name, "meta_validation", rates, seed)
        best = best_rate(curves, rates, horizon)
        self.rates[name] = rates[best]
        if name == "adam":
            targets = final(curves[:, best], horizon)
            waits = [median(steps_to(curves[:, k], targets, horizon)) for k in range(len(rates))]
            self.rates["adam_soonest"] = rates[int(np.argmin(waits))]

    def curves(self, split: str) -> dict[str, Array]:
        """Validation losses [measured steps, seeds of meta-training, groups], of every optimizer on the same draws."""
        horizon, seeds = self.horizon, self.options.seeds

        def repeated(curves: Array) -> Array:
            return np.repeat(curves[:, None], len(seeds), axis=1)

        grid = self._torch("adam", split, RATES["adam"])
        out = {}
        for name in LEARNED:
            own = [
                self._kept(
                    f"{name}{seed}-{split}",
                    lambda trainer=self.trainers[seed][name]: torch.from_numpy(
                        learned_curves(trainer, self._groups(split), horizon)
                    ),
                ).numpy()
                for seed in seeds
            ]
            out[name] = np.stack(own, axis=1)
        for name in ("adam", "adam_soonest", "adam_default"):
            out[name] = repeated(grid[:, RATES["adam"].index(self.rates[name])])
        out["adam_per_group"] = repeated(grid[:, final(grid, horizon).argmin(0), np.arange(grid.shape[2])])
        for name in ("nesterov", "sgd", "adam_pooled"):
            out[name] = repeated(self._torch(name, split, [self.rates[name]])[:, 0])
        starts = [self._torch("adam_start", split, [self.rates["adam_start"]], seed)[:, 0] for seed in seeds]
        return out | {"adam_start": np.stack(starts, axis=1)}


def main() -> None:
    """Meta-train, tune, look at the meta-test files once, and write it all down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/amortization"), help="for checkpoints")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "amortization.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "amortization.png")
    parser.add_argument("--split", choices=("meta_validation", "meta_test"), default="meta_test")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--horizon", type=int, default=300, help="steps of every network")
    parser.add_argument("--most-groups", type=int, default=0, help="files of a split to train on; 0 for all")
    parser.add_argument("--outer-steps", type=int, default=70)
    parser.add_argument("--pooled-steps", type=int, default=5000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    compared = Comparison(options)
    curves = compared.curves(options.split)
    found = summarize(curves, options.horizon)
    print(table(found))
    data = compared.data
    report = {
        **conditions("benchmarks.amortization", load),
        "python": platform.python_version(),
        "split": options.split,
        "num_groups": {split: data.num_groups(split) for split in data.ranges},
        "num_networks": curves["adam"][0].size,
        "horizon": options.horizon,
        "recipe": RECIPE | {"outer_steps": options.outer_steps},
        "best_outer_steps": {n: [t[n].best_step for t in compared.trainers.values()] for n in LEARNED},
        "rates": compared.rates,
        "measured_steps": measured_steps(options.horizon),
        "optimizers": found,
    }
    write_atomically(options.results, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    draw(curves, options.horizon, options.picture)


if __name__ == "__main__":
    main()
