"""How a run's recording is started and identified, and that what breaks in wandb does not reach the run."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learned_opt import tracking
from learned_opt.tracking import Tracker, TrackingConfig, TrackingWarning


@pytest.fixture(autouse=True)
def _never_used(monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for name in os.environ:
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))


class FakeRun:
    """A run whose methods named in `broken` raise."""

    def __init__(self, wandb: FakeWandb, **arguments: Any) -> None:
        self.wandb, self.arguments = wandb, arguments
        self.id, self.url = arguments.get("id", "assigned"), "https://example.invalid/run"
        self.dir = str(Path(arguments["dir"]) / "wandb" / "offline-run-x" / "files")
        self.summary = types.SimpleNamespace(update=lambda values: self._call("summary", values))

    def _call(self, name: str, *values: Any) -> None:
        self.wandb.calls.append((name, *values))
        if name in self.wandb.broken:
            raise self.wandb.broken[name]

    def define_metric(self, name: str, **options: str) -> None:
        self._call("define_metric", name)

    def log(self, values: dict[str, Any]) -> None:
        self._call("log", values)

    def log_artifact(self, artifact: Any) -> None:
        self._call("log_artifact", artifact)

    def finish(self, exit_code: int) -> None:
        self._call("finish", exit_code)


class FakeWandb(types.ModuleType):
    """Stands in for the client where it has to misbehave; `broken` maps a call's name, or init's mode, to its error."""

    def __init__(self, broken: dict[str, Exception], base_url: str = "https://api.wandb.ai") -> None:
        super().__init__("wandb")
        self.broken, self.calls = broken, []
        self.inits: list[dict[str, Any]] = []
        self.run_settings = types.SimpleNamespace(api_key=None, base_url=base_url)

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=self.run_settings)

    def Settings(self, **values: Any) -> Any:
        return types.SimpleNamespace(base_url="https://api.wandb.ai", **values)

    def Image(self, path: str) -> str:
        return path

    def init(self, **arguments: Any) -> FakeRun:
        self.inits.append(arguments)
        if arguments["mode"] in self.broken:
            raise self.broken[arguments["mode"]]
        return FakeRun(self, **arguments)

    def teardown(self, exit_code: int) -> None:
        self.calls.append(("teardown", exit_code))


@pytest.fixture
def fake(monkeypatch) -> Iterator[FakeWandb]:
    module = FakeWandb({})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def use_everything(tracker: Tracker, folder: Path) -> None:
    """Every method, twice; warnings are errors here, so that a second one would fail the test."""
    for step in range(2):
        tracker.log({"meta_loss": 1.0}, step)
        tracker.log_table("t", ["a"], [(1,)])
        tracker.log_image("i", folder / "missing.png")
        tracker.log_artifact(folder / "missing.safetensors", name="a", metadata={})
        tracker.log_summary({"a": 1})
        tracker.finish()


def test_a_missing_wandb_warns_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what `import wandb` then raises is ModuleNotFoundError
    with pytest.warns(
        TrackingWarning, match=r"^wandb tracking is off.*cannot be imported.*pip install wandb$"
    ) as caught:
        tracker = Tracker(TrackingConfig(), tmp_path, {})
    assert len(caught) == 1 and caught[0].filename == __file__
    use_everything(tracker, tmp_path)
    assert (tracker.mode, tracker.directory, tracker.run_id) == ("disabled", None, None)


def test_a_failing_start_warns_once(tmp_path, fake):
    fake.broken["offline"] = RuntimeError("the service\ndid not start")
    with pytest.warns(TrackingWarning, match=r"starting failed \(RuntimeError: the service\)$") as caught:
        tracker = Tracker(TrackingConfig(), tmp_path, {})
    assert len(caught) == 1
    use_everything(tracker, tmp_path)
    assert tracker.mode == "disabled" and fake.calls == []


@pytest.mark.parametrize("name", ["log", "summary", "log_artifact", "finish"])
def test_a_failure_while_recording_warns_once_and_closes_the_run(tmp_path, fake, name):
    fake.broken[name] = OSError(28, "No space left on device")
    fake.Artifact = lambda *_, **__: types.SimpleNamespace(add_file=lambda *_, **__: None)
    tracker = Tracker(TrackingConfig(), tmp_path / "run", {})
    file = tmp_path / "optimizer.safetensors"
    file.write_bytes(b"x")
    act = {
        "log": lambda: tracker.log({"a": 1.0}, 1),
        "summary": lambda: tracker.log_summary({"a": 1}),
        "log_artifact": lambda: tracker.log_artifact(file, name="a", metadata={}),
        "finish": tracker.finish,
    }[name]
    with pytest.warns(
        TrackingWarning, match=r"failed \(OSError: .*No space left on device\); what was recorded before is in"
    ):
        act()
    assert fake.calls[-1][0] == ("teardown" if name == "finish" else "finish")
    use_everything(tracker, tmp_path)
    assert tracker.mode == "disabled"


def test_a_file_that_is_not_there_does_not_raise(tmp_path, fake):
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    with pytest.warns(TrackingWarning, match=r"recording the file .*missing\.safetensors failed \(FileNotFoundError"):
        tracker.log_artifact(tmp_path / "missing.safetensors", name="a", metadata={})


def test_a_run_folder_that_cannot_be_written_does_not_raise(tmp_path, fake):
    (tmp_path / "file").write_text("")
    with pytest.warns(TrackingWarning, match=r"starting failed \((NotADirectory|FileExists|FileNotFound)Error"):
        tracker = Tracker(TrackingConfig(), tmp_path / "file" / "run", {})
    assert fake.inits == [] and tracker.mode == "disabled"


def test_an_interruption_is_not_swallowed(tmp_path, fake):
    fake.broken["log"] = KeyboardInterrupt()
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        tracker.log({"a": 1.0}, 1)


def test_an_online_start_that_fails_records_offline(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    fake.broken["online"] = TimeoutError("no answer")
    with pytest.warns(
        TrackingWarning, match=r"^wandb could not start online \(TimeoutError: no answer\); .*: wandb sync "
    ) as caught:
        tracker = Tracker(TrackingConfig(mode="online"), tmp_path, {})
    assert len(caught) == 1
    assert [call["mode"] for call in fake.inits] == ["online", "offline"]
    assert fake.calls[0] == ("teardown", 1)  # otherwise the service refuses the id as taken
    assert tracker.mode == "offline" and tracker.url is None
    tracker.log({"a": 1.0}, 7)
    assert fake.calls[-1] == ("log", {"a": 1.0, "outer_step": 7})


def test_online_without_a_login_records_offline_instead_of_asking(tmp_path, fake):
    with pytest.warns(TrackingWarning, match=r"^wandb has no login .*\(`wandb login` makes one\); .*wandb sync /"):
        tracker = Tracker(TrackingConfig(mode="online"), tmp_path, {})
    assert [call["mode"] for call in fake.inits] == ["offline"] and tracker.mode == "offline"


# --------------------------------------------------------------------------- mode, identity, configuration


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(TrackingConfig(mode="disabled"), tmp_path / "run", {})
    use_everything(tracker, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "mode", "expected"),
    [
        ({}, "auto", "offline"),
        ({"WANDB_API_KEY": "k"}, "auto", "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, "auto", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "Disabled"}, "auto", "disabled"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "run"}, "auto", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "online", "online"),
        ({"WANDB_API_KEY": "k"}, "offline", "offline"),
        ({"WANDB_MODE": "online"}, "offline", "offline"),
    ],
)
def test_mode(tmp_path, fake, monkeypatch, environment, mode, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker(TrackingConfig(mode=mode), tmp_path, {})
    assert tracker.mode == expected
    assert [call["mode"] for call in fake.inits] == [expected] * (expected != "disabled")
    assert (tracker.url is not None) == (expected == "online")
    tracker.finish()
    assert {name: value for name, value in os.environ.items() if name.startswith("WANDB_")} == environment


@pytest.mark.parametrize(
    ("text", "base_url", "expected"),
    [
        ("machine api.wandb.ai login user password secret\n", "https://api.wandb.ai", "online"),
        ("machine wandb.example.org:8080 login user password s\n", "https://wandb.example.org:8080", "online"),
        ("machine api.wandb.ai login user password secret\n", "https://wandb.example.org:8080", "offline"),
        ("machine github.com login user password secret\n", "https://api.wandb.ai", "offline"),
        ("machine api.wandb.ai login user password\n\x00 nonsense", "https://api.wandb.ai", "offline"),
    ],
)
def test_a_login_in_the_netrc_file_is_found(tmp_path, fake, monkeypatch, text, base_url, expected):
    (tmp_path / "netrc").write_text(text)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake.run_settings.base_url = base_url
    assert Tracker(TrackingConfig(), tmp_path / "run", {}).mode == expected


def test_a_login_in_the_home_folder_or_in_wandbs_settings_is_found(tmp_path, fake, monkeypatch):
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert Tracker(TrackingConfig(), tmp_path / "one", {}).mode == "online"
    netrc.unlink()
    assert Tracker(TrackingConfig(), tmp_path / "two", {}).mode == "offline"
    fake.run_settings.api_key = "k"
    assert Tracker(TrackingConfig(), tmp_path / "three", {}).mode == "online"


def test_what_wandb_is_started_with(tmp_path, fake):
    config = TrackingConfig(project="p", entity="e", name="n", tags=("t",), group="g")
    Tracker(config, tmp_path / "run", {"a": 1}).finish(exit_code=2)
    (call,) = fake.inits
    assert call["resume"] is None and len(call.pop("id")) == 8
    settings = vars(call.pop("settings"))
    assert call == {
        "project": "p",
        "entity": "e",
        "name": "n",
        "tags": ["t"],
        "group": "g",
        "config": {"a": 1},
        "mode": "offline",
        "dir": str(tmp_path / "run"),
        "resume": None,
        "reinit": "create_new",
    }
    assert settings["console"] == "off" and settings["silent"] and settings["disable_git"] and settings["disable_code"]
    assert settings["init_timeout"] <= 20 and settings["finish_timeout"] <= 60
    assert fake.calls[-1] == ("finish", 2)


def test_every_setting_is_known_to_the_installed_wandb():
    import wandb

    wandb.Settings(**tracking._SETTINGS)
    assert set(tracking._SETTINGS) <= set(wandb.Settings.model_fields)


def test_the_environment_names_the_project_unless_the_configuration_does(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    Tracker(TrackingConfig(), tmp_path, {})
    Tracker(TrackingConfig(project="mine"), tmp_path, {})
    assert [call["project"] for call in fake.inits] == [None, "mine"]


def test_a_new_run_in_the_same_folder_gets_a_new_id_and_a_resumed_one_does_not(tmp_path, fake, monkeypatch):
    ids = [Tracker(TrackingConfig(), tmp_path, {}, resume=resume).run_id for resume in (False, True, False, True, True)]
    assert ids[0] == ids[1] and ids[2] == ids[3] == ids[4] and ids[0] != ids[2]
    assert [call["resume"] for call in fake.inits] == [None, "allow", None, "allow", "allow"]
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert Tracker(TrackingConfig(), tmp_path, {}, resume=True).run_id == ids[2]
    assert Tracker(TrackingConfig(), tmp_path, {}).run_id == "given"


@pytest.mark.parametrize("content", [None, b"", b"\n", b"a/b", b"two words", b"\xff\xfe\x00", b"x" * 200])
def test_resuming_without_a_usable_id_starts_a_new_wandb_run(tmp_path, fake, content):
    path = tmp_path / tracking.ID_FILE
    if content is not None:
        path.write_bytes(content)
    tracker = Tracker(TrackingConfig(), tmp_path, {}, resume=True)
    assert re.fullmatch("[0-9a-f]{8}", tracker.run_id) and path.read_text() == f"{tracker.run_id}\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "onlin"}, "mode must be one of auto, offline, online, disabled; got 'onlin'"),
        ({"project": ""}, "project must have 1 to 128 characters, none of them one of /\\#?%:; got ''"),
        ({"project": "a/b"}, "project must have 1 to 128 characters, none of them one of /\\#?%:; got 'a/b'"),
        ({"tags": ("ok", "")}, "tags must each have 1 to 64 characters; got ''"),
    ],
)
def test_bad_configuration(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrackingConfig(**values)


def test_variables_that_the_user_has_set_keep_their_values(monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", "mine")
    with tracking._environment({"WANDB_DATA_DIR": "other", "WANDB_CACHE_DIR": "cache"}):
        assert (os.environ["WANDB_DATA_DIR"], os.environ["WANDB_CACHE_DIR"]) == ("mine", "cache")
    assert os.environ["WANDB_DATA_DIR"] == "mine" and "WANDB_CACHE_DIR" not in os.environ
