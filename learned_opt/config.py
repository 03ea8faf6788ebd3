"""The configuration of a run: frozen dataclasses, YAML files and presets.

A `RunConfig` is plain values all the way down, so that the file written to the run folder reproduces the run. pydantic
checks the types of what comes out of a file; each dataclass checks its own ranges when it is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from learned_opt.evaluation import DEFAULT_BASELINES, EvaluationConfig
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.tracking import TrackingConfig

if TYPE_CHECKING:
    import yaml

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes.

    Attributes:
        rule: name of the update rule, see `learned_opt.rules.RULES`.
        rule_settings: settings of the rule that differ from the named ones.
        export_settings: settings of the rule that the exported file has instead of those it is trained with, for
            instance because training on short stretches would learn to undo them; theta's shapes must stay.
        export_share: how far the exported theta is from the one that training began with, as a share of the way that
            training took it, in (0, 1]: what lies between often does better on what training had none of (Wortsman et
            al. 2022, arXiv:2109.01903).
        start_from: exported file, or name of an optimizer that ships, whose theta to start from, for instance to go on
            with another estimator; empty to start afresh.
        families: label -> task family to meta-train on, as {name: …, setting: value, …}.
        validation_families: label -> family that the checkpoint is chosen on; empty for the training families.
        estimator: name of the meta-gradient estimator, see `learned_opt.estimators.ESTIMATORS`.
        estimator_settings: its settings.
        trainer: horizons, meta-loss, meta-optimizer, numbers of steps.
        test_families: label -> family that the result is reported on, on meta-test tasks; empty for the training
            families.
        baselines: what it is compared with, names in `learned_opt.evaluation.BASELINES`; empty for no evaluation.
        evaluation: how it is compared.
        tracking: Weights & Biases.
        diagnose_every: outer steps between measurements of the estimator's bias and noise at the current theta
            (`learned_opt.estimators.compare`), logged with the other metrics; 0 for none. Each costs some hundred
            outer steps' time, and changes nothing else.
        checkpoint_every: outer steps between checkpoints, at least 1.
        keep_checkpoints: how many of the last to keep, at least 1.
        num_threads: of torch, at least 1; the same number gives the same bits.
        device: "cpu" or "cuda".
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    rule: str = "compact"
    rule_settings: Settings = dataclasses.field(default_factory=dict)
    export_settings: Settings = dataclasses.field(default_factory=dict)
    export_share: float = 1.0
    start_from: str = ""
    families: dict[str, Settings] = dataclasses.field(default_factory=lambda: {"digits": {"name": "image_mlp"}})
    validation_families: dict[str, Settings] = dataclasses.field(default_factory=dict)
    estimator: str = "backprop"
    estimator_settings: Settings = dataclasses.field(default_factory=dict)
    trainer: MetaTrainerConfig = MetaTrainerConfig()
    test_families: dict[str, Settings] = dataclasses.field(default_factory=dict)
    baselines: tuple[str, ...] = DEFAULT_BASELINES
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    diagnose_every: int = 0
    checkpoint_every: int = 50
    keep_checkpoints: int = 3
    num_threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.export_share <= 1:
            raise ValueError(f"export_share must be over 0 and at most 1, which is all; got {self.export_share}")
        if self.diagnose_every < 0:
            raise ValueError(f"diagnose_every must be non-negative; got {self.diagnose_every}")
        if not self.families:
            raise ValueError("families is empty; name at least one task family to meta-train on")
        for where in (self.families, self.validation_families, self.test_families):
            for label, settings in where.items():
                if not isinstance(settings.get("name"), str):
                    raise ValueError(
                        f"family {label!r} needs a name, as in {{name: image_mlp, activation: relu}}; got {settings}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: Path) -> None:
        """Write the configuration as YAML."""
        import yaml

        from learned_opt.files import write_atomically

        _, dumper = _yaml_classes()
        text = yaml.dump(self.to_dict(), Dumper=dumper, sort_keys=False, allow_unicode=True)
        write_atomically(path, text.encode())


def from_dict(values: Mapping[str, Any], *, source: str = "the configuration") -> RunConfig:
    """A RunConfig from plain values; what is missing keeps its default.

    Args:
        values: settings by name. Beside them `preset` may name one that ships: what is missing is then as it is there.
            Groups of settings (`trainer`, `evaluation`, and what has names of its own in them) are taken setting by
            setting; everything else, as the settings of a rule or a list of families, is taken whole.
        source: what messages call the values.

    Raises:
        ValueError: unknown keys (near matches are suggested), wrong types, or values out of range; all are listed.
    """
    from pydantic import TypeAdapter, ValidationError

    values = dict(values)
    if "preset" in values:
        try:
            base = preset(str(values.pop("preset")))
        except ValueError as error:
            raise ValueError(f"{source} is not valid:\n  preset: {error}") from None
        values = _over(base, values)
    try:
        return TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "unexpected_keyword_argument":
                names = _field_names(item["loc"][:-1])
                near = difflib.get_close_matches(str(item["loc"][-1]), names, n=2)
                lines.append(
                    f"{where}: no such setting"
                    + (f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(names)}")
                )
            else:
                lines.append(
                    f"{where}: {item['msg'].removeprefix('Value error, ')}"
                    if where
                    else item["msg"].removeprefix("Value error, ")
                )
        raise ValueError(f"{source} is not valid:\n  " + "\n  ".join(lines)) from None


def _over(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a configuration, or of a group of its settings, with these in their place."""
    merged = _plain(dataclasses.asdict(base))
    for name, value in changes.items():
        group = getattr(base, str(name), None)
        together = dataclasses.is_dataclass(group) and isinstance(value, Mapping)
        merged[name] = _over(group, value) if together else value
    return merged


@functools.cache
def _yaml_classes() -> tuple[type[yaml.SafeLoader], type[yaml.SafeDumper]]:
    """A safe loader for which 3e-3 is a number and not a string, as everywhere else, and its dumper."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    number = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    for cls in (Loader, Dumper):
        cls.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader, Dumper


def read_yaml(text: str) -> Any:
    """The plain values in a YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    import yaml

    loader, _ = _yaml_classes()
    return yaml.load(text, Loader=loader)


def load(path: Path) -> RunConfig:
    """Read a YAML configuration file.

    Raises:
        ValueError: the file is missing, not YAML, not a mapping, or not a valid configuration.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8") from error
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings; got {type(values).__name__}")
    return from_dict(values, source=str(path))


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("learned_opt") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def preset(name: str) -> RunConfig:
    """The preset of this name.

    Raises:
        ValueError: there is none; near matches are suggested.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=2)
        raise ValueError(
            f"unknown preset {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}")
        )
    with resources.as_file(resources.files("learned_opt") / "presets" / f"{name}.yaml") as path:
        return load(path)


def _field_names(loc: tuple[Any, ...]) -> list[str]:
    """The settings there are at this place of a RunConfig."""
    value: Any = RunConfig()
    for part in loc:
        value = getattr(value, str(part), value)
    return [field.name for field in dataclasses.fields(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
