"""Learned initial parameters as users meet them: in the exported file, in a module, and in the training script."""

import json
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import learned_opt
import tasks
import train_optimizer
from learned_opt import estimators, rules
from learned_opt.artifact import Artifact, content_hash
from learned_opt.initial_params import InitialParamsConfig, split
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.truncation import HorizonSchedule

RULE = rules.get("compact", hidden_size=2)
THETA = RULE.init_theta(torch.Generator().manual_seed(0))
INITIAL = {
    "wide": {"0.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), "0.bias": torch.arange(4.0)},
    "a label/with.all sorts": {"x": torch.ones(2)},
}


def network(hidden=4):
    return nn.Sequential(nn.Linear(3, hidden))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine.safetensors"
    learned_opt.save_artifact(path, RULE, THETA, initial_params=INITIAL)
    return path


def test_round_trip(path):
    read = learned_opt.load(path)
    assert read.theta.keys() == THETA.keys()
    assert list(read.initial_params) == list(INITIAL)
    for label, params in INITIAL.items():
        found = read.initial_parameters(label)
        assert list(found) == list(params)
        assert all(torch.equal(found[n], v) and found[n].dtype == torch.float32 for n, v in params.items())
    read.initial_parameters("wide")["0.bias"].zero_()
    assert torch.equal(read.initial_parameters("wide")["0.bias"], INITIAL["wide"]["0.bias"])
    learned_opt.LearnedOptimizer(network().parameters(), weights=path)


def test_they_count_in_the_hash_and_their_absence_does_not(tmp_path, path):
    plain = learned_opt.save_artifact(tmp_path / "plain.safetensors", RULE, THETA)
    assert plain.hash == content_hash(RULE.kind, RULE.settings(), THETA)
    other = Artifact.of(RULE, THETA, name="mine", initial_params={"wide": {"0.bias": torch.ones(4)}})
    assert len({plain.hash, learned_opt.load(path).hash, other.hash}) == 3
    with safe_open(str(tmp_path / "plain.safetensors"), framework="pt") as file:
        assert file.metadata()["format_version"] == "1"  # that older versions of the library read
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["format_version"] == "2"


def rewrite(path, change):
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, str(path), metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("initial_params/wide/0.bias"),
            r"is damaged: it lacks the initial parameters \['wide', '0.bias'",
        ),
        (lambda t: t["initial_params/wide/0.bias"].add_(1), "is damaged: its content has the hash"),
        (
            lambda t: t["initial_params/wide/0.bias"].fill_(torch.nan),
            r"damaged: initial_params\['wide'\]\['0.bias'\] has",
        ),
    ],
)
def test_damaged_files(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        learned_opt.load_artifact(path)


def test_labels_that_are_not_there(path):
    with pytest.raises(
        ValueError, match="has no initial parameters of 'wid'; there are 'wide', 'a label/with.all sorts'"
    ):
        learned_opt.load(path).initial_parameters("wid")
    with pytest.raises(
        ValueError, match="label must say which family's initial parameters are meant; there are 'wide'"
    ):
        learned_opt.load(path).initial_parameters()
    with pytest.raises(ValueError, match="'adam' was exported without initial parameters; meta-train with"):
        learned_opt.load("adam").initial_parameters("wide")
    with pytest.raises(ValueError, match=r"initial_params\['empty'\] holds no parameters; leave the label out"):
        Artifact.of(RULE, THETA, name="mine", initial_params={"empty": {}})


def test_copied_into_a_module(path):
    module = network().double()
    learned_opt.copy_initial_parameters(module, path, "wide")
    assert torch.equal(module[0].weight, INITIAL["wide"]["0.weight"].double())
    assert torch.equal(module[0].bias, INITIAL["wide"]["0.bias"].double())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            network(5),
            r"'0.weight' has shape \(5, 3\) in the module, but \(4, 3\) where it was learned; build the module",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)),
            "they have no 1.weight, 1.bias; initialize the module that was",
        ),
        (
            nn.Sequential(nn.Linear(3, 4, bias=False)),
            "it has no 0.bias; initialize the module that was meta-trained on",
        ),
    ],
)
def test_modules_that_do_not_fit_are_left_alone(path, module, message):
    before = {n: v.clone() for n, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        learned_opt.copy_initial_parameters(module, path, "wide")
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_from_an_own_module_into_it(tmp_path):
    """What was meta-learned on a `ModuleFamily` is what its module starts with after the copy."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 2, generator=generator)
    data = tasks.GroupedData(inputs, inputs.sum(1, keepdim=True), torch.arange(60) % 6)
    family = tasks.ModuleFamily(module, F.mse_loss, data, batch_size=4)
    config = MetaTrainerConfig(
        outer_steps=3,
        num_particles=2,
        truncation=2,
        horizons=HorizonSchedule(longest=4),
        validation_tasks=2,
        initial_params=InitialParamsConfig(families=("mine",)),
    )
    trainer = MetaTrainer(RULE, {"mine": family}, config, estimators.get("backprop"))
    trainer.step()
    theta, initial = split(trainer.theta)
    learned = trainer.work["mine"].batched.unflatten(initial["mine"])
    artifact = learned_opt.save_artifact(tmp_path / "own.safetensors", RULE, theta, initial_params={"mine": learned})
    learned_opt.copy_initial_parameters(module, artifact)
    assert torch.equal(torch.cat([p.flatten() for p in module.parameters()]), initial["mine"])


def test_the_training_script_learns_exports_and_goes_on_from_them(tmp_path, monkeypatch, capsys):
    settings = {
        "rule": "gated",
        "families": {
            "sines": {"name": "sinusoid", "hidden": [4], "judge": "query", "num_queries": 5},
            "others": {"name": "quadratic", "dim": 2},
        },
        "estimator_settings": {"order": 2},
        "trainer": {
            "outer_steps": 4,
            "num_particles": 2,
            "truncation": 2,
            "horizons": {"longest": 2, "random_offsets": False},
            "validation_tasks": 2,
            "initial_params": {"families": ["sines"], "learning_rate": 0.01},
        },
        "baselines": ["sgd"],
        "evaluation": {"horizon": 2, "num_tasks": 2, "seeds": [0], "num_validation_tasks": 2},
        "tracking": {"mode": "disabled"},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(settings))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_optimizer.py", "--config", str(file), *arguments])
        assert train_optimizer.main() == 0, capsys.readouterr()

    run("--run-dir", str(tmp_path / "first"))
    first = learned_opt.load(tmp_path / "first" / "optimizer.safetensors")
    assert list(first.initial_params) == ["sines"]
    assert {n: tuple(v.shape) for n, v in first.initial_parameters().items()} == {
        "weight0": (1, 4),
        "bias0": (4,),
        "weight1": (4, 1),
        "bias1": (1,),
    }
    results = {r["optimizer"]: r for r in json.loads((tmp_path / "first" / "results.json").read_text())["results"]}
    assert results["learned"]["scores"] is not None, results["learned"]["note"]
    # From the command line, at a rate too small to move anything: the second run ends where the first did.
    run(
        "--run-dir",
        str(tmp_path / "second"),
        "--start-from",
        str(tmp_path / "first" / "optimizer.safetensors"),
        "--trainer.initial-params.families",
        "s*",
        "--trainer.initial-params.learning-rate",
        "1e-20",
        "--trainer.outer-steps",
        "1",
    )
    second = learned_opt.load(tmp_path / "second" / "optimizer.safetensors")
    found = second.initial_parameters("sines")
    assert all(torch.equal(found[n], v) for n, v in first.initial_parameters("sines").items())
