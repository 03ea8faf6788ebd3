"""The exported file: an update rule, its theta and how it was trained, in one safetensors file without pickle.

Everything but tensors is text in the file's metadata: the format version, the rule's kind and settings, the
provenance, and a hash of rule and theta. The hash is ours and does not depend on the container: it identifies what was
learned, whatever file it lies in, and tells a damaged file from a sound one. Initial parameters that were learned
beside the rule, one set per family, lie in the same file and count in the hash; such files have format version 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from learned_opt import rules
from learned_opt._version import __version__
from learned_opt.files import write_atomically
from learned_opt.rules.base import UpdateRule
from learned_opt.task import Tensors

FORMAT = "learned_opt.optimizer"
FORMAT_VERSION = 2
"""The highest that is read; files without learned initial parameters are still written as version 1."""

SHIPPED = Path(__file__).parent / "weights"
"""Where the optimizers that ship with the library lie, one `<name>.safetensors` each."""

_IDENTITY_DIGITS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """A learned optimizer: what `save_artifact` writes and `load_artifact` returns. Make one in memory with `of`.

    Attributes:
        rule: the update rule.
        theta: its meta-parameters, float32 on the CPU.
        provenance: how it was trained, plain JSON values (families, horizon, seed, outer steps, library version, …).
        hash: 64 hexadecimal digits, of rule and theta; not of name and provenance.
        name: a short name: letters, digits and "_.+-".
        initial_params: label of a family -> parameters by name, float32 on the CPU, that its tasks start from; read
            them with `initial_parameters`.
    """

    rule: UpdateRule
    theta: Tensors
    provenance: dict[str, Any]
    hash: str
    name: str
    initial_params: dict[str, Tensors] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rule: UpdateRule,
        theta: Mapping[str, torch.Tensor],
        provenance: Mapping[str, Any] | None = None,
        *,
        name: str,
        initial_params: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> Artifact:
        """An artifact of these parts, checked.

        Args:
            rule: the update rule.
            theta: its meta-parameters, of the shapes of `rule.init_theta`; copied as float32.
            provenance: JSON values.
            name: a short name.
            initial_params: label -> learned initial parameters by name; copied as float32.

        Raises:
            ValueError: theta has missing, unknown, misshapen or non-finite tensors; so have the initial parameters; the
                provenance is not JSON; the name has other characters.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"name must be letters, digits and '_.+-', and start with a letter or digit; got {name!r}")
        plain = dict(provenance or {})
        try:
            plain = json.loads(json.dumps(plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance must be JSON values (text, finite numbers, lists, dicts): {error}") from None
        stored = {n: theta[n].detach().to("cpu", torch.float32, copy=True).contiguous() for n in sorted(theta)}
        check_theta(rule, stored)
        initial = {
            label: {n: v.detach().to("cpu", torch.float32, copy=True).contiguous() for n, v in params.items()}
            for label, params in (initial_params or {}).items()
        }
        _check_initial(initial)
        artifact = cls(rule, stored, plain, content_hash(rule.kind, rule.settings(), stored, initial), name, initial)
        _ALIVE.setdefault(artifact.identity, artifact)
        return artifact

    @property
    def identity(self) -> str:
        """Name, "@" and 16 digits of the hash: how optimizer state names the weights it belongs to."""
        return f"{self.name}@{self.hash[:_IDENTITY_DIGITS]}"

    def initial_parameters(self, label: str | None = None) -> Tensors:
        """Copies of the learned initial parameters of a family, by parameter name, float32 on the CPU.

        Args:
            label: of the family, as in the configuration of the run; it may be left out where there is only one.

        Raises:
            ValueError: there are none at all, or none of this label; those there are are named.
        """
        known = ", ".join(map(repr, self.initial_params))
        if not self.initial_params:
            raise ValueError(
                f"the optimizer {self.name!r} was exported without initial parameters; meta-train with "
                "trainer.initial_params.families to learn them"
            )
        if label is None and len(self.initial_params) > 1:
            raise ValueError(f"label must say which family's initial parameters are meant; there are {known}")
        label = next(iter(self.initial_params)) if label is None else label
        if label not in self.initial_params:
            raise ValueError(f"the optimizer {self.name!r} has no initial parameters of {label!r}; there are {known}")
        return {name: value.clone() for name, value in self.initial_params[label].items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _ALIVE.setdefault(self.identity, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Artifact:
        return self  # Immutable: copies of an optimizer share their weights.


_ALIVE: weakref.WeakValueDictionary[str, Artifact] = weakref.WeakValueDictionary()
"""Artifacts in use by identity, so that an optimizer's identity string is enough to build another one of its kind."""


def content_hash(
    kind: str,
    settings: Mapping[str, Any],
    theta: Mapping[str, torch.Tensor],
    initial_params: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> str:
    """SHA-256, in hexadecimal, of a rule's kind and settings and of the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    digest.update(json.dumps([kind, settings], sort_keys=True).encode())
    tensors = [(name, theta[name]) for name in sorted(theta)]
    for label, params in sorted((initial_params or {}).items()):
        tensors += [(_key(label, name), params[name]) for name in sorted(params)]
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_artifact(
    path: str | os.PathLike[str],
    rule: UpdateRule,
    theta: Mapping[str, torch.Tensor],
    provenance: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    initial_params: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> Artifact:
    """Write the exported file; a file already there is replaced at once or, if anything fails, not at all.

    Args:
        path: where to, by convention with the suffix ".safetensors"; its folder must exist.
        rule: the update rule.
        theta: its meta-parameters, stored as float32.
        provenance: how it was trained, JSON values; `library_version` is added.
        name: what to call it; by default the file's name without the suffix.
        initial_params: label of a family -> learned initial parameters by name, stored as float32.

    Returns:
        The artifact, as `load_artifact` will return it.

    Raises:
        ValueError: see `Artifact.of`.
        OSError: the folder does not exist or cannot be written to.
    """
    from safetensors.torch import save

    path = Path(path)
    artifact = Artifact.of(
        rule,
        theta,
        {"library_version": __version__, **(provenance or {})},
        name=name or path.stem,
        initial_params=initial_params,
    )
    metadata = {
        "format": FORMAT,
        "format_version": "2" if artifact.initial_params else "1",
        "name": artifact.name,
        "rule": rule.kind,
        "settings": json.dumps(rule.settings(), sort_keys=True),
        "provenance": json.dumps(artifact.provenance, sort_keys=True),
        "hash": artifact.hash,
    }
    tensors = dict(artifact.theta)
    if artifact.initial_params:
        # Labels are free text, and parameters have dots in their names: the metadata say what each tensor is.
        where = {_key(label, n): [label, n] for label, params in artifact.initial_params.items() for n in params}
        tensors |= {key: artifact.initial_params[label][n] for key, (label, n) in where.items()}
        metadata["initial_params"] = json.dumps(where)
    write_atomically(path, save(tensors, metadata))
    return artifact


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read an exported file and check it.

    Args:
        path: a file that `save_artifact` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an exported optimizer, is damaged, or needs a newer library; the message says which.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .safetensors file in it")
    if not path.exists():
        raise FileNotFoundError(f"no exported optimizer at {path}; check the path, or export one with save_artifact")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            theta = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated: copy or export it again"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but no exported optimizer; write one with save_artifact")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) < 1:
        raise ValueError(f"{path} is damaged: its format version is {version!r}; export it again")
    if int(version) > FORMAT_VERSION:
        made_by = _json(path, metadata, "provenance").get("library_version", "a newer version")
        raise ValueError(
            f"{path} has format version {version}, and this library reads up to {FORMAT_VERSION}; "
            f"it was written by learned_opt {made_by}: upgrade learned_opt"
        )
    provenance, settings = _json(path, metadata, "provenance"), _json(path, metadata, "settings")
    made_by = provenance.get("library_version", "an unknown version")
    initial: dict[str, Tensors] = {}
    for key, where in (_json(path, metadata, "initial_params") if "initial_params" in metadata else {}).items():
        if key not in theta:
            raise ValueError(f"{path} is damaged: it lacks the initial parameters {where}; export it again")
        initial.setdefault(where[0], {})[where[1]] = theta.pop(key)
    try:
        rule = rules.stored(metadata.get("rule", ""), settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}. It was written by learned_opt {made_by}: "
            "upgrade learned_opt, or export it again"
        ) from None
    # Of the settings as they were written: a later version may have more of them, at their defaults.
    found = content_hash(metadata["rule"], settings, theta, initial)
    try:
        check_theta(rule, theta)
        _check_initial(initial)
    except ValueError as error:
        if found != metadata.get("hash"):
            raise ValueError(f"{path} is damaged: {error}; export it again") from None
        raise ValueError(
            f"{path} does not fit this library's rule {rule.kind!r}: {error}. The file is whole, but was written by "
            f"learned_opt {made_by}, whose rule had other weights: use that version, or train again with this one"
        ) from None
    if found != metadata.get("hash"):
        raise ValueError(
            f"{path} is damaged: its content has the hash {found[:12]}…, but it was written with "
            f"{metadata.get('hash', '')[:12]}…; copy or export it again"
        )
    name = metadata.get("name", "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{path} is damaged: its name is {name!r}; export it again")
    artifact = Artifact(rule, theta, provenance, found, name, initial)
    _ALIVE.setdefault(artifact.identity, artifact)
    return artifact


def _json(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its {key} cannot be read ({error!r}); export it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: its {key} is no table of values; export it again")
    return value


def _key(label: str, name: str) -> str:
    """The name in the file of one family's learned initial parameter."""
    return f"initial_params/{label}/{name}"


def _check_initial(initial_params: Mapping[str, Tensors]) -> None:
    for label, params in initial_params.items():
        if not params:
            raise ValueError(f"initial_params[{label!r}] holds no parameters; leave the label out")
        for name, value in params.items():
            if not torch.isfinite(value).all():
                raise ValueError(f"initial_params[{label!r}][{name!r}] has non-finite values")


def check_theta(rule: UpdateRule, theta: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError that names a tensor which is missing, unknown, not finite, or not as the rule has it."""
    expected = rule.init_theta(torch.Generator().manual_seed(0))
    for name, like in expected.items():
        if name not in theta:
            raise ValueError(f"theta lacks {name!r}, which rule {rule.kind!r} needs")
        value = theta[name]
        if value.shape != like.shape or value.dtype != torch.float32:
            raise ValueError(
                f"theta[{name!r}] must be torch.float32 of shape {tuple(like.shape)}; "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"theta[{name!r}] has non-finite values")
    unknown = sorted(set(theta) - set(expected))
    if unknown:
        names = ", ".join(expected)
        raise ValueError(f"theta has {unknown[0]!r}, which rule {rule.kind!r} does not know; it has {names}")


def shipped() -> list[str]:
    """The names of the optimizers that ship with the library."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def load(weights: str | os.PathLike[str] | Artifact) -> Artifact:
    """The artifact that is meant: itself, a shipped optimizer, a file, or "adam".

    Args:
        weights: an `Artifact`; the name of a shipped optimizer; "adam", which is plain Adam (learning rate 1e-3, to be
            scaled by the optimizer's lr); the identity of an artifact in use; or the path of an exported file.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown name, or a file that cannot be used.
    """
    if isinstance(weights, Artifact):
        return weights
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights must be a path, a name or an Artifact; got {type(weights).__name__}")
    name = os.fspath(weights)
    alive = _ALIVE.get(name)
    if alive is not None:
        return alive
    if isinstance(weights, str):
        if (SHIPPED / f"{name}.safetensors").is_file() and _NAME.fullmatch(name):
            return load_artifact(SHIPPED / f"{name}.safetensors")
        if name == "adam":
            rule = rules.get("adam")
            return Artifact.of(rule, rule.init_theta(torch.Generator().manual_seed(0)), name="adam")
        base, _, digits = name.partition("@")
        if not Path(name).exists() and _NAME.fullmatch(base) and not name.endswith(".safetensors"):
            what = "are not in use in this process" if digits else "are neither a file nor a shipped optimizer"
            names = ", ".join([*shipped(), "adam"])
            raise ValueError(
                f"the weights {name!r} {what}; give the path of an exported file, an Artifact, or one of: {names}"
            )
    return load_artifact(name)
