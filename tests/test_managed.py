"""Managed training jobs: the conventions one by one, and a job run by the service's own toolkit in a local tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchrun

import train_optimizer
from learned_opt import managed
from learned_opt.artifact import load_artifact
from learned_opt.checkpoints import CheckpointFolder
from learned_opt.config import load

SETTINGS = {
    "preset": "digits",
    "rule": "compact",
    "families": "{noise: {name: text_like}}",
    "trainer.outer-steps": 4,
    "trainer.num-particles": 2,
    "trainer.truncation": 5,
    "trainer.horizons.longest": 10,
    "trainer.horizons.random-offsets": False,
    "trainer.validation-tasks": 2,
    "checkpoint-every": 2,
    "baselines": ["adam"],
    "evaluation.horizon": 5,
    "evaluation.num-tasks": 2,
    "evaluation.seeds": [0],
    "evaluation.num-validation-tasks": 2,
    "wandb": "disabled",
}


def test_hyperparameters_become_a_command_line():
    given = ["--preset", "digits", "--trainer.horizons.random-offsets", "False", "--auto-resume", "true"]
    want = ["--preset", "digits", "--trainer.horizons.no-random-offsets", "--auto-resume"]
    assert managed.arguments(given) == want
    assert managed.arguments(["--no", "False"]) == ["--no-no"]
    assert managed.arguments(["--baselines", "['adam', 'sgd']", "--seed", "3"]) == [
        "--baselines",
        "adam",
        "sgd",
        "--seed",
        "3",
    ]
    assert managed.arguments(["--baselines", "[]", "--families", "{a: {name: b}}"]) == [
        "--baselines",
        "--families",
        "{a: {name: b}}",
    ]


def test_settings_see_the_environment(monkeypatch):
    monkeypatch.setenv("SM_CHANNEL_TRAIN", "/data/train")
    settings = {"a": {"data_dir": "$SM_CHANNEL_TRAIN/x", "list": ["${SM_CHANNEL_TRAIN}", 1]}, "b": None, "c": 2.0}
    want = {"a": {"data_dir": "/data/train/x", "list": ["/data/train", 1]}, "b": None, "c": 2.0}
    assert managed.expand(settings) == want
    with pytest.raises(
        ValueError, match=r"'\$SM_CHANNEL_TEST' names the environment variable SM_CHANNEL_TEST, which is "
    ):
        managed.expand("$SM_CHANNEL_TEST")
    with pytest.raises(ValueError, match="not set; the data channels are SM_CHANNEL_TRAIN"):
        managed.expand("$OTHER_FOLDER")
    monkeypatch.delenv("SM_CHANNEL_TRAIN")
    with pytest.raises(ValueError, match="not set; set it, or write the path itself"):
        managed.expand("$OTHER_FOLDER")


def test_a_job_is_found_by_its_variables(tmp_path):
    assert managed.find({}) is None
    job = managed.find({"SM_MODEL_DIR": str(tmp_path / "model")})
    assert job is not None and job.run == tmp_path / "output" / "data" / "run"
    assert job.failure == tmp_path / "output" / "failure"
    (tmp_path / "checkpoints").mkdir()
    job = managed.find({"SM_MODEL_DIR": str(tmp_path / "model"), "SM_OUTPUT_DIR": str(tmp_path / "out")})
    assert job is not None and job.run == tmp_path / "checkpoints" and job.failure == tmp_path / "out" / "failure"
    job.failed("x" * 5000)
    assert len(job.failure.read_text()) == 1024


def test_a_job_starts_continues_and_delivers(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "quadratic", "--trainer.outer-steps", "2", "--trainer.num-particles", "2"]
    arguments += ["--trainer.validation-tasks", "2", "--baselines", "[]", "--wandb", "disabled"]
    monkeypatch.setattr(sys, "argv", ["train_optimizer.py", *arguments])
    save = train_optimizer.save_artifact

    def interrupted(*args, **kwargs):
        raise RuntimeError("the machine was taken away")

    monkeypatch.setattr(train_optimizer, "save_artifact", interrupted)
    assert train_optimizer.main() == 2
    assert (tmp_path / "output" / "failure").read_text() == "the machine was taken away"
    monkeypatch.setattr(train_optimizer, "save_artifact", save)
    assert train_optimizer.main() == 0
    said = capsys.readouterr().out
    assert "continuing at outer step 2" in said and f"copied to {tmp_path / 'model'}" in said
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"optimizer.safetensors", "config.yaml"}


@pytest.fixture
def tree(tmp_path):
    """The folders of a job, and what starts it there."""
    pytest.importorskip(
        "sagemaker_training",
        reason="the toolkit is not installed: pip install 'learned-opt[sagemaker]' (needs a compiler)",
    )
    base = tmp_path / "ml"
    for name in ("input/config", "input/data/images", "code", "model", "output", "checkpoints"):
        (base / name).mkdir(parents=True)
    (base / "code" / "train_optimizer.py").write_text((torchrun.ROOT / "train_optimizer.py").read_text())
    resources = {"current_host": "localhost", "hosts": ["localhost"], "network_interface_name": "lo"}
    resources |= {"current_instance_type": "ml.c7i.large", "current_group_name": "g"}
    resources |= {
        "instance_groups": [{"instance_group_name": "g", "instance_type": "ml.c7i.large", "hosts": ["localhost"]}]
    }
    (base / "input/config/resourceconfig.json").write_text(json.dumps(resources))
    (base / "input/config/inputdataconfig.json").write_text(json.dumps({"images": {"TrainingInputMode": "File"}}))

    def start(**hyperparameters):
        given = {"sagemaker_program": "train_optimizer.py", "sagemaker_submit_directory": str(base / "code")}
        given = {name: json.dumps(value) for name, value in {**given, **hyperparameters}.items()}
        (base / "input/config/hyperparameters.json").write_text(json.dumps(given))
        done = subprocess.run(
            [sys.executable, "-m", "sagemaker_training.cli.train"],
            env=torchrun.environment(
                SAGEMAKER_BASE_DIR=str(base),
                PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            ),
            capture_output=True,
            text=True,
            timeout=torchrun.TIMEOUT,
            check=False,
            cwd=base,
        )
        return done

    return base, start


def test_the_services_own_toolkit_runs_the_script(tree):
    base, start = tree
    settings = {**SETTINGS, "families": "{digits: {name: image_mlp, hidden: [2], batch_size: 4}}"}
    done = start(**settings, **{"test-families": "{digits: {name: image_mlp, hidden: [3], batch_size: 4}}"})
    assert done.returncode == 0, done.stdout + done.stderr
    model = base / "model"
    assert load_artifact(model / "optimizer.safetensors").provenance["outer_steps"] > 0
    assert (model / "results.json").is_file() and (model / "curves.png").is_file()
    written = load(base / "checkpoints" / "config.yaml")
    assert written.trainer.outer_steps == 4 and not written.trainer.horizons.random_offsets
    assert written.baselines == ("adam",)
    assert CheckpointFolder(base / "checkpoints" / "checkpoints").load_latest()["outer_step"] == 4
    assert not (base / "output" / "failure").exists()
    # A job that fails says why; the toolkit leaves what the script wrote as it is.
    done = start(**{**settings, "families": "{x: {name: no_such}}"})
    assert done.returncode != 0
    assert (base / "output" / "failure").read_text().startswith("unknown task family 'no_such'")
