"""Checkpoints that are either whole or not there.

A checkpoint is written to a temporary file in the same folder, flushed to the disk and renamed; its name ends with a
hash of its bytes, which is verified on loading. A crash, a full disk or a flipped bit can therefore cost the newest
checkpoint at most, never the ones before it, and never silently. Loading unpickles nothing but tensors and plain
containers.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch

from learned_opt.files import write_atomically

_NAME = re.compile(r"(?P<kind>step|best)-(?P<step>\d{8})\.(?P<hash>[0-9a-f]{16})\.pt")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or cannot be written."""


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: made if it does not exist.
        keep: how many of the last checkpoints to keep, at least 1; the best one is kept beside them.
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}")
        self.folder, self.keep = Path(folder), keep

    def _list(self, kind: str) -> list[tuple[int, Path]]:
        """(step, path) of the checkpoints of a kind, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(m["step"]), path) for m, path in found if m and m["kind"] == kind)

    def save(self, state: dict[str, Any], step: int, *, best: bool = False) -> Path:
        """Write a checkpoint, then delete what is no longer to be kept.

        Args:
            state: tensors, numbers, strings, None, lists and dicts.
            step: outer steps taken.
            best: also keep it as the best so far.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        name = f"{step:08d}.{hashlib.sha256(data).hexdigest()[:16]}.pt"
        path = self.folder / f"step-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
            if best:
                write_atomically(self.folder / f"best-{name}", data)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {error.strerror}; free some space or make the folder "
                "writable, then "
                "resume: the checkpoints before it are untouched"
            ) from error
        for kind, kept in (("step", self.keep), ("best", 1)):
            if kind == "best" and not best:
                continue
            found = self._list(kind)
            # What lies after this step is of a course that was abandoned, by falling back from a damaged checkpoint:
            # kept, it would pass for the newest.
            current = [p for s, p in found if s < step] + [self.folder / f"{kind}-{name}"]
            for old in {p for _, p in found} - set(current[-kept:]):
                old.unlink(missing_ok=True)
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = self._list("step")
        return found[-1][1] if found else None

    def best(self) -> Path | None:
        """The best checkpoint, or None."""
        found = self._list("best")
        return found[-1][1] if found else None

    def load_latest(self, *, fall_back: bool = False) -> dict[str, Any]:
        """The newest checkpoint's state.

        Args:
            fall_back: when it is damaged, use the newest whole one before it.

        Raises:
            CheckpointError: there is none, or it is damaged (and so are the others, with fall_back).
        """
        found = self._list("step")
        if not found:
            raise CheckpointError(
                f"no checkpoint in {self.folder}; start a new run, or give the folder of one that was started"
            )
        for i, (_, path) in enumerate(reversed(found)):
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                if fall_back:
                    continue
                others = len(found) - i - 1
                hint = (
                    f"resume with --fall-back to continue from the one before it ({found[-2][1].name})"
                    if others
                    else "no other is left"
                )
                raise CheckpointError(f"{error}; {hint}") from error
        raise CheckpointError(f"all {len(found)} checkpoints in {self.folder} are damaged; start a new run")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in one checkpoint file, its hash verified.

    Raises:
        CheckpointError: the file is missing, not a checkpoint, truncated or altered.
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint (step-<number>.<hash>.pt)")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest()[:16] != match["hash"]:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its content ({len(data)} bytes) does not have the hash in its name"
        )
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
