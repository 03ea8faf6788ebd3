"""The sweep file: of a form that `wandb sweep` takes, and its trials are commands that the training script takes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "benchmarks" / "sweep.yaml"


def test_the_sweep_file_has_the_form_that_wandb_accepts():
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # wandb leaves the file to the garbage collector
        config = load_sweep_config(str(SWEEP))
    allowed = {"program", "project", "name", "description", "method", "metric", "run_cap", "parameters", "command"}
    assert set(config) <= allowed
    assert config["method"] in ("grid", "random", "bayes")
    assert config["metric"] == {"name": "validation", "goal": "minimize"}
    assert config["command"].count("${args}") == 1 and (ROOT / config["program"]).name == "train_optimizer.py"
    for name, parameter in config["parameters"].items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name)
        if "values" in parameter:
            assert set(parameter) == {"values"} and len(parameter["values"]) > 1
        else:
            assert parameter["distribution"] == "log_uniform_values" and set(parameter) == {
                "distribution",
                "min",
                "max",
            }
            assert all(type(parameter[end]) is float for end in ("min", "max"))
            assert 0 < parameter["min"] < parameter["max"]


def test_the_training_script_understands_what_an_agent_would_start():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    import train_optimizer

    config = yaml.safe_load(SWEEP.read_text())
    for choose in (min, max):
        drawn = {
            name: choose(parameter["values"]) if "values" in parameter else parameter[choose.__name__]
            for name, parameter in config["parameters"].items()
        }
        flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in drawn.items()}})["args"]
        filled = {"${env}": [], "${interpreter}": [], "${program}": [], "${args}": flags}
        command = [word for part in create_sweep_command(config["command"][:]) for word in filled.get(part, [part])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command line's own remarks are not what is tested
            settings = train_optimizer.parse(command).settings
        assert {name: getattr(settings.trainer, name.removeprefix("trainer.")) for name in drawn} == drawn
        assert settings.baselines == ()
