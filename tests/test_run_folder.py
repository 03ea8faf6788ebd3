"""Run folders under several processes at once: every run gets one of its own, and a launch finds its own again."""

from __future__ import annotations

import pytest
import torchrun
from fork_server import Program

from learned_opt import run_folder
from learned_opt.config import RunConfig
from learned_opt.distributed import ALONE, Ranks, StoppedElsewhere
from learned_opt.run_folder import RunFolder, open_folder, refuse_differences, versions

# What agents of a sweep do, as close together as can be: all wait for a file, then make folders.
MAKE = """
import pathlib, sys, time
from learned_opt.config import RunConfig
from learned_opt.run_folder import RunFolder
pathlib.Path(sys.argv[1]).touch()
while not pathlib.Path("go").exists():
    time.sleep(0.001)
for _ in range(20):
    folder = RunFolder.new(pathlib.Path("runs"), "digits")
    folder.start(RunConfig())
    print(folder.path.name)
"""


def test_runs_that_start_at_once_do_not_share_a_folder(tmp_path):
    ready = [tmp_path / f"ready-{k}" for k in range(3)]
    agents = [Program(["-c", MAKE, path], cwd=tmp_path, env=torchrun.environment()) for path in ready]
    torchrun.wait_until(lambda: all(path.exists() for path in ready), "all to be ready")
    (tmp_path / "go").touch()
    made = [agent.communicate(torchrun.TIMEOUT)[0].split() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0, 0]
    names = [name for part in made for name in part]
    assert sorted(names) == sorted(["digits", *(f"digits-{k}" for k in range(2, 61))])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)


@pytest.fixture
def launched(monkeypatch):
    """Ranks that a torchrun has started, which is the parent of this process."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")
    assert ALONE.launch.startswith("a-run-")
    return ALONE


def test_a_launch_goes_on_with_its_own_run_alone(tmp_path, monkeypatch, launched):
    monkeypatch.chdir(tmp_path)
    other = RunFolder.new(tmp_path / "runs", "digits")
    other.start(RunConfig(), "another launch")
    first, again = open_folder(RunConfig(), launched, stem="digits")
    assert (first.path.name, again) == ("digits-2", False)
    first.release()
    second, again = open_folder(RunConfig(), launched, stem="digits")
    assert (second.path.name, again) == ("digits-2", True)
    second.release()
    named, again = open_folder(RunConfig(), launched, stem="digits", run_dir="runs/digits-2")
    assert again
    named.release()
    other.release()
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        open_folder(RunConfig(), launched, stem="digits", run_dir="runs/digits")
    taken, again = open_folder(RunConfig(), launched, stem="digits", run_dir="runs/digits", auto_resume=True)
    assert again
    taken.release()
    with pytest.raises(ValueError, match="keep_checkpoints: 3 -> 4"):
        open_folder(RunConfig(keep_checkpoints=4), launched, stem="digits", run_dir="runs/digits", auto_resume=True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    plain, again = open_folder(RunConfig(), ALONE, stem="digits")
    assert (plain.path.name, again) == ("digits-3", False)
    plain.release()


class Meeting(Ranks):
    """A rank whose fellows say what they are told to."""

    def __init__(self, rank, said):
        super().__init__(rank, len(said))
        self.said = said

    def everyone(self, value):
        return self.said


def test_differences_between_ranks_are_named():
    same = {"settings": {"seed": 0}, "versions": {"torch": "2.13"}}
    refuse_differences(Meeting(0, [same, same]), same)
    other = {"settings": {"seed": 1}, "versions": {"torch": "2.12"}}
    lines = ["the ranks of this run differ from rank 0.*", "  rank 2: settings.seed: 0 -> 1"]
    text = "\n".join([*lines, "  rank 2: versions.torch: 2.13 -> 2.12"])
    with pytest.raises(ValueError, match=text):
        refuse_differences(Meeting(0, [same, same, other]), same)
    with pytest.raises(StoppedElsewhere, match=text):
        refuse_differences(Meeting(1, [same, same, other]), same)


def test_versions_notice_changed_source(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1")
    before = versions([package])
    assert before == versions([package]) and before["torch"] == run_folder.torch.__version__
    (package / "a.py").write_text("x = 2")
    assert versions([package])["source"] != before["source"]
