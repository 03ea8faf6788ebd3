"""Small members of every registered task family, for the contract suite and its relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import tasks
from learned_opt.task import TaskFamily
from tests.task_files import folder, write_omniglot, write_ratings

_QUADRATIC = {"name": "quadratic", "dim": 4}
_DIGITS = {"name": "image_mlp", "hidden": [4], "batch_size": 6}
_RATINGS = write_ratings(folder() / "u.data")
_OMNIGLOT = {
    "name": "omniglot",
    "data_dir": str(write_omniglot(folder() / "omniglot").parent),
    "num_ways": 3,
    "num_queries": 2,
}

CASES: dict[str, dict[str, Any]] = {
    "quadratic": _QUADRATIC,
    "quadratic-zero_start": {**_QUADRATIC, "convention": "zero_start"},
    "quadratic-uniform": {**_QUADRATIC, "convention": "uniform"},
    "image_mlp": _DIGITS,
    "image_mlp-logistic": {**_DIGITS, "hidden": []},
    "image_mlp-deep": {**_DIGITS, "hidden": [5, 4], "activation": "gelu", "init": "fan_in", "init_scale": 1.0},
    "image_mlp-layer": {**_DIGITS, "hidden": [5, 4], "activation": "relu", "init": "fan_in", "norm": "layer"},
    "image_mlp-label_noise": {**_DIGITS, "label_noise": 0.5},
    "image_mlp_sampled": {"name": "image_mlp_sampled", "hidden": [5, 4], "batch_size": 6, "least_batch_size": 2},
    "spectrum_quadratic": {"name": "spectrum_quadratic", "dim": 5},
    "spectrum_quadratic-noise": {"name": "spectrum_quadratic", "dim": 4, "noise": 0.3, "rotated": False},
    "rosenbrock": {"name": "rosenbrock", "dim": 4},
    "ackley": {"name": "ackley", "dim": 3},
    "rastrigin": {"name": "rastrigin", "dim": 3},
    "griewank": {"name": "griewank", "dim": 3},
    "levy": {"name": "levy", "dim": 3},
    "powell": {"name": "powell", "dim": 4},
    "saddle": {"name": "saddle", "dim": 5, "start": 0.1},
    "plateau": {"name": "plateau", "dim": 3},
    "lasso": {"name": "lasso", "num_rows": 5, "dim": 8},
    "robust_regression": {"name": "robust_regression", "num_rows": 8, "dim": 3, "delta": 0.05},
    "matrix_factorization": {"name": "matrix_factorization", "num_rows": 5, "num_columns": 4, "rank": 2},
    "linear_network": {"name": "linear_network", "dim": 3, "num_points": 5},
    "logistic_regression": {"name": "logistic_regression", "num_rows": 12, "dim": 3},
    "softmax_regression": {"name": "softmax_regression", "num_classes": 3, "num_rows": 12, "dim": 3},
    "tabular": {"name": "tabular", "hidden": [4], "num_features": 6, "batch_size": 5},
    "tabular-wine": {"name": "tabular", "dataset": "wine", "hidden": [], "num_rows": 20},
    "tabular-diabetes": {"name": "tabular", "dataset": "diabetes", "hidden": [4, 3], "activation": "silu"},
    "tabular-digits": {"name": "tabular", "dataset": "digits", "hidden": [4], "num_features": 10, "label_noise": 0.2},
    "image_conv": {"name": "image_conv", "channels": [2, 3], "batch_size": 4},
    "image_conv-layer": {"name": "image_conv", "channels": [2], "norm": "layer", "batch_size": 4, "activation": "tanh"},
    "image_conv-batch": {"name": "image_conv", "channels": [2, 3, 3, 3], "norm": "batch", "batch_size": 4},
    "image_autoencoder": {"name": "image_autoencoder", "hidden": [4], "code": 2, "batch_size": 4},
    "image_autoencoder-variational": {"name": "image_autoencoder", "hidden": [4], "code": 2, "variational": True},
    "char_mlp": {"name": "char_mlp", "context": 2, "embedding": 3, "hidden": 4, "length": 3, "batch_size": 3},
    "char_rnn": {"name": "char_rnn", "hidden": 4, "length": 3, "batch_size": 3},
    "char_rnn-gru": {"name": "char_rnn", "hidden": 4, "length": 3, "batch_size": 3, "cell": "gru"},
    "char_rnn-label_noise": {"name": "char_rnn", "hidden": 4, "length": 3, "batch_size": 3, "label_noise": 0.5},
    "char_transformer": {"name": "char_transformer", "width": 4, "length": 3, "batch_size": 3, "num_layers": 2},
    "sinusoid": {"name": "sinusoid", "hidden": [5, 4], "num_shots": 4, "num_queries": 7},
    "sinusoid-query": {"name": "sinusoid", "hidden": [5], "num_shots": 4, "num_queries": 7, "judge": "query"},
    "omniglot": {**_OMNIGLOT, "channels": [2, 2]},
    "omniglot-query": {**_OMNIGLOT, "channels": [2], "norm": "layer", "side": 14, "judge": "query"},
    "omniglot-label_noise": {**_OMNIGLOT, "channels": [2], "label_noise": 0.5, "judge": "query"},
    "omniglot-mlp": {**_OMNIGLOT, "num_shots": 2, "channels": [], "hidden": [3], "rotated": True},
    "recommendation": {"name": "recommendation", "num_users": 6, "num_items": 5, "rank": 2, "num_ratings": 12},
    "user_ratings": {"name": "user_ratings", "ratings_file": str(_RATINGS), "rank": 3, "batch_size": 5},
    "user_ratings-deep": {"name": "user_ratings", "ratings_file": str(_RATINGS), "rank": 2, "hidden": [3]},
    "forecasting": {"name": "forecasting", "length": 80, "num_lags": 6, "hidden": [4], "batch_size": 5},
    "forecasting-finance": {"name": "forecasting", "length": 80, "num_lags": 6, "hidden": [], "kind": "finance"},
    "pendulum": {"name": "pendulum", "hidden": [3], "num_steps": 3, "batch_size": 3},
    "cart_pole": {"name": "cart_pole", "hidden": [3], "num_steps": 3, "batch_size": 3},
    "reparametrized": {"name": "reparametrized", "family": _DIGITS},
    "reparametrized-global": {"name": "reparametrized", "family": _QUADRATIC, "scope": "global", "log_range": 1.0},
    "reparametrized-tensor": {"name": "reparametrized", "family": _DIGITS, "scope": "tensor", "probability": 0.5},
    "loss_scaling": {"name": "loss_scaling", "family": _QUADRATIC},
    "loss_offset": {"name": "loss_offset", "family": _DIGITS, "offset": 0.5},
    "loss_offset-optimum": {
        "name": "loss_offset",
        "family": {"name": "logistic_regression", "num_rows": 12, "dim": 3},
        "offset": -0.01,
        "above_optimum": True,
    },
    "delayed_gradients": {"name": "delayed_gradients", "family": _DIGITS, "delay": 2},
    "gradient_noise": {"name": "gradient_noise", "family": _DIGITS, "std": 0.1},
    "smaller_batches-text": {"name": "smaller_batches", "family": {"name": "char_rnn", "hidden": 4, "length": 5}},
    "smaller_batches": {"name": "smaller_batches", "family": _DIGITS},
    "convex_mixing": {"name": "convex_mixing", "family": _DIGITS, "dim": 3},
    "nested": {
        "name": "reparametrized",
        "scope": "tensor",
        "family": {
            "name": "convex_mixing",
            "family": {"name": "gradient_noise", "family": {"name": "reparametrized", "family": _DIGITS}},
        },
    },
    "nested-query": {
        "name": "loss_scaling",
        "family": {
            "name": "convex_mixing",
            "family": {
                "name": "reparametrized",
                "family": {"name": "sinusoid", "hidden": [3], "num_shots": 3, "num_queries": 4, "judge": "query"},
            },
        },
    },
}
"""label -> the family's name and fields, as a configuration file would hold them."""


def grouped_module() -> tasks.ModuleFamily:
    """A user's module on 12 groups of unequal size with a buffer of its own."""
    generator = torch.Generator().manual_seed(5)
    groups = torch.repeat_interleave(torch.arange(12), torch.arange(12) + 4)
    inputs = torch.randn(len(groups), 3, generator=generator)
    targets = (inputs.sum(1) + 0.1 * groups > 0).long()
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    return tasks.ModuleFamily(module, F.cross_entropy, tasks.GroupedData(inputs, targets, groups), batch_size=5)


def sampled_module() -> tasks.ModuleFamily:
    """A user's module on data sampled by a function."""

    def lines(split: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        slope = torch.randn((), generator=generator)
        inputs = torch.randn(8, 1, generator=generator)
        return inputs, slope * inputs

    return tasks.ModuleFamily(
        lambda: nn.Sequential(nn.Linear(1, 3), nn.ELU(), nn.Linear(3, 1)), F.mse_loss, lines, batch_size=3
    )


OWN = {"module-grouped": grouped_module, "module-sampled": sampled_module}
SHARED_ROWS = [
    label
    for label in [*CASES, *OWN]
    if "image_" in str(CASES.get(label, "")) or label.startswith(("tabular", "module-grouped"))
]
"""Those whose tasks share rows of numbers under the name "inputs"."""
LABELS = [*CASES, *OWN]


def make(label: str) -> TaskFamily:
    """The family of this label."""
    return OWN[label]() if label in OWN else tasks.get(**CASES[label])
