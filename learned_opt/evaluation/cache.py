"""Runs kept on disk, so that a comparison computes only what has changed.

A run is named by a hash of all that decides its numbers: the family (its configuration, and what it draws and computes
for a sample task), the optimizer (its functions with their settings and the source files they stand in; for a learned
one, rule and theta, and all source files of the rules), learning rates, split, seeds, number of tasks, horizon, number
type, kind of device, torch's version, and the version of this module's format. Any of them changed, and the run is
another one.

An entry is one safetensors file, written whole or not at all. One that cannot be read, holds other tensors than it
says, or belongs to another key is computed again and replaced. A run whose optimizer is a lambda or a function inside
another one is not kept, since nothing names what such a function holds.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from learned_opt import rules, turning
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation.runs import Runs
from learned_opt.files import write_atomically
from learned_opt.rules.base import UpdateRule
from learned_opt.task import SPLITS, TaskFamily, Tensors, draw_batches, draw_task, task_seed

CACHE_VERSION = 1
"""Goes up whenever evaluation computes other numbers for the same settings."""

_DIGITS_OF_NAME = 40
_METRIC = "metric."


def default_folder() -> Path:
    """The user's cache folder for this library: `$XDG_CACHE_HOME`, by default `~/.cache`, then learned_opt/runs."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "learned_opt" / "runs"


class RunCache:
    """A folder of runs.

    Args:
        folder: where; made when the first run is kept.

    Attributes:
        num_found, num_computed: runs that were in the folder, and that had to be computed.
        num_damaged: those among the latter whose file was there and could not be used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.num_found = self.num_computed = self.num_damaged = 0
        self._families: dict[int, tuple[BatchedFamily, str]] = {}

    def run(
        self,
        batched: BatchedFamily,
        what: Mapping[str, Any],
        split: str,
        seeds: Sequence[int],
        num_tasks: int,
        horizon: int,
        compute: Callable[[], Runs],
    ) -> Runs:
        """The run from the folder, or what `compute` returns, which is then kept.

        Args:
            batched: the family.
            what: names the optimizer: plain values and functions.
            split, seeds, num_tasks, horizon: of the run.
            compute: makes the run.

        Raises:
            OSError: the folder cannot be written to.
        """
        key = self._key(batched, what, split, seeds, num_tasks, horizon)
        if key is None:
            self.num_computed += 1
            return compute()
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:_DIGITS_OF_NAME]}.safetensors"
        if path.is_file():
            runs = _read(path, key)
            if runs is not None:
                self.num_found += 1
                return runs
            self.num_damaged += 1
        runs = compute()
        self.num_computed += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, key, runs)
        return runs

    def _key(
        self,
        batched: BatchedFamily,
        what: Mapping[str, Any],
        split: str,
        seeds: Sequence[int],
        num_tasks: int,
        horizon: int,
    ) -> str | None:
        """All that decides a run, as JSON; None if something in it has no lasting name."""
        if id(batched) not in self._families:
            # The object is kept beside its name, so that no other one can get its id.
            self._families[id(batched)] = (batched, fingerprint(batched.family))
        try:
            named = {name: describe(value) for name, value in what.items()}
        except _NamelessError:
            return None
        return json.dumps(
            {
                "version": CACHE_VERSION,
                "torch": torch.__version__,
                "family": self._families[id(batched)][1],
                "optimizer": named,
                "split": split,
                "seeds": list(seeds),
                "num_tasks": num_tasks,
                "horizon": horizon,
                "dtype": str(batched.dtype),
                "device": batched.device.type,
            },
            sort_keys=True,
        )


class _NamelessError(Exception):
    """A value that nothing outside this process identifies."""


def describe(value: Any) -> Any:
    """A value as plain JSON that is the same in every process: functions and classes by name, settings and source.

    Raises:
        _NamelessError: a lambda, a function or class inside a function, or an object of another kind.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, functools.partial):
        return {
            "of": describe(value.func),
            "arguments": describe(value.args),
            "settings": describe(value.keywords),
        }
    name = getattr(value, "__qualname__", "")
    if callable(value) and name and "<" not in name:
        return {"name": f"{value.__module__}.{name}", "source": _source_hash(value)}
    raise _NamelessError


def _source_hash(value: Any) -> str:
    """Of the file that a function or class stands in; empty for built-in ones, which torch's version names."""
    try:
        path = inspect.getsourcefile(value)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except (OSError, TypeError):
        return ""


def fingerprint(family: TaskFamily) -> str:
    """A hash of what a family is: its name and configuration, its data, and a sample task of every split.

    The sample's constants, initial parameters, first batches, loss and metrics are in it, the latter two at the initial
    parameters and at others, so that a family whose code or data has changed is another one even under the same
    configuration. Numbers computed in floating point enter with five digits.
    """
    digest = hashlib.sha256()
    try:
        digest.update(json.dumps([family.name, family.config()], sort_keys=True).encode())
    except (TypeError, ValueError):
        # Modules and data sets have no plain configuration; what they compute names them.
        digest.update(family.name.encode())
    digest.update(f"delay {family.gradient_delay}".encode())
    shared = family.shared_data()
    _add(digest, shared)
    for split in SPLITS:
        seed = task_seed(split, 0, 0, 0)
        task, params = draw_task(family, split, seed)
        batches = draw_batches(family, task, seed, 0, 2)
        for part in (task, params, batches):
            _add(digest, part)
        batch = {name: value[0] for name, value in batches.items()}
        with torch.no_grad():
            for point in (params, {name: 1.25 * value + 0.01 for name, value in params.items()}):
                numbers = {"loss": family.loss(point, {**task, **shared}, batch)}
                numbers |= family.eval_metrics(point, {**task, **shared})
                digest.update(json.dumps({n: f"{float(v):.4e}" for n, v in numbers.items()}).encode())
    return digest.hexdigest()


def _add(digest: Any, tensors: Tensors) -> None:
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())


def _content(runs: Runs) -> str:
    digest = hashlib.sha256()
    _add(digest, {"losses": runs.losses, **{_METRIC + name: value for name, value in runs.metrics.items()}})
    return digest.hexdigest()


def _write(path: Path, key: str, runs: Runs) -> None:
    from safetensors.torch import save

    tensors = {"losses": runs.losses, **{_METRIC + name: value for name, value in runs.metrics.items()}}
    # The file orders its tensors by itself; tables keep the order in which the family names its metrics.
    metadata = {"key": key, "content": _content(runs), "metrics": json.dumps(list(runs.metrics))}
    data = save({n: v.contiguous() for n, v in tensors.items()}, metadata)
    write_atomically(path, data)


def _read(path: Path, key: str) -> Runs | None:
    """The run in a file, or None if it cannot be read, was damaged, or is of another key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError):
        return None
    losses = tensors.pop("losses", None)
    if losses is None or metadata.get("key") != key:
        return None
    try:
        runs = Runs(losses, {name: tensors[_METRIC + name] for name in json.loads(metadata["metrics"])})
    except (KeyError, ValueError, TypeError):
        return None
    return runs if metadata.get("content") == _content(runs) else None


def learned_name(rule: UpdateRule, content_hash: str) -> dict[str, Any]:
    """How a learned optimizer is named in a key: by what it is, and by the code that computes its steps."""
    return {
        "rule": rule.kind,
        "settings": rule.settings(),
        "hash": content_hash,
        "class": type(rule),
        "sources": _sources_of_rules(),
    }


@functools.cache
def _sources_of_rules() -> str:
    """A hash of the source files that update rules are made of, kernels included."""
    folder, digest = Path(rules.__file__).parent, hashlib.sha256()
    paths = [path for path in folder.rglob("*") if path.suffix in (".py", ".cpp")]
    for path in [*sorted(paths), Path(turning.__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
