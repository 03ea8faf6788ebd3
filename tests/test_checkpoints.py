"""Checkpoints under damage, a full disk and malice: whole or not there, and said so."""

import errno
import hashlib
import os
import pickle
import shutil
import sys
import textwrap

import fork_server
import pytest
import torch

from learned_opt import files
from learned_opt.checkpoints import CheckpointError, CheckpointFolder, load_checkpoint


def state_of(step):
    return {
        "theta": {"w": torch.full((3,), float(step)), "b": torch.tensor(step, dtype=torch.int64)},
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "best_theta": None,
        "best_score": float("inf"),
        "outer_step": step,
        "label": "a",
        "lists": [1, 2, [3, True]],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and a == b


def names(folder):
    return sorted(path.name.split(".")[0] for path in folder.iterdir())


def filled(folder, steps=(10, 20, 30), **settings):
    checkpoints = CheckpointFolder(folder, **settings)
    for step in steps:
        checkpoints.save(state_of(step), step)
    return checkpoints


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_round_trip(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "made" / "on the way")
    path = checkpoints.save(state_of(7), 7)
    assert path.parent == tmp_path / "made" / "on the way"
    assert same(load_checkpoint(path), state_of(7))
    assert same(checkpoints.load_latest(), state_of(7))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"step-00000007.{digest[:16]}.pt"


def test_latest_is_by_step_and_old_ones_go(tmp_path):
    checkpoints = filled(tmp_path, steps=(9, 10, 99, 100, 1000), keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]
    assert checkpoints.latest().name.startswith("step-00001000")
    assert checkpoints.load_latest()["outer_step"] == 1000


def test_best_is_kept_beside_them_until_there_is_a_better_one(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    checkpoints.save(state_of(10), 10, best=True)
    for step in (20, 30):
        checkpoints.save(state_of(step), step)
    assert names(tmp_path) == ["best-00000010", "step-00000030"]
    assert load_checkpoint(checkpoints.best())["outer_step"] == 10
    checkpoints.save(state_of(40), 40, best=True)
    assert names(tmp_path) == ["best-00000040", "step-00000040"]


def test_saving_the_same_state_again_replaces_it(tmp_path):
    checkpoints = filled(tmp_path, steps=(10, 10, 10))
    assert names(tmp_path) == ["step-00000010"]
    changed = {**state_of(10), "label": "b"}
    checkpoints.save(changed, 10)
    assert names(tmp_path) == ["step-00000010"] and same(checkpoints.load_latest(), changed)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-00000001.pt").write_bytes(b"mine too")
    (tmp_path / "step-00000001.0123456789abcdef.pt.bak").write_bytes(b"and this")
    checkpoints = filled(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 4 and checkpoints.load_latest()["outer_step"] == 30


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        checkpoints = CheckpointFolder(folder)
        assert checkpoints.latest() is None and checkpoints.best() is None
        text = f"no checkpoint in {folder}; start a new run, or give the folder of one that was started"
        with pytest.raises(CheckpointError, match=text):
            checkpoints.load_latest()
        with pytest.raises(CheckpointError, match=text):
            checkpoints.load_latest(fall_back=True)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "emptied", "longer"])
def test_damage_is_noticed_and_the_one_before_is_used_on_request(tmp_path, damage):
    checkpoints = filled(tmp_path)
    path = checkpoints.latest()
    data = path.read_bytes()
    if damage == "flipped bit":
        flip_a_bit(path)
    else:
        path.write_bytes({"truncated": data[:-100], "emptied": b"", "longer": data + b"\0"}[damage])
    text = rf"the checkpoint {path} is damaged: its content \({path.stat().st_size} bytes\) does not have the hash"
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(path)
    hint = r"resume with --fall-back to continue from the one before it \(step-00000020\.[0-9a-f]{16}\.pt\)"
    with pytest.raises(CheckpointError, match=f"is damaged: .*; {hint}"):
        checkpoints.load_latest()
    assert same(checkpoints.load_latest(fall_back=True), state_of(20))


def test_every_bit_counts(tmp_path):
    path = filled(tmp_path).latest()
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        data = bytearray(whole)
        data[position] ^= 0x80
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)


def test_renamed(tmp_path):
    checkpoints = filled(tmp_path)
    path = checkpoints.latest()
    moved = path.rename(tmp_path / "step-00000030.0123456789abcdef.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(moved)
    other = moved.rename(tmp_path / "last.pt")
    text = rf"{other} is not named like a checkpoint \(step-<number>\.<hash>\.pt\)"
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(other)
    assert checkpoints.load_latest()["outer_step"] == 20


def test_all_damaged(tmp_path):
    checkpoints = filled(tmp_path)
    for path in tmp_path.iterdir():
        flip_a_bit(path)
    with pytest.raises(CheckpointError, match=f"all 3 checkpoints in {tmp_path} are damaged; start a new run"):
        checkpoints.load_latest(fall_back=True)


def test_the_only_one_damaged(tmp_path):
    checkpoints = filled(tmp_path, steps=(10,))
    flip_a_bit(checkpoints.latest())
    with pytest.raises(CheckpointError, match="is damaged: .*; no other is left"):
        checkpoints.load_latest()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_after_falling_back_what_is_written_counts_as_the_newest(tmp_path, keep):
    """The damaged ones lie at later steps: they must neither be taken for the newest nor push the new ones out."""
    checkpoints = filled(tmp_path, keep=3)
    for path in sorted(tmp_path.iterdir())[1:]:
        flip_a_bit(path)
    checkpoints = CheckpointFolder(tmp_path, keep=keep)
    assert checkpoints.load_latest(fall_back=True)["outer_step"] == 10
    checkpoints.save(state_of(15), 15, best=True)
    assert checkpoints.load_latest()["outer_step"] == 15
    assert load_checkpoint(checkpoints.best())["outer_step"] == 15
    assert names(tmp_path) == ["best-00000015", *["step-00000010"] * (keep > 1), "step-00000015"]
    checkpoints.save(state_of(20), 20)
    assert checkpoints.load_latest()["outer_step"] == 20


def test_missing_file(tmp_path):
    path = tmp_path / "step-00000001.0123456789abcdef.pt"
    with pytest.raises(CheckpointError, match=f"cannot read the checkpoint {path}: No such file or directory"):
        load_checkpoint(path)


class _Trap:
    """Runs a command when unpickled by a loader that allows it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare pickle", "torch file"])
def test_code_is_never_run(tmp_path, wrapped):
    marker = tmp_path / "executed"
    source = tmp_path / "source"
    if wrapped:
        torch.save({"theta": _Trap(marker)}, source)
    else:
        source.write_bytes(pickle.dumps({"theta": _Trap(marker)}))
    with source.open("rb") as file:  # The trap does work where it is sprung.
        torch.load(file, weights_only=False) if wrapped else pickle.load(file)
    assert marker.is_dir()
    marker.rmdir()
    data = source.read_bytes()
    path = tmp_path / f"step-00000001.{hashlib.sha256(data).hexdigest()[:16]}.pt"
    shutil.copy(source, path)
    with pytest.raises(CheckpointError, match=f"the checkpoint {path} cannot be read: "):
        load_checkpoint(path)
    assert not marker.exists()


def test_not_a_torch_file(tmp_path):
    data = b"hello"
    path = tmp_path / f"step-00000001.{hashlib.sha256(data).hexdigest()[:16]}.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read: "):
        load_checkpoint(path)


def failing(error_number):
    def fail(*_args, **_settings):
        raise OSError(error_number, os.strerror(error_number))

    return fail


# Where a write can fail: making the file, forcing it to the disk, putting it in place.
@pytest.mark.parametrize("function", ["tempfile.mkstemp", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(tmp_path, monkeypatch, function, error_number):
    checkpoints = filled(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        files.tempfile if "mkstemp" in function else files.os, function.split(".")[1], failing(error_number)
    )
    text = (
        rf"cannot write the checkpoint {tmp_path}/step-00000040\.[0-9a-f]{{16}}\.pt: {os.strerror(error_number)}; free "
        "some space or make the folder writable, then resume: the checkpoints before it are untouched"
    )
    with pytest.raises(CheckpointError, match=text):
        checkpoints.save(state_of(40), 40, best=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(checkpoints.load_latest(), state_of(30))


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)
    before = names(tmp_path)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(state_of(40), 40)
    assert names(tmp_path) == before


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint .*File exists"):
        CheckpointFolder(tmp_path / "taken").save(state_of(1), 1)


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on file sizes is POSIX")
def test_a_disk_that_fills_up_for_real(tmp_path):
    """The kernel cuts the write short half way, as a full disk does."""
    filled(tmp_path)
    before = names(tmp_path)
    program = f"""
        import resource, signal, torch
        from pathlib import Path
        from learned_opt.checkpoints import CheckpointError, CheckpointFolder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            CheckpointFolder(Path({str(tmp_path)!r})).save({{"theta": torch.zeros(100_000)}}, 40)
        except CheckpointError as error:
            print(error)
    """
    done = fork_server.run("-c", textwrap.dedent(program))
    assert done.returncode == 0, done.stderr
    assert "cannot write the checkpoint" in done.stdout and os.strerror(errno.EFBIG) in done.stdout
    assert names(tmp_path) == before
    assert same(CheckpointFolder(tmp_path).load_latest(), state_of(30))


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "any").write_text("")
    path = filled(tmp_path / "checkpoints", steps=(1,)).latest()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_write_atomically_replaces_the_whole_content(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, b"a long first content")
    files.write_atomically(path, b"short")
    assert path.read_bytes() == b"short" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        CheckpointFolder(tmp_path, keep=0)
