"""Meta-train an optimizer on a problem of your own: one small model for every group of a data set.

The data are always there: the source files of Python's standard library. A row holds four consecutive characters and
the one that follows, and the group column says which file it is from. A task fits a small network, which predicts the
next character, to the rows of one file, so there are as many tasks as files. The files are dealt out to meta-train,
meta-validation and meta-test; an optimizer meta-trained on the first kind then trains networks on files that it never
saw, in an ordinary PyTorch loop. Replace `source_files` and `network` by your own table and module.

Run it with `python examples/own_problem.py`; it takes one to two minutes on two CPU cores.
"""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from learned_opt import LearnedOptimizer, estimators, rules, save_artifact
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from tasks import GroupedData, ModuleFamily
from tasks.data.rows import RowRange

MakeOptimizer = Callable[..., torch.optim.Optimizer]
CONTEXT, NUM_ROWS = 4, 2000
NUM_CLASSES = 64  # ASCII without its control characters, letters in one case


def source_files(shares: tuple[float, float, float] = (0.6, 0.2, 0.2)) -> GroupedData:
    """Rows of CONTEXT characters and the next one, grouped by file; `shares` of the files go to each split."""
    inputs, targets, groups = [], [], []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_bytes().upper()[: NUM_ROWS + CONTEXT]
        if len(text) == NUM_ROWS + CONTEXT:
            codes = np.clip(np.frombuffer(text, np.uint8).astype(np.int64) - 32, 0, NUM_CLASSES - 1)
            windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
            inputs.append(windows[:, :CONTEXT])
            targets.append(windows[:, CONTEXT])
            groups += [path.name] * len(windows)
    return GroupedData(np.concatenate(inputs), np.concatenate(targets), groups, shares=shares)


def network() -> nn.Module:
    """CONTEXT characters to the scores of the next one."""
    return nn.Sequential(
        nn.Embedding(NUM_CLASSES, 8), nn.Flatten(1), nn.Linear(8 * CONTEXT, 32), nn.Tanh(), nn.Linear(32, NUM_CLASSES)
    )


def train(make_optimizer: MakeOptimizer, data: GroupedData, group: RowRange, num_steps: int) -> tuple[float, float]:
    """The usual training loop on one group; returns the mean loss along the way and the final loss on held-out rows."""
    inputs, targets = data.inputs[group.train], data.targets[group.train]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = network()
    optimizer = make_optimizer(model.parameters())
    total = 0.0
    for _ in range(num_steps):
        rows = torch.randint(len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[rows]), targets[rows])
        loss.backward()
        optimizer.step()
        total += loss.item() / num_steps
    with torch.no_grad():
        return total, F.cross_entropy(model(data.inputs[group.test]), data.targets[group.test]).item()


def main(outer_steps: int = 200, num_steps: int = 100, num_groups: int = 16) -> dict[str, tuple[float, float]]:
    """Meta-train, export, and train on groups of meta-test; returns what `train` does, averaged over the groups."""
    data = source_files()
    family = ModuleFamily(network, F.cross_entropy, data, batch_size=64)
    config = MetaTrainerConfig(outer_steps=outer_steps, num_particles=4, validation_tasks=8)
    trainer = MetaTrainer(rules.get("compact"), {"files": family}, config, estimators.get("backprop"))
    for _ in range(outer_steps):
        trainer.step()
        if trainer.validation_due:
            score = trainer.validate()["validation"]
            print(f"outer step {trainer.outer_step}: meta-validation {score:.3f}")

    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    makers: dict[str, MakeOptimizer] = {f"Adam {lr:g}": partial(torch.optim.Adam, lr=lr) for lr in rates}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "files.safetensors"
        theta = trainer.best_theta or trainer.theta
        save_artifact(path, trainer.rule, theta, {"families": {"files": family.config()}})
        makers["learned"] = partial(LearnedOptimizer, weights=path)
        groups = data.ranges["meta_test"][:num_groups]
        print(f"{num_steps} steps on each of {len(groups)} files never seen: training loss along the way, test loss")
        for name, make_optimizer in makers.items():
            scores = [train(make_optimizer, data, group, num_steps) for group in groups]
            along, test = (sum(values) / len(values) for values in zip(*scores))
            results[name] = (along, test)
            print(f"{name:12} {along:.3f}  {test:.3f}")
    return results


if __name__ == "__main__":
    main()
