"""Batch normalization for tasks that run together: the statistics of the rows at hand, of which some may not count.

Tasks of different sizes are evaluated in one program, the short ones padded with rows of their own. Each row's loss is
left out by itself, but batch normalization mixes rows: there the padding has to be left out of mean and variance.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
COUNTS = "counts"
"""The buffer of `RowStatistics` that says which rows count."""


class RowStatistics(_BatchNorm):
    """Takes the place of a batch normalization layer in train mode, with its parameters and no running statistics.

    Attributes:
        counts: buffer, a scalar when all rows count; otherwise 1 for rows that do and 0 for others, [rows].
    """

    counts: torch.Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, affine=layer.affine, track_running_stats=False)
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer(COUNTS, torch.ones(()))

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions from two on."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalized input [rows, features, …]; rows may also be a multiple of those that `counts` tells of."""
        counts = self.counts
        if counts.dim() == 0 or len(input) % len(counts):
            return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        # A module that folds time steps into the rows has each row's steps side by side.
        counts = counts[:, None].expand(-1, len(input) // len(counts)).reshape(-1, *[1] * (input.dim() - 1))
        dims = [0, *range(2, input.dim())]
        share = counts.expand_as(input[:, :1])
        share = share / share.sum()
        mean = (input * share).sum(dims, keepdim=True)
        variance = ((input - mean).square() * share).sum(dims, keepdim=True)
        normalized = (input - mean) * (variance + self.eps).rsqrt()
        if self.weight is None:
            return normalized
        shape = (-1, *[1] * (input.dim() - 2))
        return normalized * self.weight.reshape(shape) + self.bias.reshape(shape)


def use_row_statistics(module: nn.Module) -> tuple[nn.Module, bool]:
    """Put `RowStatistics` into the place of every batch normalization layer in train mode.

    Returns:
        (the module, another one only if it is such a layer itself; whether there was any such layer).
    """
    made: dict[nn.Module, RowStatistics] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(layer, BATCH_NORMS) or not layer.training:
            continue
        new = made.setdefault(layer, RowStatistics(layer))  # one layer in two places stays one
        if not name:
            return new, True
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new)
    return module, bool(made)
