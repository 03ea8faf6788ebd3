"""Suites: named, frozen sets of families, so that results of different rules and recipes can be compared.

"train" and "validation" are small networks of many kinds to meta-train on and to choose a checkpoint by.
"test_small" and the larger "test" hold whole families and architectures that neither has; they are run on meta-test
draws. Nothing is downloaded. A suite never changes once released: a new one gets a new name.
"""

from __future__ import annotations

from typing import Any

import tasks
from learned_opt.task import TaskFamily

_Described = dict[str, dict[str, Any]]

_DIGITS: dict[str, Any] = {"name": "image_mlp", "dataset": "digits"}

_TRAIN: _Described = {
    "digits sigmoid 20": {**_DIGITS, "hidden": [20], "activation": "sigmoid"},
    "digits tanh 16-16": {**_DIGITS, "hidden": [16, 16], "activation": "tanh", "init": "fan_in", "init_scale": 1.0},
    "digits relu 32": {**_DIGITS, "hidden": [32], "activation": "relu", "init": "fan_in", "init_scale": 1.4},
    "digits elu 24-16-16": {
        **_DIGITS,
        "hidden": [24, 16, 16],
        "activation": "elu",
        "init": "fan_in",
        "init_scale": 1.0,
    },
    "breast cancer tanh": {"name": "tabular", "dataset": "breast_cancer"},
    "diabetes silu": {"name": "tabular", "dataset": "diabetes", "activation": "silu"},
    "quadratic": {"name": "spectrum_quadratic"},
    "autoencoder": {"name": "image_autoencoder", "hidden": [24], "code": 6},
}

_VALIDATION: _Described = {
    "digits silu 24-24": {**_DIGITS, "hidden": [24, 24], "activation": "silu", "init": "fan_in", "init_scale": 1.0},
    "digits leaky relu 48": {
        **_DIGITS,
        "hidden": [48],
        "activation": "leaky_relu",
        "init": "fan_in",
        "init_scale": 1.4,
    },
    "wine elu": {"name": "tabular", "dataset": "wine", "activation": "elu"},
    "rosenbrock": {"name": "rosenbrock"},
}

_TEST_SMALL: _Described = {
    "digits gelu 40": {**_DIGITS, "hidden": [40], "activation": "gelu", "init": "fan_in", "init_scale": 1.0},
    "convolutions": {"name": "image_conv", "channels": [4, 8], "batch_size": 32},
    "sinusoids": {"name": "sinusoid"},
    "traffic": {"name": "forecasting"},
    "ratings": {"name": "recommendation"},
    "lasso": {"name": "lasso"},
    "characters": {"name": "char_rnn", "hidden": 16, "batch_size": 8, "length": 12},
}

_TEST: _Described = {
    **_TEST_SMALL,
    "digits gelu 128-128": {**_DIGITS, "hidden": [128, 128], "activation": "gelu", "init": "fan_in", "init_scale": 1.0},
    "digits sigmoid 20 x 6": {
        **_DIGITS,
        "hidden": [20] * 6,
        "activation": "sigmoid",
        "init": "fan_in",
        "init_scale": 2.0,
    },
    "batch-normalized convolutions": {"name": "image_conv", "norm": "batch", "batch_size": 32},
    "layer-normalized convolutions": {
        "name": "image_conv",
        "norm": "layer",
        "activation": "gelu",
        "batch_size": 32,
    },
    "variational autoencoder": {
        "name": "image_autoencoder",
        "variational": True,
        "hidden": [64, 32],
        "activation": "gelu",
    },
    "gated recurrence": {"name": "char_rnn", "cell": "gru", "batch_size": 8},
    "transformer": {"name": "char_transformer", "batch_size": 8},
    "finance": {"name": "forecasting", "kind": "finance"},
    "matrix factorization": {"name": "matrix_factorization"},
    "logistic regression": {"name": "logistic_regression"},
    "pendulum": {"name": "pendulum", "num_steps": 25},
    "cart and pole": {"name": "cart_pole", "num_steps": 25},
    "plateau": {"name": "plateau"},
    "saddle": {"name": "saddle"},
    "ackley": {"name": "ackley"},
}

SUITES: dict[str, _Described] = {
    "train": _TRAIN,
    "validation": _VALIDATION,
    "test_small": _TEST_SMALL,
    "test": _TEST,
}
"""name -> label -> a family's name and fields, as a configuration file would hold them."""


def suite(name: str) -> dict[str, TaskFamily]:
    """The families of a suite, by label.

    Args:
        name: one of `SUITES`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}; got {name!r}")
    return {label: tasks.get(**described) for label, described in SUITES[name].items()}
