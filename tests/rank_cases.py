"""Meta-training runs small enough to be made by one, two and four ranks; as a program, one rank of such runs."""

from __future__ import annotations

import dataclasses
import sys
from typing import ClassVar

import pytest
import torch

from learned_opt import distributed, estimators, rules
from learned_opt.curriculum import Curriculum
from learned_opt.estimators.sharded import sharded
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.task import TaskFamily
from learned_opt.truncation import HorizonSchedule

BASE = {
    "outer_steps": 4,
    "num_particles": 8,
    "truncation": 3,
    "horizons": HorizonSchedule(kind="log_uniform", shortest=2, longest=7),
    "validation_every": 2,
    "validation_tasks": 3,
    "learning_rate": 0.01,
}
CASES: dict[str, dict] = {
    "backprop": {"families_per_step": 1},
    "backprop of 5 particles": {"num_particles": 5, "accumulation": 2},
    "fewer particles than ranks": {"num_particles": 1},
    "second order": {"estimator": ("backprop", {"order": 2, "recompute": True})},
    "log_mean": {"meta_loss": MetaLoss(normalization="log_mean"), "num_particles": 3},
    "log_mean of one": {"meta_loss": MetaLoss(normalization="log_mean"), "num_particles": 1},
    "es": {"estimator": ("es", {"num_pairs": 2})},
    "pes": {"estimator": ("pes", {"sigma": 0.02})},
    "pes of 3 pairs": {"estimator": ("pes", {}), "num_particles": 6},
    "nres": {"estimator": ("nres", {"difference": "sign"})},
    "mix": {"estimator": ("mix", {"evolution": "pes"})},
    "imitation": {"estimator": ("imitation", {"share": 0.5, "estimator": "pes"})},
    "whole tensors": {"rule": "paced"},
    "whole tensors, exact": {"rule": "paced", "estimator": ("backprop", {"order": 2})},
    "whole tensors, pes": {"rule": "paced", "estimator": ("pes", {"sigma": 0.02})},
    "bases": {"rule": "turned"},
    "bases, pes": {"rule": "turned", "estimator": ("pes", {"sigma": 0.02})},
    "imitation alone": {"estimator": ("imitation", {"share": 1.0, "policy": "on"}), "num_particles": 3},
    "curriculum": {"curriculum": Curriculum(horizons=(4, 6), patience=1, min_improvement=10.0), "validation_every": 1},
    "single precision": {"dtype": torch.float32},
    "single precision, pes": {"dtype": torch.float32, "estimator": ("pes", {"sigma": 0.02})},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile(TaskFamily):
    """Quadratics whose loss is now and then not a number: ranks do not have equally many valid particles."""

    name: ClassVar[str] = "fragile"
    dim: int = 3
    risk: float = 0.03

    def sample_task(self, split, generator):
        return {"scale": 0.5 + torch.rand(self.dim, generator=generator)}

    def init_params(self, task, generator):
        return {"x": 1 + torch.rand(self.dim, generator=generator)}

    def sample_batches(self, task, num_steps, generator):
        broken = torch.rand(num_steps, generator=generator) < self.risk
        return {"noise": torch.where(broken, torch.nan, 0.1 * torch.rand(num_steps, generator=generator))}

    def loss(self, params, task, batch):
        return (task["scale"] * params["x"].square()).sum() + batch["noise"]


FAMILIES = {"sound": Fragile(dim=4, risk=0.0), "fragile": Fragile()}


def trainer_of(name: str, ranks: distributed.Ranks = distributed.ALONE) -> MetaTrainer:
    settings = {**BASE, **CASES[name]}
    kind, options = settings.pop("estimator", ("backprop", {}))
    dtype, rule = settings.pop("dtype", torch.float64), settings.pop("rule", "compact")
    return MetaTrainer(
        rules.get(rule),
        FAMILIES,
        MetaTrainerConfig(**settings),
        estimators.get(kind, **options),
        dtype=dtype,
        ranks=ranks,
    )


def run(trainer: MetaTrainer, num_steps: int) -> list[dict[str, float]]:
    """So many outer steps; their metrics."""
    found = []
    for _ in range(num_steps):
        metrics = trainer.step()
        if trainer.validation_due:
            metrics |= trainer.validate()
        found.append(metrics)
    return found


def num_held(trainer: MetaTrainer) -> int:
    """How many particles this rank has in flight."""
    estimator = sharded(trainer.estimator)
    return sum(len(estimator.horizons(state)) for state in trainer.estimator_states.values())


def main() -> None:
    """Two outer steps of every case: the first file gets metrics and states; a second one has states to go on from."""
    torch.set_num_threads(1)
    out, *given = sys.argv[1:]
    before = torch.load(given[0], weights_only=True) if given else {}
    results = {}
    with distributed.start() as ranks:
        for name in CASES:
            trainer = trainer_of(name, ranks)
            if given:
                trainer.load_state_dict(before[name]["state"])
            metrics = run(trainer, 2)
            own = {"metrics": metrics, "theta": trainer.theta, "best": trainer.best_score, "totals": trainer.totals}
            everywhere = ranks.everyone(repr({**own, "theta": {n: v.tolist() for n, v in trainer.theta.items()}}))
            assert set(everywhere) == {everywhere[0]}, f"{name}: ranks differ"
            held = ranks.everyone(num_held(trainer))
            results[name] = {"metrics": metrics, "state": trainer.state_dict(), "held": held}
        collectives(ranks)
        if ranks.is_first:
            torch.save(results, out)


def collectives(ranks: distributed.Ranks) -> None:
    """What `Ranks` promises, on real processes."""
    total = ranks.sum(torch.tensor([1.0, ranks.rank]))
    assert total.dtype == torch.float32 and total.tolist() == [ranks.size, sum(range(ranks.size))]
    assert ranks.highest(ranks.rank) == ranks.size - 1
    mine = [torch.full((2,), float(ranks.rank)), torch.full((), float(ranks.rank))]
    ranks.spread(mine)
    assert all(not value.any() for value in mine)
    assert ranks.first(lambda: ranks.rank) == 0
    gathered = ranks.gather(ranks.rank)
    assert gathered == (list(range(ranks.size)) if ranks.is_first else None)
    assert sorted(k for part in ranks.everyone(ranks.share(range(7), first=3)) for k in part) == list(range(7))

    def fails_on(rank: int) -> None:
        if ranks.rank == rank:
            raise ValueError("no good")

    if ranks.size > 1:
        for call, texts in (
            (lambda: ranks.together(lambda: fails_on(1)), ("rank 1: no good",) * 2),
            (lambda: ranks.together(lambda: fails_on(0)), ("no good", "rank 0: no good")),
            (lambda: ranks.first(lambda: fails_on(0)), ("no good", "no good")),
        ):
            with pytest.raises(ValueError if ranks.is_first else distributed.StoppedElsewhere) as caught:
                call()
            assert str(caught.value) == texts[not ranks.is_first]


if __name__ == "__main__":
    main()
