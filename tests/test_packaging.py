"""The built wheel: what it holds, that it works from another folder, and that the project files agree."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("learned_opt", "tasks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy so that the tree gets no build folder; with the installed setuptools."""
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train_optimizer.py", "evaluate_optimizer.py"):
        shutil.copy(ROOT / name, source)
    # Everything that stands beside the packages comes too: it must stay out of the wheel.
    for folder in (ROOT / name for name in (*PACKAGES, "tests", "benchmarks")):
        if folder.is_dir():
            shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = target.glob("learned_opt-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation puts into site-packages."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def read_metadata(unpacked: Path, file: str) -> str:
    (path,) = unpacked.glob(f"learned_opt-*.dist-info/{file}")
    return path.read_text(encoding="utf-8")


def test_wheel_holds_every_module_of_both_packages(names):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".typed", ".yaml", ".safetensors", ".json")
    }
    assert {"learned_opt/py.typed", "tasks/py.typed", "learned_opt/unroll.py", "tasks/data/__init__.py"} <= wanted
    assert not wanted - names
    assert {"train_optimizer.py", "evaluate_optimizer.py"} <= names


def test_wheel_holds_nothing_else(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not re.fullmatch(r"learned_opt-[\d.]+\.dist-info", top)} == {
        *PACKAGES,
        "train_optimizer.py",
        "evaluate_optimizer.py",
    }


def test_wheel_has_the_console_command_and_the_licence(unpacked):
    scripts = configparser.ConfigParser()
    scripts.read_string(read_metadata(unpacked, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {
        "learned-opt-train": "train_optimizer:main",
        "learned-opt-evaluate": "evaluate_optimizer:main",
    }
    assert "Apache License" in read_metadata(unpacked, "licenses/LICENSE")
    metadata = email.message_from_string(read_metadata(unpacked, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_core_dependencies_are_three(unpacked):
    metadata = email.message_from_string(read_metadata(unpacked, "METADATA"))
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert {item.name for item in requirements if item.marker is None} == {"numpy", "safetensors", "torch"}
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"all", "baselines", "benchmarks", "dev", "eval", "integrations", "sagemaker", "train"}
    named = {extra for item in requirements if item.name == "learned-opt" for extra in item.extras}
    assert named <= extras, "an extra refers to another one that does not exist"


def run_elsewhere(unpacked: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an empty folder, with the unpacked wheel on the path and the source tree not."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_installed_packages_work_from_another_folder(unpacked, tmp_path):
    code = (
        "import learned_opt, tasks, torch\n"
        "from learned_opt import rules\n"
        "from learned_opt.task import draw_batches, draw_task\n"
        "from tasks.quadratic import Quadratic\n"
        "family = Quadratic(dim=3)\n"
        "task, params = draw_task(family, 'meta_train', 0)\n"
        "batch = {n: v[0] for n, v in draw_batches(family, task, 0, 0, 1).items()}\n"
        "assert torch.isfinite(family.loss(params, {**task, **family.shared_data()}, batch))\n"
        "assert rules.get('compact').init_theta(torch.Generator().manual_seed(0))\n"
        "print(learned_opt.__file__, tasks.__file__, sep='\\n')\n"
    )
    result = run_elsewhere(unpacked, tmp_path, code)
    assert result.returncode == 0, result.stderr
    where = [Path(line) for line in result.stdout.split()]
    assert where == [unpacked / package / "__init__.py" for package in PACKAGES]


def test_console_command_starts_from_another_folder(unpacked, tmp_path):
    # What the installed script does; --help must work where no file of the source tree is near.
    code = "import sys; sys.argv = ['learned-opt-train', '--help']; from train_optimizer import main; sys.exit(main())"
    result = run_elsewhere(unpacked, tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert "learned-opt-train" in result.stdout
    assert not list(tmp_path.iterdir()), "asking for help must write nothing"


def test_version_is_said_once_and_is_in_the_changelog(unpacked):
    metadata = email.message_from_string(read_metadata(unpacked, "METADATA"))
    version = metadata["Version"]
    assert Version(version).release
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_fit_the_requirements(unpacked):
    metadata = email.message_from_string(read_metadata(unpacked, "METADATA"))
    allowed = {item.name.lower(): item.specifier for item in map(Requirement, metadata.get_all("Requires-Dist", []))}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert "torch" in {pin.name for pin in pins}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert exact.version in allowed[pin.name.lower()], f"{pin} is outside of what pyproject.toml allows"


def test_makefile_takes_constraints_and_says_how_to_use_it():
    if shutil.which("make") is None:
        pytest.skip("GNU make is not installed")
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert shown.returncode == 0, shown.stderr
    for target in ("make demo", "make test", "make clean"):
        assert target in shown.stdout
    # A dry run against an environment that does not exist: every step that a new user would see.
    plan = subprocess.run(
        ["make", "-n", "demo", "VENV=no-such-environment"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert plan.returncode == 0, plan.stderr
    steps = plan.stdout
    assert steps.index("-m venv") < steps.index("-c constraints.txt") < steps.index("train_optimizer.py")


def test_old_python_is_refused_with_the_remedy(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("GNU make is not installed")
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what an old Python answers to the version check
    old.chmod(0o755)
    result = subprocess.run(
        ["make", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode != 0
    assert "Python 3.10 or newer is needed; name one with: make PYTHON=/path/to/python3" in result.stderr
    assert not (tmp_path / "venv").exists()
