"""Meta-training runs small enough to be made by one, two and four ranks; as a program, one rank of such a run."""

from __future__ import annotations

import sys

import torch

import tasks
from learned_opt import distributed, estimators, rules
from learned_opt.curriculum import Curriculum
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.truncation import HorizonSchedule

BASE = {
    "outer_steps": 4,
    "num_particles": 8,
    "truncation": 4,
    "horizons": HorizonSchedule(kind="log_uniform", shortest=3, longest=9),
    "validation_every": 2,
    "validation_tasks": 3,
    "learning_rate": 0.01,
}
CASES: dict[str, dict] = {
    "backprop": {},
    "backprop of 5 particles": {"num_particles": 5},
    "fewer particles than ranks": {"num_particles": 1},
    "second order": {"estimator": ("backprop", {"order": 2})},
    "log_mean": {"meta_loss": MetaLoss(normalization="log_mean"), "num_particles": 3},
    "es": {"estimator": ("es", {"num_pairs": 2})},
    "pes": {"estimator": ("pes", {"sigma": 0.02})},
    "pes of 3 pairs": {"estimator": ("pes", {}), "num_particles": 6},
    "nres": {"estimator": ("nres", {"difference": "sign"})},
    "mix": {"estimator": ("mix", {"evolution": "pes"})},
    "imitation": {"estimator": ("imitation", {"share": 0.5, "estimator": "pes"})},
    "imitation alone": {"estimator": ("imitation", {"share": 1.0, "policy": "on"}), "num_particles": 3},
    "curriculum": {"curriculum": Curriculum(horizons=(4, 6), longest=6, patience=1), "validation_every": 1},
    "single precision": {"dtype": torch.float32},
    "single precision, pes": {"dtype": torch.float32, "estimator": ("pes", {"sigma": 0.02})},
}


def trainer_of(name: str, ranks: distributed.Ranks = distributed.ALONE) -> MetaTrainer:
    """The run of this name; two families, one of which has losses that overflow."""
    settings = {**BASE, **CASES[name]}
    kind, options = settings.pop("estimator", ("backprop", {}))
    dtype = settings.pop("dtype", torch.float64)
    families = {
        "bowl": {"name": "quadratic", "dim": 3},
        "digits": {"name": "image_mlp", "hidden": [2], "batch_size": 4},
    }
    return MetaTrainer(
        rules.get("compact"),
        tasks.build(families),
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


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.reshape(-1) for v in tensors.values()])


def main() -> None:
    """Every case: `OUT` gets metrics and state; `IN`, where given, holds states to continue from."""
    torch.set_num_threads(1)
    out = sys.argv[1]
    given = torch.load(sys.argv[2], weights_only=True) if len(sys.argv) > 2 else {}
    results = {}
    with distributed.start() as ranks:
        for name in CASES:
            trainer = trainer_of(name, ranks)
            if name in given:
                trainer.load_state_dict(given[name]["state"])
            metrics = run(trainer, 2)
            everywhere = ranks.everyone((metrics, flat(trainer.theta).tolist(), trainer.best_score))
            assert all(str(found) == str(everywhere[0]) for found in everywhere), f"{name}: ranks differ"
            held = ranks.everyone(sorted(h for s in trainer.estimator_states.values() for h in trainer._sharded.horizons(s)))
            results[name] = {"metrics": metrics, "state": trainer.state_dict(), "held": [len(h) for h in held]}
        if ranks.is_first:
            torch.save(results, out)


if __name__ == "__main__":
    main()
