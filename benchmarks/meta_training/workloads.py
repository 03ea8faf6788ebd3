"""The workloads, which are presets of the package, and the arithmetic that none of their implementations can avoid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tasks
from learned_opt import config as configuration
from learned_opt import rules
from learned_opt.config import RunConfig
from learned_opt.rules import LSTMRule
from learned_opt.task import TaskFamily
from tasks.image_conv import ImageConv
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

TITLES = {
    "w1": "digits, MLP 64-20-10",
    "w2": "quadratics, 10 dimensions",
    "w3": "W1 by PES",
    "w4": "digits, convolutions",
    "w5": "W1, exact",
}
"""Presets of the package -> what they are."""


@dataclasses.dataclass(frozen=True)
class SpeedWorkload:
    """A preset, read as something to be timed.

    A particle of PES is an antithetic pair: its two arms together count as one, in rates and in the arithmetic.

    Attributes:
        name: of the preset.
        settings: what it says.
    """

    name: str
    settings: RunConfig

    @classmethod
    def of(cls, name: str, *, truncation: int | None = None, num_particles: int | None = None) -> SpeedWorkload:
        """The preset of this name, with a truncation or a number of particles of one's own."""
        settings = configuration.preset(name)
        changes = {"truncation": truncation, "num_particles": num_particles}
        trainer = dataclasses.replace(settings.trainer, **{k: v for k, v in changes.items() if v is not None})
        return cls(name, dataclasses.replace(settings, trainer=trainer))

    @property
    def pairs(self) -> bool:
        """Whether particles are antithetic pairs."""
        return self.settings.estimator == "pes"

    @property
    def exact(self) -> bool:
        """Whether the meta-gradient goes through the inner gradients."""
        return self.settings.estimator_settings.get("order", 1) == 2

    @property
    def num_particles(self) -> int:
        """Particles in flight, or pairs."""
        return self.settings.trainer.num_particles // (2 if self.pairs else 1)

    @property
    def truncation(self) -> int:
        """Inner steps per meta-gradient."""
        return self.settings.trainer.truncation

    @property
    def episode(self) -> int:
        """Outer steps from a task's start to its reset."""
        return max(self.settings.trainer.horizons.longest // self.truncation, 1)

    @property
    def rule(self) -> LSTMRule:
        """The update rule."""
        found = rules.get(self.settings.rule, **self.settings.rule_settings)
        assert isinstance(found, LSTMRule)
        return found

    @property
    def family(self) -> TaskFamily:
        """The one task family."""
        (family,) = tasks.build(self.settings.families).values()
        return family

    @property
    def rule_flops(self) -> float:
        """Floating-point operations of the rule's matrix products, an inner step and particle.

        Backpropagation needs each product three times: forward, for the weights' and for the inputs' derivatives; an
        antithetic pair needs it forward, twice.
        """
        return self.num_parameters * coordinate_flops(self.rule) * (2 if self.pairs else 3)

    @property
    def task_flops(self) -> float:
        """The same of the task's own gradient; its derivative, where the gradient is exact, costs it twice again."""
        return gradient_flops(self.family) * (2 if self.pairs else 3 if self.exact else 1)

    @property
    def num_parameters(self) -> int:
        """Parameters of one task."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.family).values())


def coordinate_flops(rule: LSTMRule) -> float:
    """Floating-point operations of the matrix products of one step of one coordinate, forward alone."""
    theta = _shapes(rule)
    return float(sum(2 * math.prod(shape) for name, shape in theta.items() if name.endswith("weight")))


def _shapes(rule: LSTMRule) -> dict[str, tuple[int, ...]]:
    import torch

    return {name: tuple(value.shape) for name, value in rule.init_theta(torch.Generator().manual_seed(0)).items()}


def gradient_flops(family: TaskFamily) -> float:
    """Floating-point operations of the matrix products in one gradient of a task's loss.

    Every layer's product is made forward and for its weights; for its inputs too, the first layer's excepted.
    """
    if isinstance(family, Quadratic):
        return 4.0 * family.dim**2
    products = forward_flops(family)
    return 3 * sum(products) - products[0]


def forward_flops(family: TaskFamily) -> list[float]:
    """Floating-point operations of each layer's product in one evaluation of a network on a batch.

    Raises:
        ValueError: a family whose arithmetic is not known here.
    """
    if not isinstance(family, ImageMLP | ImageConv):
        raise ValueError(f"the arithmetic of {family.name} is not known; use image_mlp, image_conv or quadratic")
    pixels = family.load()[0].shape[1]
    if isinstance(family, ImageMLP):
        widths = [pixels, *family.hidden, family.num_outputs()]
        return [2.0 * family.batch_size * a * b for a, b in zip(widths, widths[1:])]
    side, width, out = math.isqrt(pixels), 1, []
    for channels in family.channels:
        out.append(2.0 * family.batch_size * side**2 * 9 * width * channels)
        width, side = channels, side // 2 if side >= 2 else side
    return [*out, 2.0 * family.batch_size * width * family.num_outputs()]


def parameter_shapes(family: TaskFamily) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a task's parameters, in order."""
    from learned_opt.task import draw_task

    _, params = draw_task(family, "meta_train", 0)
    return {name: tuple(value.shape) for name, value in params.items()}


def floors(workload: SpeedWorkload, flops_per_second: float) -> tuple[float, float]:
    """Inner steps x particles per second if products took all the time: the rule's, and the rule's and the task's.

    Args:
        workload: what is computed.
        flops_per_second: the machine's rate at large matrix products, positive.
    """
    return flops_per_second / workload.rule_flops, flops_per_second / (workload.rule_flops + workload.task_flops)


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError naming the first that is no workload."""
    for name in names:
        if name not in TITLES:
            raise ValueError(f"unknown workload {name!r}; choose from {', '.join(TITLES)}")
