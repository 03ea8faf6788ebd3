"""What the tracker records with the real client, read back from wandb's own files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import fork_server
import pytest

ROOT = Path(__file__).resolve().parent.parent


def clean_environment(home: Path) -> dict[str, str]:
    """The environment of a machine where wandb was never used."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    return {**kept, "HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_script(script: str, folder: Path, *, expect: int = 0) -> dict[str, Any]:
    """Run a script where nobody can answer a question; returns the JSON of its last line, and "stderr", "stdout"."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    done = fork_server.run("-c", script, cwd=folder, env=clean_environment(home))
    assert done.returncode == expect, done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1]) if lines else {}
    return {**result, "stderr": done.stderr, "stdout": "\n".join(lines[:-1])}


def records_of(path: Path) -> list[Any]:
    """The records of a .wandb file: 7 bytes of header, then a LevelDB log of protocol buffers in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, block, header = path.read_bytes(), 32768, 7
    assert data[:4] == b":W&B"
    records, part, at = [], b"", 7
    while at + header <= len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        assert kind in (1, 2, 3, 4), f"no record at byte {at}"
        chunk = data[at + header : at + header + size]
        part = chunk if kind in (1, 2) else part + chunk
        at += header + size
        if kind in (1, 4):
            if at > len(data):  # cut off by a kill
                break
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
    return records


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def values_of(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    return [values_of(entry.item) for entry in of_kind(records, "history")]


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------- what an offline run records

RECORD = """
import json, signal, sys, time
from pathlib import Path
from learned_opt.tracking import Tracker, TrackingConfig

before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
run_dir, file = Path("runs/first"), Path("optimizer.safetensors")
run_config = {"trainer": {"learning_rate": 0.25, "horizons": (20, 40)}, "folder": Path("some/where"), "note": None}

def start(resume):
    began = time.monotonic()
    tracker = Tracker(TrackingConfig(tags=("a", "b"), group="g"), run_dir, run_config, resume=resume)
    return tracker, time.monotonic() - began

tracker, seconds = start(False)
unchanged = before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
for step in range(1, 6):
    norm = float("inf" if step == 2 else "nan")
    tracker.log({"meta_loss": 1 / step, "meta_loss/digits": -step, "grad_norm": norm}, step)
began = time.monotonic()
for step in range(6, 206):
    tracker.log({"meta_loss": 1 / step}, step)
per_log = (time.monotonic() - began) / 200
tracker.log_table("results", ["optimizer", "loss"], [("adam", 0.5), ("learned", None), (3, "text")])
tracker.log_image("curves", Path("curves.png"))
file.write_bytes(b"exported")
tracker.log_artifact(file, name="optimizer compact", metadata={"families": {"digits": {"hidden": (20,)}}})
file.write_bytes(b"overwritten")
tracker.log_summary({"best_step": 150, "best_score": -1.5})
first = {"id": tracker.run_id, "directory": str(tracker.directory), "mode": tracker.mode, "url": tracker.url}
tracker.finish()
tracker.finish()
tracker.log({"meta_loss": 1.0}, 999)

tracker, _ = start(True)
second = {"id": tracker.run_id, "directory": str(tracker.directory), "mode": tracker.mode}
for step in range(100, 103):
    tracker.log({"meta_loss": 100.0}, step)
tracker.finish(exit_code=3)

# As `wandb agent` starts a trial; wandb reads the environment anew after a teardown.
import os, wandb
wandb.teardown()
Path("parameters.yaml").write_text("wandb_version: 1\\ntrainer.learning_rate:\\n  value: 0.25\\n")
os.environ |= {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial7", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team"}
os.environ |= {"WANDB_SWEEP_PARAM_PATH": "parameters.yaml"}
tracker = Tracker(TrackingConfig(), Path("runs/trial"), run_config)
tracker.log({"validation": 0.25}, 1)
trial = {"id": tracker.run_id, "directory": str(tracker.directory)}
tracker.finish()
result = {"first": first, "second": second, "trial": trial}
print(json.dumps({**result, "seconds": seconds, "per_log": per_log, "unchanged": unchanged}))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recorded")
    from PIL import Image

    Image.new("RGB", (8, 4), (250, 0, 0)).save(folder / "curves.png")
    result = run_script(RECORD, folder)
    for part in ("first", "second", "trial"):
        directory = Path(result[part]["directory"])
        (file,) = directory.glob("*.wandb")
        result[part] |= {"path": directory, "records": records_of(file)}
    return {**result, "folder": folder}


def test_without_a_login_auto_records_offline_quickly_and_in_silence(recorded):
    assert recorded["first"]["mode"] == "offline" and recorded["first"]["url"] is None
    assert recorded["stdout"] == "" and recorded["stderr"] == ""
    # Usually below 1.5 s and 0.6 ms; the bounds leave room for a busy machine.
    assert recorded["seconds"] < 10 and recorded["per_log"] < 0.02


def test_the_signal_handlers_are_left_alone(recorded):
    assert recorded["unchanged"] is True


def test_everything_lies_under_the_run_folder(recorded):
    assert files_under(recorded["folder"] / "home") == []
    assert {path.name for path in (recorded["folder"] / "runs" / "first").iterdir()} == {"wandb", "wandb_id.txt"}
    inputs = {"curves.png", "optimizer.safetensors", "parameters.yaml"}
    assert {path.name for path in recorded["folder"].iterdir()} == {"home", "runs"} | inputs


def test_the_configuration_is_recorded_as_plain_values(recorded):
    (run,) = of_kind(recorded["first"]["records"], "run")
    config = values_of(run.config.update)
    assert config["trainer"] == {"learning_rate": 0.25, "horizons": [20, 40]}
    assert config["folder"] == str(Path("some/where")) and config["note"] is None
    assert (run.project, run.display_name, list(run.tags), run.run_group) == ("learned-opt", "first", ["a", "b"], "g")


def test_nothing_about_the_machine_or_the_code_is_recorded(recorded):
    records = recorded["first"]["records"]
    assert not of_kind(records, "stats") and not of_kind(records, "output_raw") and not of_kind(records, "environment")
    names = files_under(recorded["first"]["path"] / "files")
    assert [name for name in names if not name.startswith("media")] == []
    (run,) = of_kind(records, "run")
    assert not run.HasField("git")


def test_every_outer_step_is_recorded_with_its_metrics(recorded):
    history = [entry for entry in history_of(recorded["first"]["records"]) if "meta_loss" in entry]
    assert [entry["outer_step"] for entry in history] == list(range(1, 206))
    assert [entry["meta_loss"] for entry in history] == [1 / step for step in range(1, 206)]
    assert [entry["meta_loss/digits"] for entry in history[:5]] == [-1, -2, -3, -4, -5]
    # Not finite is not the same as missing.
    assert history[1]["grad_norm"] in (float("inf"), "Infinity")
    assert str(history[0]["grad_norm"]).lower() == "nan"


def test_metrics_are_plotted_over_the_outer_step(recorded):
    for part in ("first", "second"):
        metrics = of_kind(recorded[part]["records"], "metric")
        assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == ["outer_step"]


def test_the_table_is_recorded(recorded):
    (name,) = (recorded["first"]["path"] / "files" / "media" / "table").iterdir()
    table = json.loads(name.read_text())
    assert table["columns"] == ["optimizer", "loss"]
    assert table["data"] == [["adam", 0.5], ["learned", None], [3, "text"]]
    (entry,) = [entry for entry in history_of(recorded["first"]["records"]) if "results/path" in entry]
    assert entry["outer_step"] == 205 and entry["results/nrows"] == 3


def test_the_picture_is_recorded(recorded):
    (name,) = (recorded["first"]["path"] / "files" / "media" / "images").iterdir()
    assert name.read_bytes() == (recorded["folder"] / "curves.png").read_bytes()
    (entry,) = [entry for entry in history_of(recorded["first"]["records"]) if "curves/path" in entry]
    assert (entry["curves/width"], entry["curves/height"]) == (8, 4)


def test_the_exported_file_is_recorded_with_its_hash(recorded):
    (artifact,) = [a for a in of_kind(recorded["first"]["records"], "artifact") if a.type == "optimizer"]
    assert artifact.name == "optimizer-compact"
    assert json.loads(artifact.metadata) == {
        "families": {"digits": {"hidden": [20]}},
        "sha256": hashlib.sha256(b"exported").hexdigest(),
        "num_bytes": 8,
    }
    (entry,) = artifact.manifest.contents
    assert entry.path == "optimizer.safetensors" and entry.size == 8
    # What will be uploaded is what was recorded, although the file has changed since, and it lies in the run folder.
    assert Path(entry.local_path).read_bytes() == b"exported"
    assert Path(entry.local_path).is_relative_to((recorded["folder"] / "runs" / "first" / "wandb").resolve())


def test_the_summary_and_the_exit_code_are_recorded(recorded):
    summary: dict[str, Any] = {}
    for update in of_kind(recorded["first"]["records"], "summary"):
        summary |= values_of(update.update)
    assert summary["best_step"] == 150 and summary["best_score"] == -1.5
    assert summary["meta_loss"] == 1 / 205 and summary["outer_step"] == 205
    assert [e.exit_code for part in ("first", "second") for e in of_kind(recorded[part]["records"], "exit")] == [0, 3]


def test_a_resumed_run_continues_the_same_wandb_run(recorded):
    first, second = recorded["first"], recorded["second"]
    stored = (recorded["folder"] / "runs" / "first" / "wandb_id.txt").read_text()
    assert re.fullmatch(r"[0-9a-f]{8}\n", stored)
    assert first["id"] == second["id"] == stored.strip()
    assert first["path"] != second["path"]  # offline, each start has a folder; they share the id
    (run,) = of_kind(second["records"], "run")
    assert run.run_id == first["id"] and run.resume
    history = history_of(second["records"])
    assert [(entry["outer_step"], entry["meta_loss"]) for entry in history] == [
        (100, 100.0),
        (101, 100.0),
        (102, 100.0),
    ]


# --------------------------------------------------------------------------- a service or a process that dies

BROKEN = """
import json, os, signal, time, warnings
from pathlib import Path
from learned_opt.tracking import Tracker, TrackingConfig

tracker = Tracker(TrackingConfig(mode="offline"), Path("run"), {})
tracker.log({"meta_loss": 1.0}, 1)
for task in Path(f"/proc/{os.getpid()}/task").iterdir():
    for child in (task / "children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
began = time.monotonic()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(300):
        tracker.log({"meta_loss": step}, step)
        time.sleep(0.002)
    tracker.log_summary({"a": 1})
    tracker.finish()
print(json.dumps({
    "warnings": [str(w.message) for w in caught], "mode": tracker.mode, "seconds": time.monotonic() - began
}))
"""

KILLED = """
import os, signal, time
from pathlib import Path
from learned_opt.tracking import Tracker, TrackingConfig

tracker = Tracker(TrackingConfig(mode="offline"), Path("run"), {})
for step in range(100):
    tracker.log({"meta_loss": step}, step)
time.sleep(1.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the service's process in /proc")
def test_a_service_that_dies_costs_one_warning(tmp_path):
    result = run_script(BROKEN, tmp_path)
    (warning,) = result["warnings"]
    assert warning.startswith("wandb tracking is off from here on, the run goes on: logging metrics failed (")
    assert f"what was recorded before is in {tmp_path.resolve() / 'run' / 'wandb'}" in warning
    assert result["mode"] == "disabled" and result["seconds"] < 10
    assert result["stderr"] == ""  # nor anything at the interpreter's exit


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_keeps_what_was_logged_a_second_ago(tmp_path):
    run_script(KILLED, tmp_path, expect=-signal.SIGKILL)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert [entry["outer_step"] for entry in history_of(records_of(file))] == list(range(100))
