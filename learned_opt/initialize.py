"""Learned initial parameters put into a module: the start that was meta-learned beside the update rule."""

from __future__ import annotations

import os

import torch
from torch import nn

from learned_opt.artifact import Artifact, load


def copy_initial_parameters(
    module: nn.Module, weights: str | os.PathLike[str] | Artifact, label: str | None = None
) -> None:
    """Copy learned initial parameters into a module, in place.

    The module must be the one that the family trains: with the same names of parameters, of the same shapes, as a
    `tasks.ModuleFamily` on such a module has. Its device and dtype stay; buffers are left alone. Nothing is copied if
    anything does not fit.

    Args:
        module: what to initialize.
        weights: the exported optimizer, as `learned_opt.load` takes it.
        label: the family's label in the run's configuration; it may be left out where there is only one.

    Raises:
        ValueError: the optimizer holds no such initial parameters, or names or shapes differ.
    """
    artifact = load(weights)
    learned = artifact.initial_parameters(label)
    own = dict(module.named_parameters())
    missing, extra = [n for n in own if n not in learned], [n for n in learned if n not in own]
    if missing or extra:
        raise ValueError(
            "the module is not the one that the initial parameters were learned for: "
            + (f"they have no {', '.join(missing)}" if missing else f"it has no {', '.join(extra)}")
            + "; initialize the module that was meta-trained on, or copy by hand from Artifact.initial_parameters"
        )
    for name, value in learned.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(own[name].shape)} in the module, but {tuple(value.shape)} where "
                "it was learned; build the module with the sizes it was meta-trained with"
            )
    with torch.no_grad():
        for name, value in learned.items():
            own[name].copy_(value)
