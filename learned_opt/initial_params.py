"""Learned initial parameters beside the update rule's weights: their settings, and where they stand in theta.

theta holds one flat vector [num_parameters] for every family whose tasks are to start from learned parameters, under
the name "initial_params.<label>", after the update rule's own tensors. Estimators treat it like any other tensor of
theta: backpropagation differentiates it, evolution strategies perturb it. With the rule held fixed this is
model-agnostic meta-learning (Finn, Abbeel and Levine 2017); with both learned it is the idea of the LSTM meta-learner
(Ravi and Larochelle 2017).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from learned_opt.batched import BatchedFamily
from learned_opt.particles import INITIAL_PREFIX, rule_part
from learned_opt.task import Tensors, task_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialParamsConfig:
    """Which families' tasks start from learned parameters, and how those are learned.

    The meta-loss keeps measuring losses against f₀ at the parameters that the family draws for the task, so that
    learning where to start does not move the scale.

    Attributes:
        families: labels, with shell wildcards ("*" for all); empty for none.
        learning_rate: of the meta-optimizer for them, positive; it follows the same schedule as that of the rule.
        clip_norm: bound on the norm of each family's meta-gradient with respect to them, positive.
        seed: names the draw of the family's own parameters that they start out as, non-negative.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    families: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    clip_norm: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "families", tuple(self.families))
        for name in ("learning_rate", "clip_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"initial_params.{name} must be positive and finite; got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"initial_params.seed must be non-negative; got {self.seed}")

    def labels(self, families: Iterable[str]) -> list[str]:
        """The labels among `families` that are meant.

        Raises:
            ValueError: a pattern that matches none.
        """
        families = list(families)
        for pattern in self.families:
            if not fnmatch.filter(families, pattern):
                raise ValueError(
                    f"initial_params.families names {pattern!r}, which matches no family; "
                    f"there are {', '.join(families)}"
                )
        return [label for label in families if any(fnmatch.fnmatchcase(label, p) for p in self.families)]


def name_of(label: str) -> str:
    """The name in theta of this family's learned initial parameters."""
    return INITIAL_PREFIX + label


def is_initial(name: str) -> bool:
    """Whether this name in theta is that of learned initial parameters."""
    return name.startswith(INITIAL_PREFIX)


def with_initial(
    theta: Mapping[str, torch.Tensor], batched: Mapping[str, BatchedFamily], config: InitialParamsConfig
) -> Tensors:
    """theta and, behind it, the initial parameters of every family that is to learn them.

    Args:
        theta: the update rule's weights, and possibly initial parameters to go on from.
        batched: the families by label.
        config: which of them.

    Returns:
        A new dict; initial parameters that theta does not hold are the family's own of the configured seed.

    Raises:
        ValueError: a pattern that matches no family, or initial parameters in theta of another number or of a family
            that is not to learn them.
    """
    labels = config.labels(batched)
    out = rule_part(dict(theta))
    unknown = [name for name in theta if is_initial(name) and name.removeprefix(INITIAL_PREFIX) not in labels]
    if unknown:
        raise ValueError(
            f"theta holds {unknown[0]!r}, but initial_params.families does not name that family; add it there, or "
            "leave the tensor out"
        )
    for label in labels:
        family, name = batched[label], name_of(label)
        drawn = (
            theta[name] if name in theta else family.start("meta_train", [task_seed("meta_train", config.seed)])[1][0]
        )
        check_size(label, drawn, family)
        out[name] = drawn
    return out


def check_size(label: str, values: torch.Tensor, batched: BatchedFamily) -> None:
    """Raise ValueError unless these are as many numbers as a task of the family has parameters."""
    if values.shape != (batched.num_parameters,):
        raise ValueError(
            f"the learned initial parameters of family {label!r} have shape {tuple(values.shape)}, but its tasks have "
            f"{batched.num_parameters} parameters; use another label for a family of another shape"
        )


def flat_params(label: str, params: Mapping[str, torch.Tensor], batched: BatchedFamily) -> torch.Tensor:
    """Learned initial parameters by name as one vector [num_parameters], of the family's device and dtype.

    Raises:
        ValueError: names or shapes are not those of the family.
    """
    wanted, found = dict(zip(batched.names, batched.shapes)), {n: tuple(v.shape) for n, v in params.items()}
    if found != wanted:
        raise ValueError(
            f"the learned initial parameters of family {label!r} have shapes {found}, but its tasks have {wanted}; use "
            "another label for a family of another shape"
        )
    flat = torch.cat([params[name].reshape(-1) for name in batched.names])
    return flat.to(batched.device, batched.dtype)


def split(theta: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
    """(the update rule's weights, label -> flat learned initial parameters)."""
    return rule_part(dict(theta)), {
        name.removeprefix(INITIAL_PREFIX): value for name, value in theta.items() if is_initial(name)
    }
