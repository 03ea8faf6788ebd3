"""The training script as users run it: subprocesses that are killed, interrupted, resumed and given bad input."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fork_server
import pytest
import torch
import yaml

import train_optimizer
from learned_opt.artifact import load_artifact
from learned_opt.checkpoints import CheckpointFolder
from learned_opt.config import load

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "train_optimizer.py")

SMALL = {
    "rule": "compact",
    "families": {
        "normal": {"name": "quadratic", "dim": 3},
        "digits": {"name": "image_mlp", "hidden": [2], "batch_size": 4},
    },
    "trainer": {
        "outer_steps": 30,
        "num_particles": 3,
        "truncation": 5,
        "horizons": {"kind": "log_uniform", "shortest": 5, "longest": 12},
        "validation_every": 10,
        "validation_tasks": 2,
    },
    "baselines": [],
    "checkpoint_every": 3,
    "tracking": {"mode": "disabled"},
}


def config_file(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return str(path)


def run(*arguments, **kwargs):
    """The command as a user starts it."""
    kwargs = {"timeout": 120, "env": {**os.environ, "COLUMNS": "120"}, **kwargs}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


def start(*arguments):
    """The command in a process of its own that need not import torch first."""
    return fork_server.Program([SCRIPT, *arguments], cwd=ROOT, env={**os.environ, "COLUMNS": "120"})


def wait_for_step(folder, step, process):
    """Until the run's newest checkpoint is of this outer step or a later one, or the process has ended."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        latest = CheckpointFolder(folder / "checkpoints").latest()
        if latest is not None and int(latest.name.split("-")[1].split(".")[0]) >= step:
            return
        time.sleep(0.005)


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Runs the command within this process, which spares starting one; gives its status and what it said."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_optimizer.py", *arguments])
        status = train_optimizer.main()
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("--config", config_file(folder), "--run-dir", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def hash_of(folder):
    return load_artifact(folder / "optimizer.safetensors").hash


def final_state(folder):
    return CheckpointFolder(folder / "checkpoints").load_latest()


def test_a_run_leaves_what_it_promises(undisturbed):
    assert load(undisturbed / "config.yaml").rule == "compact"
    artifact = load_artifact(undisturbed / "optimizer.safetensors")
    state = final_state(undisturbed)
    assert state["outer_step"] == 30
    assert artifact.provenance["families"] == SMALL["families"]
    for name, value in artifact.theta.items():
        assert torch.equal(value, state["best_theta"][name])
    assert len(list((undisturbed / "checkpoints").glob("step-*.pt"))) == 3
    assert len(list((undisturbed / "checkpoints").glob("best-*.pt"))) == 1


def test_the_written_config_reproduces_the_run(in_process, undisturbed, tmp_path):
    status, said = in_process("--config", str(undisturbed / "config.yaml"), "--run-dir", str(tmp_path / "again"))
    assert status == 0, said
    assert hash_of(tmp_path / "again") == hash_of(undisturbed)


def test_killed_at_random_and_resumed_ends_with_the_same_bits(undisturbed, tmp_path):
    moments = random.Random(0)
    folder = tmp_path / "run"
    arguments = ["--config", config_file(tmp_path), "--run-dir", str(folder)]
    kills = 0
    for step in (3, 12, 21):
        process = start(*arguments)
        wait_for_step(folder, step, process)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate(60)
        kills += process.returncode == -signal.SIGKILL
        arguments = ["--resume", str(folder)]
    process = start(*arguments)
    assert not process.communicate(120)[1] and process.returncode == 0
    assert kills >= 2
    want, got = final_state(undisturbed), final_state(folder)
    for name, value in want["theta"].items():
        assert torch.equal(value, got["theta"][name])
    for label, particles in want["estimators"].items():
        assert torch.equal(particles["params"], got["estimators"][label]["params"])
        assert particles["seeds"] == got["estimators"][label]["seeds"]
    assert hash_of(folder) == hash_of(undisturbed)


def test_killed_before_the_first_checkpoint_it_starts_over(in_process, undisturbed, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(undisturbed / "config.yaml", folder)
    status, said = in_process("--resume", str(folder))
    assert status == 0, said
    assert hash_of(folder) == hash_of(undisturbed)


def test_a_signal_before_the_first_step_saves_too(in_process, undisturbed, monkeypatch, tmp_path):
    enter = train_optimizer.StopSignals.__enter__

    def at_once(self):
        entered = enter(self)
        self.received = signal.SIGTERM
        return entered

    folder = tmp_path / "run"
    monkeypatch.setattr(train_optimizer.StopSignals, "__enter__", at_once)
    status, said = in_process("--config", config_file(tmp_path), "--run-dir", str(folder))
    assert status == 128 + signal.SIGTERM, said
    assert "stopped at outer step 0" in said and final_state(folder)["outer_step"] == 0
    monkeypatch.undo()
    status, said = in_process("--resume", str(folder))
    assert status == 0, said
    assert hash_of(folder) == hash_of(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(in_process, undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    process = start("--config", config_file(tmp_path), "--run-dir", str(folder))
    wait_for_step(folder, 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"continue with: python train_optimizer.py --resume {folder}" in out
    stopped_at = int(out.split("stopped at outer step ")[1].split(";")[0])
    assert final_state(folder)["outer_step"] == stopped_at
    status, said = in_process("--resume", str(folder))
    assert status == 0, said
    assert hash_of(folder) == hash_of(undisturbed)


def test_a_damaged_checkpoint_is_an_error_and_falls_back_when_asked(in_process, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "optimizer.safetensors").unlink()
    newest = CheckpointFolder(folder / "checkpoints").latest()
    newest.write_bytes(newest.read_bytes()[:-100])
    status, said = in_process("--resume", str(folder))
    assert status == 2
    assert "is damaged" in said and "--fall-back" in said
    status, said = in_process("--resume", str(folder), "--fall-back")
    assert status == 0, said
    assert hash_of(folder) == hash_of(undisturbed)


def test_run_folders_are_numbered_when_none_is_named(in_process, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = config_file(tmp_path, trainer={**SMALL["trainer"], "outer_steps": 1})
    for name in ("small", "small-2"):
        status, said = in_process("--config", path)
        assert status == 0, said
        assert f"run folder: runs/{name}\n" in said
        assert (tmp_path / "runs" / name / "optimizer.safetensors").is_file()


def test_diagnostics_are_logged_and_change_nothing(in_process, undisturbed, monkeypatch, tmp_path):
    logged = {}
    monkeypatch.setattr(train_optimizer.Tracker, "log", lambda self, metrics, step: logged.update({step: metrics}))
    path = config_file(tmp_path, diagnose_every=10)
    status, said = in_process("--config", path, "--run-dir", str(tmp_path / "run"))
    assert status == 0, said
    at = [step for step, metrics in logged.items() if "diagnostics/backprop/5/signal_to_noise" in metrics]
    assert at == [10, 20, 30]
    assert logged[10]["diagnostics/backprop/5/signal_to_noise"] >= 0
    assert hash_of(tmp_path / "run") == hash_of(undisturbed)


def test_a_run_may_start_from_an_exported_theta(in_process, undisturbed, monkeypatch, tmp_path):
    exported = str(undisturbed / "optimizer.safetensors")
    settings = load(
        Path(config_file(tmp_path, start_from=exported, estimator="backprop", estimator_settings={"order": 2}))
    )
    trainer = train_optimizer.assemble(settings)
    for name, value in load_artifact(exported).theta.items():
        assert torch.equal(trainer.theta[name], value)
    status, said = in_process(
        "--config", config_file(tmp_path, start_from=exported, rule="l2l"), "--run-dir", str(tmp_path / "run")
    )
    assert status == 2 and f"start_from names {exported}, whose rule is lstm with" in said


def test_the_exported_rule_may_have_other_settings_than_the_trained_one(in_process, undisturbed, tmp_path):
    path = config_file(tmp_path, export_settings={"output_scale": 0.5})
    status, said = in_process("--config", path, "--run-dir", str(tmp_path / "run"))
    assert status == 0, said
    plain, changed = (load_artifact(folder / "optimizer.safetensors") for folder in (undisturbed, tmp_path / "run"))
    assert changed.rule.settings() == {**plain.rule.settings(), "output_scale": 0.5}
    assert all(torch.equal(value, changed.theta[name]) for name, value in plain.theta.items())
    assert changed.provenance["trained_with"] == {"output_scale": plain.rule.settings()["output_scale"]}
    assert plain.provenance["trained_with"] == {} and changed.hash != plain.hash
    exported = str(tmp_path / "run" / "optimizer.safetensors")
    again = load(Path(config_file(tmp_path, export_settings={"output_scale": 0.5}, start_from=exported)))
    assert torch.equal(train_optimizer.assemble(again).theta["output.bias"], changed.theta["output.bias"])


def test_what_lies_between_the_start_and_the_trained_theta_may_be_exported(in_process, undisturbed, tmp_path):
    whole = load_artifact(undisturbed / "optimizer.safetensors")
    path = config_file(tmp_path, export_share=0.25)
    folder = tmp_path / "run"
    status, said = in_process("--config", path, "--run-dir", str(folder))
    assert status == 0, said
    part = load_artifact(folder / "optimizer.safetensors")
    start = train_optimizer.assemble(load(Path(path))).theta
    assert part.provenance["export_share"] == 0.25 and whole.provenance["export_share"] == 1.0
    moved = 0.0
    for name, value in whole.theta.items():
        torch.testing.assert_close(part.theta[name], 0.75 * start[name] + 0.25 * value)
        moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-4
    # The same after a stop: where training began is not where it went on.
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    (stopped / "optimizer.safetensors").unlink()
    for late in (27, 30):
        for file in (stopped / "checkpoints").glob(f"*-{late:08d}.*"):
            file.unlink()
    status, said = in_process("--resume", str(stopped))
    assert status == 0 and "continuing at outer step 24" in said, said
    again = load_artifact(stopped / "optimizer.safetensors")
    assert all(torch.equal(value, again.theta[name]) for name, value in part.theta.items())


def test_evaluation_writes_table_results_and_picture(in_process, tmp_path):
    small = {**SMALL["trainer"], "outer_steps": 2}
    evaluation = {"horizon": 6, "num_tasks": 3, "seeds": [0, 1], "num_validation_tasks": 2, "num_resamples": 50}
    path = config_file(tmp_path, trainer=small, baselines=["sgd", "adam"], evaluation=evaluation)
    unseen = "{normal: {name: quadratic, dim: 3}, unseen: {name: quadratic, dim: 4}}"
    status, said = in_process("--config", path, "--run-dir", str(tmp_path / "run"), "--test-families", unseen)
    assert status == 0, said
    assert "final / adam" in said and "unseen" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {(r["family"], r["optimizer"]) for r in results["results"]} == {
        (f, o) for f in ("normal", "unseen") for o in ("learned", "sgd", "adam")
    }
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "digit"], "unknown preset 'digit'; did you mean digits?"),
        (["--rule", "compac"], "unknown update rule 'compac'; did you mean compact?"),
        (
            ["--export-settings", "{hidden_size: 3}"],
            "export_settings must leave theta as it is trained; with {'hidden_s",
        ),
        (["--export-settings", "{epsilon: 1}"], "rule 'compact' has no setting 'epsilon'"),
        (["--estimator", "backprob"], "unknown estimator 'backprob'; did you mean backprop?"),
        (["--families", "{a: {name: image_mpl}}"], "image_mlp"),
        (["--trainer.truncation", "200"], "truncation (200) must not exceed the longest horizon (100)"),
        (["--baselines", "adma"], "unknown baseline 'adma'; choose from"),
        (["--config", "no/such.yaml"], "cannot read the configuration file no/such.yaml: No such file or directory"),
        (["--resume", "no/such"], "no/such does not hold a run (no config.yaml in it)"),
        (["--device", "cuda:99"], "device"),
    ],
)
def test_bad_input_is_one_clear_line(in_process, tmp_path, arguments, message):
    status, err = in_process(*arguments, *([] if "--resume" in arguments else ["--run-dir", str(tmp_path / "run")]))
    assert status == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_run_folder_is_never_overwritten_or_mixed(in_process, undisturbed, tmp_path):
    status, err = in_process("--config", config_file(tmp_path), "--run-dir", str(undisturbed))
    assert status == 2 and f"already holds a run; continue it with --resume {undisturbed}" in err
    status, err = in_process("--resume", str(undisturbed), "--trainer.truncation", "4")
    assert status == 2
    assert "was started with other settings" in err and "trainer.truncation: 5 -> 4" in err


def test_a_full_disk_names_the_remedy_and_keeps_the_checkpoints(in_process, monkeypatch, tmp_path):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.safetensors")

    monkeypatch.setattr(train_optimizer, "save_artifact", full)
    path = config_file(tmp_path, trainer={**SMALL["trainer"], "outer_steps": 2})
    status, said = in_process("--config", path, "--run-dir", str(tmp_path / "run"))
    assert status == 2
    assert "No space left on device: 'optimizer.safetensors'; make room or check the permissions" in said
    monkeypatch.undo()
    status, said = in_process("--resume", str(tmp_path / "run"))
    assert status == 0, said
    assert hash_of(tmp_path / "run")


def test_an_interrupted_comparison_says_how_to_continue(in_process, monkeypatch, tmp_path):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_optimizer, "compare", interrupted)
    path = config_file(tmp_path, trainer={**SMALL["trainer"], "outer_steps": 1}, baselines=["adam"])
    status, said = in_process("--config", path, "--run-dir", str(tmp_path / "run"))
    assert status == 130
    assert f"interrupted; continue with: python train_optimizer.py --resume {tmp_path / 'run'}" in said
    assert (tmp_path / "run" / "optimizer.safetensors").is_file()


def test_missing_extras_are_named(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')")
    done = run("--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr.strip() == "error: meta-training needs tyro: pip install 'learned-opt[train]'"
