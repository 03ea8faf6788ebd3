"""Task families, and the table of their names.

`tasks.get(name, **config)` builds any of them, and `tasks.get(family.name, **family.config()) == family`. Importing
this package loads no data and needs torch and numpy alone; a family loads its data set when it is first used. A family
on data of your own is a `ModuleFamily`, which holds a module and a data set and is therefore made in Python rather than
by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from learned_opt.task import TaskFamily
from tasks.analytic import Ackley, Griewank, Levy, Plateau, Powell, Rastrigin, Rosenbrock, Saddle
from tasks.augment import (
    ConvexMixing,
    DelayedGradients,
    GradientNoise,
    LossOffset,
    LossScaling,
    Reparametrized,
    SmallerBatches,
)
from tasks.control import CartPole, Pendulum
from tasks.data.grouped import GroupedData
from tasks.data.images import DATASETS
from tasks.data.tabular import TABLES
from tasks.fields import check_finite, check_types
from tasks.forecasting import Forecasting
from tasks.image_autoencoder import ImageAutoencoder
from tasks.image_conv import ImageConv
from tasks.image_mlp import ImageMLP
from tasks.linear import (
    Lasso,
    LogisticRegression,
    MatrixFactorization,
    RobustRegression,
    SoftmaxRegression,
    SpectrumQuadratic,
)
from tasks.linear_network import LinearNetwork
from tasks.module import ModuleFamily
from tasks.omniglot import Omniglot
from tasks.quadratic import Quadratic
from tasks.recommendation import Recommendation
from tasks.sampled import SampledMLP, sample_families
from tasks.sinusoid import Sinusoid
from tasks.tabular import Tabular
from tasks.text import CharMLP, CharRNN, CharTransformer
from tasks.user_ratings import UserRatings

__all__ = ["FAMILIES", "GroupedData", "ModuleFamily", "build", "get", "sample_families"]

FAMILIES: dict[str, type[TaskFamily]] = {
    family.name: family
    for family in (
        Quadratic,
        SpectrumQuadratic,
        Rosenbrock,
        Ackley,
        Rastrigin,
        Griewank,
        Levy,
        Powell,
        Saddle,
        Plateau,
        Lasso,
        RobustRegression,
        MatrixFactorization,
        LinearNetwork,
        LogisticRegression,
        SoftmaxRegression,
        Tabular,
        ImageMLP,
        SampledMLP,
        ImageConv,
        ImageAutoencoder,
        CharMLP,
        CharRNN,
        CharTransformer,
        Sinusoid,
        Omniglot,
        Recommendation,
        UserRatings,
        Forecasting,
        Pendulum,
        CartPole,
        Reparametrized,
        LossScaling,
        LossOffset,
        GradientNoise,
        DelayedGradients,
        SmallerBatches,
        ConvexMixing,
    )
}
"""Every family that a name and a configuration rebuild. A new family is one file and one line here."""

_DATASETS = {**dict.fromkeys(TABLES, Tabular.name), **dict.fromkeys(DATASETS, ImageMLP.name)}


def get(name: str, **config: Any) -> TaskFamily:
    """The task family of this name.

    Args:
        name: a name in `FAMILIES`.
        **config: the family's fields; those left out keep their defaults.

    Raises:
        ValueError: an unknown name or field (near matches are suggested), a field without default that is left out, or
            a value of another type or out of range.
    """
    if name not in FAMILIES:
        if name == ModuleFamily.name:
            raise ValueError(
                "a family on your own module is made in Python, not by name: tasks.ModuleFamily(module, loss, data)"
            )
        if name in _DATASETS:
            raise ValueError(
                f"{name!r} is a data set and no task family; give it as the field dataset of one, as in "
                f"tasks.get({_DATASETS[name]!r}, dataset={name!r})"
            )
        raise ValueError(f"unknown task family {name!r}; {_suggest(name, sorted(FAMILIES))}")
    described = dataclasses.fields(cast(Any, FAMILIES[name]))
    fields = [field.name for field in described]
    for field in config:
        if field not in fields:
            raise ValueError(f"task family {name!r} has no field {field!r}; {_suggest(field, fields)}")
    for found in described:
        if found.default is found.default_factory is dataclasses.MISSING and found.name not in config:
            raise ValueError(f"task family {name!r} needs {found.name}; see the description of its fields")
    check_types(name, FAMILIES[name], config)
    family = FAMILIES[name](**config)
    check_finite(name, config)
    return family


def build(described: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskFamily]:
    """Families by label, from a mapping of labels to names and fields, as a configuration file holds them.

    An entry with the key "sample", a mapping of "num", "seed" (0 by default) and the ranges of `sample_families`,
    becomes several families, labelled with its label and what was drawn.

    Raises:
        ValueError: what `get` and `sample_families` raise, or an entry without a name.
    """
    families: dict[str, TaskFamily] = {}
    if not isinstance(described, Mapping):
        raise ValueError(f"families must be a mapping of labels to names and fields; got {described!r}")
    for label, values in described.items():
        if not isinstance(values, Mapping) or "name" not in values:
            raise ValueError(
                f"family {label!r} needs a name, as in {{name: image_mlp, activation: relu}}; got {values!r}"
            )
        fields = dict(values)
        name, sample = fields.pop("name"), fields.pop("sample", None)
        if sample is None:
            families[label] = get(name, **fields)
            continue
        if not isinstance(sample, Mapping) or "num" not in sample:
            raise ValueError(f"family {label!r}: sample must be a mapping with num and ranges; got {sample!r}")
        ranges = {key: value for key, value in sample.items() if key not in ("num", "seed")}
        drawn = sample_families(name, ranges, sample["num"], sample.get("seed", 0), **fields)
        families |= {f"{label} {what}": family for what, family in drawn.items()}
    return families


def _suggest(word: Any, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), known, n=3)
    # "mlp" and "conv" are too short for the ratio of equal letters, and yet say what is meant.
    near = near or [name for name in known if str(word) and str(word).lower() in name.split("_")]
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
