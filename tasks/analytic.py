"""Classic test functions of optimization: valleys, many local minima, saddles and plateaus, in any dimension.

Each is scaled so that its values are of order one to a hundred where tasks start, and is at least 0 everywhere. A task
draws where the optimum lies (Rosenbrock's is fixed) and where to start; `optimum` returns the former, and the loss
there is 0.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers from U(−bound, bound)."""
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestFunction(TaskFamily):
    """A function of one vector x, "x" [dim], shifted to an optimum drawn from U(−1, 1) in every coordinate.

    Attributes:
        dim: length of x.
        start: x starts uniformly within this distance of 0 in every coordinate; positive.
    """

    __test__: ClassVar[bool] = False  # not for a test runner to collect
    fewest_dims: ClassVar[int] = 1
    dim: int = 10
    start: float = 2.0

    def __post_init__(self) -> None:
        if self.dim < self.fewest_dims:
            raise ValueError(f"dim must be at least {self.fewest_dims}; got {self.dim}")
        if not 0 < self.start < math.inf:
            raise ValueError(f"start must be positive and finite; got {self.start}")

    @abstractmethod
    def value(self, z: torch.Tensor) -> torch.Tensor:
        """The function at z [dim], relative to the optimum."""

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return {"center": uniform((self.dim,), 1.0, generator)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"x": uniform((self.dim,), self.start, generator)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self.value(params["x"] - task["center"])

    def optimum(self, task: Tensors) -> Tensors:
        """Parameters with loss 0, the minimum."""
        return {"x": task["center"].clone()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rosenbrock(TestFunction):
    """A curved valley: the mean over i of (xᵢ₊₁ − xᵢ²)² + (1 − xᵢ)²/100, which is Rosenbrock's function divided by 100.

    The optimum is 0 at (1, …, 1). Starts are U(−2, 2). Source: Rosenbrock, 1960.
    """

    name: ClassVar[str] = "rosenbrock"
    fewest_dims: ClassVar[int] = 2

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return {}

    def value(self, z: torch.Tensor) -> torch.Tensor:
        return ((z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2 / 100).mean()

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self.value(params["x"])

    def optimum(self, task: Tensors) -> Tensors:
        return {"x": torch.ones(self.dim)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ackley(TestFunction):
    """A funnel with ripples: 20 (1 − exp(−0.2 |z|/√dim)) + e − exp(mean cos 2πz), z = x − center.

    The optimum is 0, where the function has a kink. Source: Ackley, 1987.
    """

    name: ClassVar[str] = "ackley"

    def value(self, z: torch.Tensor) -> torch.Tensor:
        distance = (z.square().mean() + 1e-24).sqrt()  # a gradient of zero, not NaN, at the optimum
        ripples = math.e - torch.cos(2 * math.pi * z).mean().exp()
        return 20 * -torch.expm1(-0.2 * distance) + ripples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rastrigin(TestFunction):
    """A bowl with many local minima, about one per unit cube: mean (z² + 10 (1 − cos 2πz)), z = x − center.

    The optimum is 0. Source: Rastrigin, 1974.
    """

    name: ClassVar[str] = "rastrigin"

    def value(self, z: torch.Tensor) -> torch.Tensor:
        return (z.square() + 10 * (1 - torch.cos(2 * math.pi * z))).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saddle(TestFunction):
    """Starts close to a strict saddle: mean over the first half of (z² − 1)²/4, plus mean over the rest of z²/2.

    At z = 0 the loss is 1/4, the gradient zero, and the curvature negative along the first half of the coordinates,
    rounded up. Starts lie within `start` (0.01 by default) of it. The optimum is 0, at z = ±1 in the first half and 0
    in the rest.
    """

    name: ClassVar[str] = "saddle"
    fewest_dims: ClassVar[int] = 2
    start: float = 0.01

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"x": task["center"] + uniform((self.dim,), self.start, generator)}

    def value(self, z: torch.Tensor) -> torch.Tensor:
        escape, bowl = z[: (self.dim + 1) // 2], z[(self.dim + 1) // 2 :]
        return (escape.square() - 1).square().mean() / 4 + bowl.square().mean() / 2

    def optimum(self, task: Tensors) -> Tensors:
        shift = torch.zeros_like(task["center"])
        shift[: (self.dim + 1) // 2] = 1
        return {"x": task["center"] + shift}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau(TestFunction):
    """Flat far away: mean of z²/(1 + z²), z = x − center, whose gradient falls with the cube of the distance.

    Starts are U(−5, 5) by default. The optimum is 0; the plateau is at 1.
    """

    name: ClassVar[str] = "plateau"
    start: float = 5.0

    def value(self, z: torch.Tensor) -> torch.Tensor:
        return (z.square() / (1 + z.square())).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Griewank(TestFunction):
    """A wide bowl with ripples that couple all coordinates: 1 + mean z²/4 − ∏ᵢ cos(10 zᵢ/√i), z = x − center.

    With ten coordinates this is Griewank's function of 10 z. The product counts them from 1. The optimum is 0; there
    are many local minima. Source: Griewank, 1981.
    """

    name: ClassVar[str] = "griewank"

    def value(self, z: torch.Tensor) -> torch.Tensor:
        waves = torch.cos(z * (10 / torch.arange(1, self.dim + 1, dtype=z.dtype, device=z.device).sqrt()))
        # Halves times halves: the backward pass of `prod` looks for zeros.
        while len(waves) > 1:
            half = len(waves) // 2
            waves = torch.cat([waves[:half] * waves[half : 2 * half], waves[2 * half :]])
        return 1 + z.square().mean() / 4 - waves[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Powell(TestFunction):
    """Powell's singular function divided by 100, averaged over quadruples (a, b, c, d) of z = x − center.

    (a + 10 b)² + 5 (c − d)² + (b − 2 c)⁴ + 10 (a − d)⁴, each of four coordinates in a row. The optimum is 0, at z = 0,
    where half of the Hessian's eigenvalues are 0: along those directions the loss is of fourth order. Source: Powell,
    1962.

    Attributes:
        dim: length of x; a multiple of 4.
    """

    name: ClassVar[str] = "powell"
    fewest_dims: ClassVar[int] = 4
    dim: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4; got {self.dim}")

    def value(self, z: torch.Tensor) -> torch.Tensor:
        a, b, c, d = z.reshape(-1, 4).unbind(1)
        squares = (a + 10 * b).square() + 5 * (c - d).square()
        return (squares + (b - 2 * c).square().square() + 10 * (a - d).square().square()).mean() / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levy(TestFunction):
    """A bowl whose ripples grow with the distance: Levy's function of 4 z, divided by `dim`, z = x − center.

    sin² πz₁ + Σ zᵢ² (1 + 10 sin²(πzᵢ + 1)) + z² (1 + sin² 2πz), the sum over all coordinates but the last, the last
    term of the last. The optimum is 0; there are many local minima. Source: Levy and Montalvo, 1985.
    """

    name: ClassVar[str] = "levy"

    def value(self, z: torch.Tensor) -> torch.Tensor:
        first, others, last = z[0], z[:-1], z[-1]
        ripples = (others.square() * (1 + 10 * torch.sin(math.pi * others + 1).square())).sum()
        end = last.square() * (1 + torch.sin(2 * math.pi * last).square())
        return (torch.sin(math.pi * first).square() + ripples + end) / self.dim
