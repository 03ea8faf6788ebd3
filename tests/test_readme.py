"""Every code block of the README runs, as written but for sizes, and every command in it exists."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import evaluate_optimizer
import train_optimizer
from learned_opt import LearnedOptimizer, load_artifact, rules, save_artifact
from learned_opt.config import preset_names
from tasks.suites import SUITES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder in which the demo has run: its exported optimizer is there."""
    monkeypatch.chdir(tmp_path)
    rule = rules.get("compact")
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    save_artifact(folder / "optimizer.safetensors", rule, rule.init_theta(torch.Generator().manual_seed(0)))
    (tmp_path / "my.yaml").write_text("rule: l2l\n")
    (folder / "config.yaml").write_text("rule: rnnprop\n")
    return tmp_path


def test_the_readme_has_what_these_tests_look_for():
    assert len(PYTHON) == 2 and len(COMMANDS) >= 8


def test_using_a_learned_optimizer(in_folder, capsys):
    scope = {}
    exec(compile(PYTHON[0], "README.md", "exec"), scope)
    assert isinstance(scope["optimizer"], LearnedOptimizer)
    assert re.search(r"loss on the last batch: \d+\.\d{3}", capsys.readouterr().out)


def test_meta_training_on_your_own_data(in_folder, capsys):
    block = PYTHON[1]
    # The block as it stands takes half a minute: the same code with fewer steps and validations.
    for old, new in (
        ("outer_steps=100", "outer_steps=3, validation_every=3, validation_tasks=2"),
        ("range(100)", "range(3)"),
    ):
        assert old in block
        block = block.replace(old, new)
    exec(compile(block, "README.md", "exec"), {})
    assert load_artifact(in_folder / "sensors.safetensors").rule.kind == "lstm"
    assert capsys.readouterr().out.startswith("3 ")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command, in_folder):
    words = shlex.split(command)
    match words:
        case ["python", "train_optimizer.py", "--help"]:
            with pytest.raises(SystemExit) as stopped:
                train_optimizer.parse(["--help"])
            assert stopped.value.code == 0
        case ["torchrun", "--standalone", "--nproc-per-node", number, "train_optimizer.py", *arguments]:
            assert int(number) > 1 and train_optimizer.parse(arguments).settings.rule in rules.RULES
        case ["python", "evaluate_optimizer.py", *arguments]:
            assert evaluate_optimizer.parse(arguments).suite in SUITES
        case ["python", "train_optimizer.py", *arguments]:
            assert train_optimizer.parse(arguments).settings.rule in rules.RULES
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["make", target]:
            done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        case ["wandb", "sweep", file]:
            assert (ROOT / file).is_file()
        case ["pip", "install", *_]:
            pass
        case _:
            pytest.fail(f"the README shows a command that no test knows: {command}")


def test_named_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), f"README.md points to {target}"
    for name in re.findall(r"--preset (\w+)", README):
        assert name in preset_names()
