"""Configuration files and run folders: what is written is what is read, and every mistake is named."""

import dataclasses
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import tasks
from learned_opt import config as configuration
from learned_opt import estimators, rules, run_folder
from learned_opt.config import RunConfig
from learned_opt.evaluation import BASELINES, EvaluationConfig
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_loss import MetaLoss
from learned_opt.run_folder import RunFolder, differences
from learned_opt.tracking import TrackingConfig
from learned_opt.truncation import HorizonSchedule

CHANGED = RunConfig(
    rule="rnnprop",
    rule_settings={"hidden_size": 4, "eps": 1e-12, "inputs": "1e-3"},
    export_settings={"output_scale": 0.5},
    export_share=0.25,
    families={"a b": {"name": "quadratic", "dim": 3}, "größer": {"name": "image_mlp", "hidden": [4, 5]}},
    validation_families={"v": {"name": "quadratic"}},
    estimator="pes",
    estimator_settings={"sigma": 1e-7},
    trainer=MetaTrainerConfig(
        outer_steps=7,
        horizons=HorizonSchedule(kind="log_uniform", shortest=3, longest=30),
        meta_loss=MetaLoss(normalization="ratio", clip=1e20),
        learning_rate=1e-05,
        seed=3,
    ),
    test_families={"t": {"name": "quadratic", "convention": "uniform"}},
    baselines=("adam",),
    evaluation=EvaluationConfig(seeds=(5, 6), horizon=11),
    tracking=TrackingConfig(mode="disabled"),
    checkpoint_every=3,
    keep_checkpoints=1,
    num_threads=2,
)


def written(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("settings", [RunConfig(), CHANGED], ids=["defaults", "changed"])
def test_yaml_round_trip(tmp_path, settings):
    path = tmp_path / "config.yaml"
    settings.save(path)
    assert configuration.load(path) == settings
    assert configuration.from_dict(settings.to_dict()) == settings
    # Any YAML reader can read it.
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() == settings.to_dict().keys()
    again = tmp_path / "again.yaml"
    configuration.load(path).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_what_is_missing_keeps_its_default(tmp_path):
    got = configuration.load(written(tmp_path, "trainer: {outer_steps: 5}\n"))
    assert got == dataclasses.replace(RunConfig(), trainer=MetaTrainerConfig(outer_steps=5))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 3e-3),
        ("3.0e-3", 3e-3),
        ("1E5", 1e5),
        ("-2e+1", -20.0),
        (".5e-1", 0.05),
        ("'3e-3'", "3e-3"),
        ("3e", "3e"),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text, value):
    got = configuration.read_yaml(f"lr: {text}")["lr"]
    assert got == value and type(got) is type(value)


def test_exponents_reach_settings_without_a_type_of_their_own(tmp_path):
    path = written(tmp_path, "rule: adam\nrule_settings: {lr: 1e-2}\ntrainer: {learning_rate: 2e-3}\n")
    got = configuration.load(path)
    assert rules.get(got.rule, **got.rule_settings).settings()["lr"] == 0.01
    assert got.trainer.learning_rate == 0.002


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainr: {seed: 1}", "trainr: no such setting; did you mean trainer"),
        ("trainer: {outer_step: 1}", "trainer.outer_step: no such setting; did you mean outer_steps?"),
        ("trainer: {horizons: {longst: 1}}", "trainer.horizons.longst: no such setting; did you mean longest?"),
        ("trainer: {meta_loss: {clipp: 3}}", "trainer.meta_loss.clipp: no such setting; did you mean clip?"),
        ("evaluation: {horizn: 3}", "evaluation.horizn: no such setting; did you mean horizon?"),
        ("tracking: {projct: x}", "tracking.projct: no such setting; did you mean project?"),
        ("zzz: 1", "zzz: no such setting; there are rule, rule_settings, export_settings, export_share"),
        ("export_share: 0", "export_share must be over 0 and at most 1, which is all; got 0"),
        ("export_share: 1.5", "export_share must be over 0 and at most 1, which is all; got 1.5"),
        ("rule: [1]", "rule: Input should be a valid string"),
        ("trainer: 3", "trainer: Input should be a dictionary"),
        ("trainer: {outer_steps: many}", "trainer.outer_steps: Input should be a valid integer"),
        ("trainer: {outer_steps: 2.5}", "trainer.outer_steps: Input should be a valid integer"),
        ("trainer: {learning_rate: fast}", "trainer.learning_rate: Input should be a valid number"),
        ("trainer: {outer_steps: 0}", "trainer: outer_steps must be at least 1; got 0"),
        ("trainer: {meta_loss: {clip: 0.5}}", "trainer.meta_loss: clip must be greater than 1; got 0.5"),
        ("trainer: {horizons: {kind: x}}", "trainer.horizons: horizon kind must be one of fixed, log_uniform; got 'x'"),
        ("trainer: {optimizer: Adan}", "did you mean Adam"),
        ("checkpoint_every: 0", "checkpoint_every must be at least 1; got 0"),
        ("keep_checkpoints: 0", "keep_checkpoints must be at least 1; got 0"),
        ("num_threads: 0", "num_threads must be at least 1; got 0"),
        ("families: {}", "families is empty; name at least one task family to meta-train on"),
        ("families: {a: 3}", "families.a: Input should be a valid dictionary"),
        (
            "families: {a: {nam: x}}",
            "family 'a' needs a name, as in {name: image_mlp, activation: relu}; got {'nam': 'x'}",
        ),
        ("test_families: {b: {}}", "family 'b' needs a name, as in {name: image_mlp, activation: relu}; got {}"),
        ("baselines: adam", "baselines: Input should be a valid tuple"),
        ("1: 2", "Keys should be strings"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        configuration.load(path)
    assert str(caught.value).startswith(f"{path} is not valid:\n  ")


def test_all_mistakes_are_listed(tmp_path):
    path = written(tmp_path, "rul: adam\ntrainer: {seed: x, truncaton: 3}\nnum_threads: [1]\n")
    with pytest.raises(ValueError, match="is not valid") as caught:
        configuration.load(path)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.strip().split(":")[0] for line in lines) == [
        "num_threads",
        "rul",
        "trainer.seed",
        "trainer.truncaton",
    ]


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ValueError, match=f"cannot read the configuration file {missing}: No such file or directory"):
        configuration.load(missing)
    with pytest.raises(ValueError, match=f"cannot read the configuration file {tmp_path}: Is a directory"):
        configuration.load(tmp_path)
    path = written(tmp_path, "rule: [")
    with pytest.raises(ValueError, match=f"{path} is not valid YAML: "):
        configuration.load(path)
    path = written(tmp_path, "a: !!python/object/apply:os.mkdir [x]")
    with pytest.raises(ValueError, match="is not valid YAML: could not determine a constructor"):
        configuration.load(path)
    for text, kind in (("", "NoneType"), ("- a", "list"), ("hello", "str")):
        path = written(tmp_path, text)
        with pytest.raises(ValueError, match=f"{path} must hold a mapping of settings; got {kind}"):
            configuration.load(path)
    path.write_bytes(b"rule: \xff\xfe")
    with pytest.raises(ValueError, match=f"{path} is not a text file in UTF-8"):
        configuration.load(path)


def test_from_python_the_same_checks_hold():
    with pytest.raises(ValueError, match="the configuration is not valid:\n  rull: no such setting; did you mean rule"):
        configuration.from_dict({"rull": "adam"})
    with pytest.raises(ValueError, match="families is empty"):
        RunConfig(families={})


@pytest.mark.parametrize("name", configuration.preset_names())
def test_presets_name_things_that_exist(name):
    settings = configuration.preset(name)
    rules.get(settings.rule, **settings.rule_settings)
    estimators.get(settings.estimator, **settings.estimator_settings)
    for where in (settings.families, settings.validation_families, settings.test_families):
        for described in where.values():
            family = tasks.get(**described)
            assert family.name == described["name"]
    assert set(settings.baselines) <= set(BASELINES)
    assert settings.trainer.truncation <= settings.trainer.horizons.longest
    assert configuration.from_dict(settings.to_dict()) == settings


def test_there_is_a_demo_and_near_matches_are_suggested():
    assert "digits" in configuration.preset_names()
    with pytest.raises(ValueError, match="unknown preset 'digit'; did you mean digits?"):
        configuration.preset("digit")
    with pytest.raises(ValueError, match="unknown preset 'zzzzz'; choose from .*digits"):
        configuration.preset("zzzzz")


def test_a_file_may_say_what_differs_from_a_preset(tmp_path):
    text = "{preset: compact, rule_settings: {growth: 0.5}, trainer: %s}"
    text %= "{outer_steps: 3, horizons: {longest: 700}, stages: []}"
    base = configuration.preset("compact")
    assert base.trainer.stages and base.rule_settings.keys() > {"growth"}
    assert base.trainer.horizons != HorizonSchedule(longest=base.trainer.horizons.longest)
    horizons = dataclasses.replace(base.trainer.horizons, longest=700)
    trainer = dataclasses.replace(base.trainer, outer_steps=3, horizons=horizons, stages=())
    want = dataclasses.replace(base, rule_settings={"growth": 0.5}, trainer=trainer)
    assert configuration.load(written(tmp_path, text)) == want
    assert configuration.from_dict({"preset": "compact"}) == base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: compct", "preset: unknown preset 'compct'; did you mean compact"),
        ("preset: [compact]", r"preset: unknown preset \"\['compact'\]\""),
        ("{preset: compact, trainer: {outer_stps: 3}}", r"trainer\.outer_stps: no such setting; did you mean outer_"),
        ("{preset: compact, trainer: 3}", "trainer: "),
        ("{preset: compact, families: {}}", "families is empty"),
        ("{preset: compact, trainer: {truncation: 0}}", "trainer: truncation must be at least 1; got 0"),
    ],
)
def test_what_differs_from_a_preset_is_checked(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"{path} is not valid:\n  {message}"):
        configuration.load(path)


# --- the run folder ---


def test_a_run_folder_from_start_to_resumption(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.start(CHANGED)
    assert folder.load_config() == CHANGED
    folder.release()
    again = RunFolder(tmp_path / "runs" / "one")
    again.resume(CHANGED)
    again.release()
    # Where a run is reported may change.
    again.resume(dataclasses.replace(CHANGED, tracking=TrackingConfig(mode="offline")))
    again.release()


def test_starting_where_a_run_is(tmp_path):
    path = tmp_path / "one"
    first = RunFolder(path)
    first.start(RunConfig())
    first.release()
    text = re.escape(f"{path} already holds a run; continue it with --resume {path}, or name another with --run-dir")
    with pytest.raises(ValueError, match=text):
        RunFolder(path).start(CHANGED)
    assert RunFolder(path).load_config() == RunConfig()
    # Whoever was turned away has not kept the door locked.
    again = RunFolder(path)
    again.resume(RunConfig())
    again.release()


def test_resuming_with_other_settings_lists_them(tmp_path):
    path = tmp_path / "one"
    folder = RunFolder(path)
    folder.start(RunConfig())
    folder.release()
    other = dataclasses.replace(
        RunConfig(),
        rule="adam",
        rule_settings={"lr": 0.1},
        trainer=MetaTrainerConfig(seed=4, horizons=HorizonSchedule(longest=50)),
    )
    with pytest.raises(
        ValueError, match=re.escape(f"{path} was started with other settings; resume it with")
    ) as caught:
        folder.resume(other)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "rule: compact -> adam",
        "rule_settings.lr: None -> 0.1",
        "trainer.horizons.longest: 100 -> 50",
        "trainer.seed: 0 -> 4",
    ]
    folder.resume(RunConfig())
    folder.release()


def test_differences():
    before = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "gone": 3}
    now = {"a": 1, "b": {"c": [1, 3], "d": {"e": 0}}, "new": {"x": 1}}
    assert differences(before, now) == [
        "b.c: [1, 2] -> [1, 3]",
        "b.d.e: None -> 0",
        "gone: 3 -> None",
        "new: None -> {'x': 1}",
    ]
    assert differences(before, before) == []


def test_a_folder_without_a_run(tmp_path):
    (tmp_path / "digits-1").mkdir()
    text = f"{tmp_path / 'digits-2'} does not hold a run (no config.yaml in it); did you mean {tmp_path / 'digits-1'}?"
    with pytest.raises(ValueError, match=re.escape(text)):
        RunFolder(tmp_path / "digits-2").load_config()
    for path in (tmp_path / "digits-1", tmp_path / "nowhere" / "deep"):
        with pytest.raises(ValueError, match=re.escape(f"{path} does not hold a run (no config.yaml in it)")):
            RunFolder(path).resume(RunConfig())
    text = f"{tmp_path / 'zzz'} does not hold a run (no config.yaml in it); give the folder of a run that was started"
    with pytest.raises(ValueError, match=re.escape(text)):
        RunFolder(tmp_path / "zzz").load_config()
    assert list((tmp_path / "digits-1").iterdir()) == [] and not (tmp_path / "nowhere").exists()


def test_two_processes_cannot_share_a_folder(tmp_path):
    path = tmp_path / "one"
    program = f"""
        import sys
        from pathlib import Path
        from learned_opt.config import RunConfig
        from learned_opt.run_folder import RunFolder
        folder = RunFolder(Path({str(path)!r}))
        folder.start(RunConfig())
        print("started", flush=True)
        sys.stdin.readline()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    with other:
        assert other.stdout.readline() == "started\n"
        text = f"another process is running in {path}; wait for it or stop it, or name another folder with --run-dir"
        for take in (RunFolder(path).resume, RunFolder(path).start):
            with pytest.raises(ValueError, match=re.escape(text)):
                take(RunConfig())
        # Killed, it lets go: nobody has to delete a lock by hand.
        other.kill()
        other.wait()
    folder = RunFolder(path)
    folder.resume(RunConfig())
    folder.release()


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(
        ValueError, match=f"cannot make the run folder {taken}: File exists; name another with --run-dir"
    ):
        RunFolder(taken).start(RunConfig())
    # Tests may run as root, to whom everything is writable: the answer to the question is replaced.
    locked = tmp_path / "locked"
    text = f"cannot write to the run folder {locked}: Permission denied; name another with --run-dir"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "access", lambda *_: False)
        with pytest.raises(ValueError, match=text):
            RunFolder(locked).start(RunConfig())

    def full(self, path):
        raise OSError(28, "No space left on device")

    text = f"cannot write to the run folder {locked}: No space left on device; name another with --run-dir"
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "save", full)
        with pytest.raises(ValueError, match=text):
            RunFolder(locked).start(RunConfig())
    folder = RunFolder(locked)
    folder.start(RunConfig())
    folder.release()
    folder.release()  # twice is once
