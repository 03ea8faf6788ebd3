"""Update rules: pure functions of (theta, gradients, parameters, rule state), and the table of named configurations."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from learned_opt.rules.adam import AdamRule, AdamRuleConfig
from learned_opt.rules.base import (
    RuleConfig,
    UpdateRule,
    check_types,
    chunked_update,
    fitting_chunk,
    slice_coordinates,
)
from learned_opt.rules.gated import GatedRule, GatedRuleConfig
from learned_opt.rules.lstm import LSTMRule, LSTMRuleConfig
from learned_opt.rules.mixture import MixtureRule, MixtureRuleConfig
from learned_opt.rules.sgd import SGDRule, SGDRuleConfig

__all__ = [
    "RULES",
    "AdamRule",
    "AdamRuleConfig",
    "GatedRule",
    "GatedRuleConfig",
    "LSTMRule",
    "LSTMRuleConfig",
    "MixtureRule",
    "MixtureRuleConfig",
    "RuleConfig",
    "SGDRule",
    "SGDRuleConfig",
    "UpdateRule",
    "chunked_update",
    "fitting_chunk",
    "get",
    "slice_coordinates",
    "stored",
]

_KINDS: dict[str, tuple[Callable[[Any], UpdateRule], type[RuleConfig]]] = {
    AdamRule.kind: (AdamRule, AdamRuleConfig),
    GatedRule.kind: (GatedRule, GatedRuleConfig),
    LSTMRule.kind: (LSTMRule, LSTMRuleConfig),
    MixtureRule.kind: (MixtureRule, MixtureRuleConfig),
    SGDRule.kind: (SGDRule, SGDRuleConfig),
}

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "compact": ("lstm", {}),
    "rnnprop": ("lstm", {"dense_units": 20, "num_layers": 2, "hidden_size": 20}),
    "l2l": (
        "lstm",
        {"inputs": "log_and_sign", "num_layers": 2, "hidden_size": 20, "output_scale": 0.1, "output_tanh": False},
    ),
    "mixture": ("mixture", {}),
    "paced": ("mixture", {"growth": 0.1, "hidden_size": 1}),
    "turned": ("mixture", {"growth": 0.1, "hidden_size": 1, "basis": 128}),
    "gated": ("gated", {}),
    "adam": ("adam", {}),
    "sgd": ("sgd", {}),
}
"""Named configurations: name -> (kind, settings). A new rule is one file and one line here."""


def get(name: str, **settings: Any) -> UpdateRule:
    """The update rule of this name, with some of its settings replaced.

    Args:
        name: a name in `RULES` ("compact", "rnnprop", "l2l", "adam") or a kind ("lstm").
        **settings: fields of the rule's configuration.

    Raises:
        ValueError: an unknown name (near matches are suggested), an unknown setting, or a value out of range.
    """
    kind, preset = RULES.get(name, (name, {}))
    if kind not in _KINDS:
        names = sorted({*RULES, *_KINDS})
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"
        raise ValueError(f"unknown update rule {name!r}; {hint}")
    make, config = _KINDS[kind]
    known = [field.name for field in dataclasses.fields(config)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(f"rule {name!r} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    check_types(name, config, settings)
    made = config(**{**preset, **settings})
    for key, value in settings.items():  # what their own ranges let through
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} of rule {name!r} must be finite; got {value!r}")
    return make(made)


def stored(kind: str, settings: Mapping[str, Any]) -> UpdateRule:
    """The update rule that an exported file names, by an earlier version, too.

    Args:
        kind: as in the file.
        settings: as in the file; some may be former ones that did nothing (`RuleConfig.former_settings`).

    Raises:
        ValueError: as with `get`; a former setting at any other value counts as unknown.
    """
    former = _KINDS[kind][1].former_settings if kind in _KINDS else {}
    return get(kind, **{key: value for key, value in settings.items() if key not in former or former[key] != value})
