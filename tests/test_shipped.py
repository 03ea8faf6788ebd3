"""The optimizers that ship: each loads by name, has a card, can be trained again by a preset, and trains."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

import learned_opt
from learned_opt import LearnedOptimizer, config, rules
from learned_opt.artifact import SHIPPED

NAMES = ("compact", "l2l", "rnnprop")
CARD_SECTIONS = ("Use it for", "Recipe", "Task families", "Horizons", "Seeds", "Cost of training", "Results", "Limits")


def regression(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A problem that no optimizer was meta-trained on: a small network and a smooth function."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    inputs = torch.rand(128, 3, generator=generator) * 2 - 1
    targets = torch.sin(3 * inputs.sum(1, keepdim=True)) + inputs[:, :1] * inputs[:, 1:2]
    return nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 1)), inputs, targets


def losses_of(name: str, seed: int, num_steps: int, *, falling: bool) -> list[float]:
    """The loss before every step, at a constant lr or at one that falls to zero over the last fifth."""
    model, inputs, targets = regression(seed)
    optimizer = LearnedOptimizer(model.parameters(), name)
    factor = (lambda step: min(1.0, 5 * (1 - step / num_steps))) if falling else (lambda step: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def final_loss(name: str, seed: int, num_steps: int) -> tuple[float, float]:
    """The first and the last loss. At a constant lr the last may be one of the leaps of benchmarks/last_steps.py."""
    losses = losses_of(name, seed, num_steps, falling=True)
    return losses[0], losses[-1]


def test_these_ship():
    assert tuple(learned_opt.shipped()) == NAMES


def test_the_default_is_compact():
    param = nn.Parameter(torch.ones(2))
    assert LearnedOptimizer([param]).param_groups[0]["weights"] == learned_opt.load("compact").identity


@pytest.mark.parametrize("name", NAMES)
def test_each_is_small_and_says_where_it_comes_from(name):
    artifact = learned_opt.load(name)
    assert artifact.name == name
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < 100_000
    for key in ("families", "estimator", "horizon", "truncation", "seed", "outer_steps", "inner_steps", "torch"):
        assert key in artifact.provenance, key
    assert not artifact.initial_params


@pytest.mark.parametrize("name", NAMES)
def test_each_is_what_its_preset_trains(name):
    is_what_it_trains(learned_opt.load(name), config.preset(name))


def is_what_it_trains(artifact, settings):
    rule = rules.get(settings.rule, **{**settings.rule_settings, **settings.export_settings})
    assert (artifact.rule.kind, artifact.rule.settings()) == (rule.kind, rule.settings())
    provenance = artifact.provenance
    assert provenance["families"] == settings.to_dict()["families"]
    assert provenance["estimator"] == settings.estimator
    assert provenance["truncation"] == settings.trainer.truncation
    assert provenance["horizon"] == settings.trainer.horizons.longest
    assert 0 < provenance["outer_steps"] <= settings.trainer.outer_steps


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_card(name):
    card = (SHIPPED / f"{name}.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^\*\*([^*]+)\.\*\* (.+)", card, re.MULTILINE))
    assert card.startswith(f"# {name}\n")
    for section in CARD_SECTIONS:
        assert len(sections.get(section, "")) > 10, section
    assert learned_opt.load(name).hash[:16] in card, "the card is of other weights"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_trains_what_it_has_never_seen(name, seed):
    start, end = final_loss(name, seed, 200)
    assert end < 0.5 * start


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_each_trains_it_at_a_constant_rate(name, seed):
    losses = losses_of(name, seed, 200, falling=False)
    assert statistics.median(losses[-50:]) < 0.3 * losses[0]


def test_with_nothing_tuned_the_default_beats_adam_at_its_default_rate():
    for seed in range(3):
        _, learned = final_loss("compact", seed, 300)
        model, inputs, targets = regression(seed)
        adam = torch.optim.Adam(model.parameters())
        for _ in range(300):
            adam.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            adam.step()
        assert learned < loss.item()


def test_the_other_seeds_of_the_default_are_those_that_were_measured():
    folder = Path(__file__).parent.parent / "benchmarks"
    measured = json.loads((folder / "results" / "suite_test_seeds.json").read_text(encoding="utf-8"))["optimizers"]
    files = {path.stem.removeprefix("compact_"): path for path in (folder / "weights").glob("compact_*")}
    found = {name: learned_opt.load_artifact(path) for name, path in files.items()} | {
        "compact": learned_opt.load("compact")
    }
    assert {name: artifact.identity for name, artifact in found.items()} == measured
    settings = [artifact.rule.settings() for artifact in found.values()]
    assert settings[1:] == settings[:-1] and len({artifact.provenance["seed"] for artifact in found.values()}) == 3


def test_the_files_of_the_recipe_on_short_runs_are_those_that_were_measured():
    folder = Path(__file__).parent.parent / "benchmarks"
    found = [learned_opt.load_artifact(folder / "weights" / f"short_seed{seed}.safetensors") for seed in range(3)]
    for seed, artifact in enumerate(found):
        is_what_it_trains(artifact, config.preset("compact_short"))
        assert artifact.provenance["seed"] == seed
    identities = [artifact.identity for artifact in found]
    for name in ("long_horizons_short", "suite_test_short"):
        measured = json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))["optimizers"]
        assert list(measured.values() if isinstance(measured, dict) else measured) == identities
