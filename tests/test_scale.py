"""The training script under torchrun: faults, refusals, and one voice."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
import torchrun
import yaml

import train_optimizer
from learned_opt.artifact import load_artifact
from learned_opt.checkpoints import CheckpointFolder

SCRIPT = torchrun.ROOT / "train_optimizer.py"
SMALL = {
    "rule": "compact",
    "families": {"normal": {"name": "quadratic", "dim": 3}},
    "trainer": {
        "outer_steps": 60,
        "num_particles": 3,
        "truncation": 5,
        "horizons": {"kind": "log_uniform", "shortest": 5, "longest": 12},
        "validation_every": 10,
        "validation_tasks": 3,
    },
    "baselines": [],
    "checkpoint_every": 3,
    "keep_checkpoints": 100,
    "tracking": {"mode": "offline"},
}
# Outer steps that take a while, so that a process can be stopped between them.
SLOW = """
import os, sys, time
import train_optimizer
from learned_opt.meta_trainer import MetaTrainer
step = MetaTrainer.step

def slow(self):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "2":
        time.sleep(0.05)
    return step(self)

MetaTrainer.step = slow
sys.exit(train_optimizer.main())
"""
# The ranks of this program are of different opinions.
DIFFERENT = """
import os, sys
import train_optimizer
from learned_opt import run_folder
if os.environ["RANK"] == "1":
    sys.argv += ["--trainer.seed", "7", "--rule-settings", "{hidden_size: 3}"]
    run_folder.__version__ = "0.0.1"
sys.exit(train_optimizer.main())
"""
UNTRACKED = ["--wandb", "disabled"]
ENDLESS = ["--trainer.outer-steps", "100000", "--trainer.validation-every", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("scale")
    (made / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (made / "slow.py").write_text(SLOW)
    (made / "different.py").write_text(DIFFERENT)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder):
    done = torchrun.run(torchrun.command(2, SCRIPT, "--config", "small.yaml"), folder, anew=True)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "small", done


def newest(run):
    latest = CheckpointFolder(run / "checkpoints").latest()
    return -1 if latest is None else int(latest.name.split("-")[1].split(".")[0])


def final_state(run):
    return CheckpointFolder(run / "checkpoints").load_latest()


def assert_same_state(run, other):
    got, want = final_state(run), final_state(other)
    assert got["outer_step"] == want["outer_step"] and got["totals"] == want["totals"]
    for name, value in want["theta"].items():
        assert torch.equal(got["theta"][name], value)
    for name, value in want["estimators"]["normal"].items():
        assert torch.equal(got["estimators"]["normal"][name], value) if name == "params" else True
    assert load_artifact(run / "optimizer.safetensors").hash == load_artifact(other / "optimizer.safetensors").hash


def in_process(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["train_optimizer.py", *arguments])
    return train_optimizer.main()


def test_the_first_rank_alone_speaks_and_writes(undisturbed):
    run, done = undisturbed
    assert done.stdout.count("run folder:") == 1 and done.stdout.count("outer step 60/60") == 1
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert [path.name for path in run.parent.iterdir()] == ["small"]


def test_as_one_process(undisturbed, folder, monkeypatch):
    run, _ = undisturbed
    assert in_process(monkeypatch, folder, "--config", "small.yaml", "--run-dir", "alone", *UNTRACKED) == 0
    alone, two = final_state(folder / "alone"), final_state(run)
    assert alone["totals"] == two["totals"]
    for name, value in alone["theta"].items():
        assert torch.allclose(two["theta"][name], value, rtol=1e-4, atol=1e-5)  # after 60 steps in single precision


def test_a_killed_rank_is_started_again_and_nothing_is_lost(undisturbed, folder):
    command = torchrun.command(2, "slow.py", "--config", "small.yaml", *UNTRACKED, restarts=2)
    with torchrun.started(command, folder) as process:
        run = folder / "runs" / "small-2"
        torchrun.wait_until(lambda: (run / "config.yaml").exists() or process.poll() is not None, "the folder")
        os.kill(torchrun.ranks_of(process.pid)[0], signal.SIGKILL)  # before the first checkpoint
        torchrun.wait_until(lambda: newest(run) >= 9 or process.poll() is not None, "a checkpoint")
        ranks = torchrun.ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        out, err = process.communicate(timeout=torchrun.TIMEOUT)
    assert process.returncode == 0, err
    assert set(re.findall(r"run folder: (\S+)", out)) == {"runs/small-2"}, "a restart made a folder of its own"
    steps = re.findall(r"continuing at outer step (\d+)", out)
    assert steps and 9 <= int(steps[-1]) < 60
    assert_same_state(run, undisturbed[0])


def test_a_signal_stops_all_ranks_after_the_same_step_and_one_process_goes_on(undisturbed, folder, monkeypatch):
    arguments = ["--config", "small.yaml", "--run-dir", "stopped", *UNTRACKED]
    with torchrun.started(torchrun.command(2, "slow.py", *arguments), folder) as it:
        run = folder / "stopped"
        torchrun.wait_until(lambda: newest(run) >= 3 or it.poll() is not None, "a checkpoint")
        ranks = torchrun.ranks_of(it.pid)
        it.send_signal(signal.SIGTERM)
        out, err = it.communicate(timeout=torchrun.TIMEOUT)
    assert it.returncode != 0 and "continue with: python train_optimizer.py --resume stopped" in out, err
    stopped_at = int(out.split("stopped at outer step ")[1].split(";")[0])
    assert stopped_at == newest(run) < 60
    torchrun.wait_until(lambda: not any(map(torchrun.is_running, ranks)), "the ranks to end", 30)
    assert in_process(monkeypatch, folder, "--resume", "stopped", *UNTRACKED) == 0
    for name, value in final_state(undisturbed[0])["theta"].items():
        assert torch.allclose(final_state(run)["theta"][name], value, rtol=1e-4, atol=1e-5)


def test_ranks_that_differ_are_refused(folder):
    began = time.monotonic()
    done = torchrun.run(torchrun.command(2, "different.py", "--config", "small.yaml", "--run-dir", "no"), folder)
    assert done.returncode != 0 and time.monotonic() - began < 120
    message = done.stderr[: done.stderr.index("torch/distributed")]
    assert message.count("error:") == 1, message
    assert "error: the ranks of this run differ from rank 0; give all the same settings and versions:" in message
    assert "rank 1: settings.trainer.seed: 0 -> 7" in message
    assert "rank 1: settings.rule_settings.hidden_size: None -> 3" in message
    assert re.search(r"rank 1: versions\.learned_opt: \S+ -> 0\.0\.1", message)
    assert not (folder / "no").exists()


def test_nobody_stays_when_torchrun_is_killed_and_two_runs_do_not_share_a_folder(folder):
    arguments = ["--config", "small.yaml", "--run-dir", "orphans", *UNTRACKED, *ENDLESS]
    with torchrun.started(torchrun.command(2, SCRIPT, *arguments), folder) as first:
        torchrun.wait_until(lambda: newest(folder / "orphans") >= 3 or first.poll() is not None, "a checkpoint")
        ranks = torchrun.ranks_of(first.pid)
        done = torchrun.run(torchrun.command(2, SCRIPT, *arguments, "--auto-resume"), folder)
        assert "error: another process is running in orphans; wait for it or stop it" in done.stderr
        assert all(map(torchrun.is_running, ranks))
        first.kill()
        torchrun.wait_until(lambda: not any(map(torchrun.is_running, ranks)), "the ranks to end", 60)
    step = newest(folder / "orphans")
    assert final_state(folder / "orphans")["outer_step"] == step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_leaves_nobody(folder, number):
    command = torchrun.command(2, SCRIPT, "--config", "small.yaml", "--run-dir", "start")
    with torchrun.started(command, folder, anew=True) as it:
        torchrun.wait_until(lambda: len(torchrun.ranks_of(it.pid)) == 2, "the ranks")
        ranks = torchrun.ranks_of(it.pid)
        it.send_signal(number)
        it.communicate(timeout=torchrun.TIMEOUT)
    assert it.returncode != 0
    torchrun.wait_until(lambda: not any(map(torchrun.is_running, ranks)), "the ranks to end", 30)
