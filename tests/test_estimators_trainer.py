"""Every estimator inside the meta-trainer: it lowers the meta-loss, and a run resumes from its file to the bit."""

import copy

import pytest
import torch
from estimator_reference import NoisyBowl

from learned_opt import estimators, rules
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.truncation import HorizonSchedule

CONFIG = MetaTrainerConfig(
    outer_steps=40,
    num_particles=8,
    truncation=4,
    horizons=HorizonSchedule(longest=10),
    learning_rate=0.1,
    final_learning_rate=1.0,
    validation_every=0,
)


# A teacher whose steps are of the right size: the default Adam at 1e-3 would teach steps that are too small here.
SETTINGS = {"imitation": {"teacher_settings": {"lr": 0.1}}}


def trainer_of(kind, config=CONFIG):
    return MetaTrainer(
        rules.get("sgd", lr=0.01),
        {"bowl": NoisyBowl()},
        config,
        estimators.get(kind, **SETTINGS.get(kind, {})),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("kind", list(estimators.ESTIMATORS))
def test_meta_training_lowers_the_validation_score(kind):
    trainer = trainer_of(kind)
    before = trainer.validate()["validation"]
    for _ in range(CONFIG.outer_steps):
        trainer.step()
    # A learning rate of 0.01 is far too small for this bowl.
    assert trainer.validate()["validation"] < before - 0.1
    assert trainer.totals["skipped"] == 0 and float(trainer.theta["log_lr"].exp()) > 0.02


@pytest.mark.parametrize("kind", list(estimators.ESTIMATORS))
def test_resumes_to_the_bit(kind, tmp_path):
    trainer = trainer_of(kind)
    for _ in range(3):
        trainer.step()
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    want = [trainer.step() for _ in range(3)]
    resumed = trainer_of(kind)
    resumed.load_state_dict(copy.deepcopy(torch.load(tmp_path / "state.pt", weights_only=True)))
    assert [resumed.step() for _ in range(3)] == want
    assert torch.equal(resumed.theta["log_lr"], trainer.theta["log_lr"])
