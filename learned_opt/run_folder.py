"""The folder of one run: its configuration, its lock, and where everything else goes."""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learned_opt import config as configuration
from learned_opt._version import __version__
from learned_opt.config import RunConfig
from learned_opt.distributed import Ranks, StoppedElsewhere
from learned_opt.files import write_atomically


class RunFolder:
    """One run's files.

    Args:
        path: the folder.

    Attributes:
        config, checkpoints, optimizer, results, picture: the paths of what lies in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.optimizer = self.path / "optimizer.safetensors"
        self.results = self.path / "results.json"
        self.picture = self.path / "curves.png"
        self._launch = self.path / ".launch"
        self._lock: Any = None

    @classmethod
    def new(cls, parent: Path, stem: str) -> RunFolder:
        """Make parent/stem, or parent/stem-2, parent/stem-3, …: the first name that nobody has taken.

        Raises:
            ValueError: the folder cannot be made.
        """
        for number in itertools.count(1):
            path = parent / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ValueError(
                    f"cannot make the run folder {path}: {error.strerror}; name another with --run-dir"
                ) from error
            return cls(path)
        raise AssertionError("unreachable")

    @classmethod
    def of_launch(cls, parent: Path, stem: str, launch: str) -> RunFolder | None:
        """The newest of the folders that `new` makes under this name whose run this launch started; None for none."""
        paths = [path for path in parent.glob(f"{glob.escape(stem)}*") if launch and path.is_dir()]
        newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
        return next((folder for folder in map(cls, newest_first) if folder.is_of_launch(launch)), None)

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    def is_of_launch(self, launch: str) -> bool:
        """Whether the run here was started by this launch (`Ranks.launch`), whose processes are running again."""
        try:
            return bool(launch) and self.holds_run and self._launch.read_text(encoding="utf-8") == launch
        except OSError:
            return False

    def load_config(self) -> RunConfig:
        """The configuration the run was started with.

        Raises:
            ValueError: the folder does not hold a run.
        """
        if not self.config.is_file():
            near = []
            if self.path.parent.is_dir():
                near = difflib.get_close_matches(
                    self.path.name, [p.name for p in self.path.parent.iterdir() if p.is_dir()], n=1
                )
            hint = (
                f"; did you mean {self.path.parent / near[0]}?"
                if near
                else "; give the folder of a run that was started"
            )
            raise ValueError(f"{self.path} does not hold a run (no config.yaml in it){hint}")
        return configuration.load(self.config)

    def start(self, settings: RunConfig, launch: str = "") -> None:
        """Make the folder for a new run and write its configuration.

        Args:
            settings: the configuration.
            launch: who starts it, for `is_of_launch`.

        Raises:
            ValueError: the folder already holds a run, is in use, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot make the run folder {self.path}: {error.strerror}; name another with --run-dir"
            ) from error
        self.lock()
        if self.config.exists():
            self.release()
            raise ValueError(
                f"{self.path} already holds a run; continue it with --resume {self.path}, "
                "or name another with --run-dir"
            )
        try:
            if launch:
                write_atomically(self._launch, launch.encode())
            settings.save(self.config)
        except OSError as error:
            self.release()
            raise ValueError(
                f"cannot write to the run folder {self.path}: {error.strerror}; name another with --run-dir"
            ) from error

    def resume(self, settings: RunConfig) -> None:
        """Take the folder for continuing its run.

        Raises:
            ValueError: the settings are not those it was started with, or another process uses it.
        """
        before, now = self.load_config().to_dict(), settings.to_dict()
        for values in (before, now):
            values.pop("tracking")  # where a run is reported does not change what it computes
        different = differences(before, now)
        if different:
            raise ValueError(
                f"{self.path} was started with other settings; resume it with those, or start a new run:\n  "
                + "\n  ".join(different)
            )
        self.lock()

    def lock(self) -> None:
        """Keep other processes out of the folder until `release`, or until this one ends.

        Raises:
            ValueError: another process is in it, or it cannot be written.
        """
        import filelock

        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            lock.acquire()
        except filelock.Timeout:
            raise ValueError(
                f"another process is running in {self.path}; wait for it or stop it, "
                "or name another folder with --run-dir"
            ) from None
        except OSError as error:
            raise ValueError(
                f"cannot write to the run folder {self.path}: {error.strerror}; name another with --run-dir"
            ) from error
        self._lock = lock

    def release(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def versions(packages: Sequence[Path]) -> dict[str, str]:
    """What computes a run: versions of this library and of those below it, and a hash of the source.

    Args:
        packages: folders of Python files.
    """
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "learned_opt": __version__,
        "source": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def refuse_differences(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Go on only if all ranks state the same facts, nested dicts of plain values.

    Raises:
        ValueError: at the first rank, with what differs from its own.
        StoppedElsewhere: on the others.
    """
    first, *others = ranks.everyone(facts)
    lines = [f"rank {rank}: {line}" for rank, facts in enumerate(others, 1) for line in differences(first, facts)]
    if lines:
        reason = "the ranks of this run differ from rank 0; give all the same settings and versions:\n  " + "\n  ".join(
            lines
        )
        raise ValueError(reason) if ranks.is_first else StoppedElsewhere(reason)


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Lines "setting: old -> new" for every leaf that differs between two nested dicts."""
    lines = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{path}{key}.")
        elif old != new:
            lines.append(f"{path}{key}: {old} -> {new}")
    return lines


def open_folder(
    settings: RunConfig, ranks: Ranks, *, stem: str, resume: str = "", run_dir: str = "", auto_resume: bool = False
) -> tuple[RunFolder, bool]:
    """The run's folder, locked, and whether it holds a run to continue.

    `torchrun` starts processes again with the arguments they had: they then continue what they had started.

    Args:
        settings: the run's.
        ranks: who starts it.
        stem: name under `runs` where no folder is named.
        resume: folder of a run to continue; must hold one.
        run_dir: folder of a run to start.
        auto_resume: continue the run in `run_dir` if it holds one.

    Raises:
        ValueError: the folder holds a run of other settings, or one where none was expected, or none where one was; or
            another process uses it, or it cannot be written.
    """
    folder: RunFolder | None = None
    if resume:
        folder = RunFolder(Path(resume))
    elif run_dir:
        named = RunFolder(Path(run_dir))
        folder = named if named.is_of_launch(ranks.launch) or (auto_resume and named.holds_run) else None
    else:
        folder = RunFolder.of_launch(Path("runs"), stem, ranks.launch)
    if folder is not None:
        folder.resume(settings)
        return folder, True
    folder = RunFolder(Path(run_dir)) if run_dir else RunFolder.new(Path("runs"), stem)
    folder.start(settings, ranks.launch)
    return folder, False
