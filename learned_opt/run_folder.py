"""The folder of one run: its configuration, its lock, and where everything else goes."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path
from typing import Any

from learned_opt import config as configuration
from learned_opt.config import RunConfig


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

    def start(self, settings: RunConfig) -> None:
        """Make the folder for a new run and write its configuration.

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
