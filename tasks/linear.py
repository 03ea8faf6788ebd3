"""Problems of linear algebra and statistics on generated data, with known or computable optima."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors
from tasks.supervised import cross_entropy, with_noise


def _at_least(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def _newton(value: Callable[[torch.Tensor], torch.Tensor], solution: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The minimizer of a strictly convex, non-negative function of a vector; steps that overshoot are halved."""
    for _ in range(num_steps):
        hessian = torch.func.jacrev(torch.func.grad(value))(solution)
        step = torch.linalg.solve(hessian, torch.func.grad(value)(solution))
        limit, scale = float(value(solution)) * (1 + 1e-13), 1.0  # at the end values differ by rounding alone
        while float(value(solution - scale * step)) > limit and scale > 1e-9:
            scale /= 2
        solution = solution - scale * step
    return solution


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrumQuadratic(TaskFamily):
    """f(x) = ½ (x − c − ε)ᵀ H (x − c − ε), with a chosen spectrum of H and, where asked for, a minimum that jitters.

    H = Q diag(λ) Qᵀ with eigenvalues log-uniform between 1/condition and 1, both ends included, and Q a random
    rotation; c and the initial x, "x" [dim], are N(0, 1). ε is N(0, noise²), fresh at every step, so gradients have
    covariance noise² H². Without noise the optimum is 0, at c; with it the expected loss there is ½ noise² · trace H,
    the least there is.

    Attributes:
        dim: length of x; at least 2.
        condition: largest eigenvalue over smallest; at least 1.
        rotated: whether Q is a random rotation; otherwise it is the identity, and coordinates do not interact.
        noise: see above; at least 0.
    """

    name: ClassVar[str] = "spectrum_quadratic"
    dim: int = 20
    condition: float = 100.0
    rotated: bool = True
    noise: float = 0.0

    def __post_init__(self) -> None:
        _at_least(2, dim=self.dim)
        if not 1 <= self.condition < math.inf:
            raise ValueError(f"condition must be at least 1 and finite; got {self.condition}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be non-negative and finite; got {self.noise}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        exponents = torch.rand(self.dim, generator=generator, dtype=torch.float64)
        exponents[:2] = torch.tensor([0.0, 1.0])
        eigenvalues = self.condition**-exponents
        rotation = torch.eye(self.dim, dtype=torch.float64)
        if self.rotated:
            q, r = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator, dtype=torch.float64))
            rotation = q * r.diagonal().sign()  # without the signs the rotation is not uniform
        hessian = (rotation * eigenvalues) @ rotation.T
        return {"hessian": hessian.float(), "center": torch.randn(self.dim, generator=generator)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"x": torch.randn(self.dim, generator=generator)}

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        if not self.noise:
            return {}
        return {"jitter.x": torch.randn(num_steps, self.dim, generator=generator) * self.noise}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        z = params["x"] - task["center"]
        if self.noise:
            z = z - batch["jitter.x"]
        return 0.5 * z @ (task["hessian"] @ z)

    def optimum(self, task: Tensors) -> Tensors:
        """The minimum of the expected loss."""
        return {"x": task["center"].clone()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lasso(TaskFamily):
    """Sparse regression: f(x) = ½ |Ax − b|² + weight · |x|₁.

    A [num_rows, dim] is Gaussian with columns of length 1, b = A x* with a tenth of x* N(0, 1) and the rest 0, and x
    starts at N(0, init_scale²), "x" [dim]. `optimum` solves a task by accelerated proximal gradient steps (Beck and
    Teboulle, 2009). Size and weight are those of the benchmark of Chen et al., "Learning to Optimize: A Primer and a
    Benchmark" (2022).

    Attributes:
        num_rows: measurements; at least 1.
        dim: unknowns; at least 1.
        weight: of the penalty; positive.
        init_scale: see above; positive.
    """

    name: ClassVar[str] = "lasso"
    num_rows: int = 25
    dim: int = 50
    weight: float = 0.005
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        _at_least(1, num_rows=self.num_rows, dim=self.dim)
        if not self.weight > 0:
            raise ValueError(f"weight must be positive; got {self.weight}")
        if not self.init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {self.init_scale}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        a = F.normalize(torch.randn(self.num_rows, self.dim, generator=generator), dim=0)
        used = torch.rand(self.dim, generator=generator) < 0.1
        return {"a": a, "b": a @ (torch.randn(self.dim, generator=generator) * used)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"x": torch.randn(self.dim, generator=generator) * self.init_scale}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        x = params["x"]
        return 0.5 * (task["a"] @ x - task["b"]).square().sum() + self.weight * x.abs().sum()

    def optimum(self, task: Tensors, num_steps: int = 20_000) -> Tensors:
        """The minimizer, in float64, to about the square of the number of steps."""
        a, b = task["a"].double(), task["b"].double()
        rate = 1 / torch.linalg.matrix_norm(a, 2).square()
        x = ahead = torch.zeros(self.dim, dtype=torch.float64)
        momentum = 1.0
        for _ in range(num_steps):
            new = F.softshrink(ahead - rate * (a.T @ (a @ ahead - b)), float(rate * self.weight))
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / following * (new - x)
            x, momentum = new, following
        return {"x": x}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustRegression(TaskFamily):
    """Nearly least absolute deviations, with outliers: f(x) = mean over rows of √(r² + delta²) − delta, r = Ax − b.

    That is the pseudo-Huber loss divided by delta. A [num_rows, dim] is N(0, 1/dim); b = A x* with x* N(0, 1), plus
    N(0, 5²) in a tenth of the rows, drawn independently. x, "x" [dim], starts at N(0, 1). The loss is convex, and its
    gradient turns within some delta of a row's residual 0. `optimum` solves a task by Newton's method on widths that
    fall to delta. Source of the loss: Charbonnier et al., 1997.

    Attributes:
        num_rows: at least `dim`.
        dim: unknowns; at least 1.
        delta: width of the rounded corner of |r|; positive and finite.
    """

    name: ClassVar[str] = "robust_regression"
    num_rows: int = 60
    dim: int = 20
    delta: float = 0.01

    def __post_init__(self) -> None:
        _at_least(1, dim=self.dim)
        if self.num_rows < self.dim:
            raise ValueError(f"num_rows must be at least dim ({self.dim}); got {self.num_rows}")
        if not 0 < self.delta < math.inf:
            raise ValueError(f"delta must be positive and finite; got {self.delta}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        a = torch.randn(self.num_rows, self.dim, generator=generator) / math.sqrt(self.dim)
        outliers = 5 * torch.randn(self.num_rows, generator=generator)
        hit = torch.rand(self.num_rows, generator=generator) < 0.1
        return {"a": a, "b": a @ torch.randn(self.dim, generator=generator) + outliers * hit}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"x": torch.randn(self.dim, generator=generator)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self._mean(task["a"] @ params["x"] - task["b"], self.delta)

    @staticmethod
    def _mean(residuals: torch.Tensor, delta: float) -> torch.Tensor:
        squares = residuals.square()
        return (squares / ((squares + delta**2).sqrt() + delta)).mean()  # nothing is lost where residuals are small

    def optimum(self, task: Tensors, num_steps: int = 10) -> Tensors:
        """The minimizer, in float64, to about 1e-10 in the gradient; `num_steps` is for each width."""
        a, b = task["a"].double(), task["b"].double()
        x = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]

        def mean(delta: float, x: torch.Tensor) -> torch.Tensor:
            return self._mean(a @ x - b, delta)

        delta = max(self.delta, float((a @ x - b).abs().max()))
        while True:
            x = _newton(functools.partial(mean, delta), x, num_steps)
            if delta == self.delta:
                return {"x": x}
            delta = max(self.delta, delta / 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixFactorization(TaskFamily):
    """Mean squared error of U Vᵀ against a matrix of that rank: f(U, V) = mean (U Vᵀ − M)²; its optimum is 0.

    M = U* V*ᵀ/√rank with U* [num_rows, rank] and V* [num_columns, rank] N(0, 1), so entries of M have variance 1.
    U and V, "u" [num_rows, rank] and "v" [num_columns, rank], start at N(0, init_scale²); the origin is a saddle.

    Attributes:
        num_rows: of M; at least 1.
        num_columns: of M; at least 1.
        rank: of M, U and V; at least 1.
        init_scale: see above; positive.
    """

    name: ClassVar[str] = "matrix_factorization"
    num_rows: int = 20
    num_columns: int = 16
    rank: int = 4
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        _at_least(1, num_rows=self.num_rows, num_columns=self.num_columns, rank=self.rank)
        if not self.init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {self.init_scale}")

    def _factors(self, generator: torch.Generator) -> Tensors:
        return {
            "u": torch.randn(self.num_rows, self.rank, generator=generator),
            "v": torch.randn(self.num_columns, self.rank, generator=generator),
        }

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return {f"true_{n}": v / self.rank**0.25 for n, v in self._factors(generator).items()}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {n: v * self.init_scale for n, v in self._factors(generator).items()}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return (params["u"] @ params["v"].T - task["true_u"] @ task["true_v"].T).square().mean()

    def optimum(self, task: Tensors) -> Tensors:
        """The factors that M was made of: loss 0."""
        return {"u": task["true_u"].clone(), "v": task["true_v"].clone()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticRegression(TaskFamily):
    """Regularized logistic loss of generated points: mean log(1 + exp(−y (x · w + b))) + ½ weight_decay (|w|² + b²).

    Points are N(0, I) [num_rows, dim]; y = ±1 is the sign of x · w* with w* N(0, I), flipped for a tenth of the points.
    w and b, "weight" [dim] and "bias" [1], start at 0, where the loss is log 2. The problem is strongly convex;
    `optimum` solves it by Newton's method.

    Attributes:
        num_rows: points of a task; at least 2.
        dim: coordinates of a point; at least 1.
        weight_decay: positive.
    """

    name: ClassVar[str] = "logistic_regression"
    num_rows: int = 100
    dim: int = 10
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        _at_least(2, num_rows=self.num_rows)
        _at_least(1, dim=self.dim)
        if not self.weight_decay > 0:
            raise ValueError(f"weight_decay must be positive; got {self.weight_decay}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        points = torch.randn(self.num_rows, self.dim, generator=generator)
        right = torch.where(points @ torch.randn(self.dim, generator=generator) > 0, 1.0, -1.0)
        flipped = torch.rand(self.num_rows, generator=generator) < 0.1
        return {"points": points, "signs": torch.where(flipped, -right, right)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {"weight": torch.zeros(self.dim), "bias": torch.zeros(1)}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        margins = task["signs"] * (task["points"] @ params["weight"] + params["bias"])
        penalty = params["weight"].square().sum() + params["bias"].square().sum()
        return F.softplus(-margins).mean() + 0.5 * self.weight_decay * penalty

    def optimum(self, task: Tensors, num_steps: int = 50) -> Tensors:
        """The minimizer, in float64, to about 1e-10 in the gradient."""
        points = (
            torch.cat([task["points"], torch.ones(self.num_rows, 1)], dim=1).double() * task["signs"].double()[:, None]
        )
        solution = torch.zeros(self.dim + 1, dtype=torch.float64)
        for _ in range(num_steps):
            wrong = torch.sigmoid(-points @ solution)
            gradient = -(points.T @ wrong) / self.num_rows + self.weight_decay * solution
            hessian = (points.T * (wrong * (1 - wrong))) @ points / self.num_rows
            step = torch.linalg.solve(
                hessian + self.weight_decay * torch.eye(self.dim + 1, dtype=torch.float64), gradient
            )
            # Halve steps that overshoot: far from the solution the curvature can be tiny.
            value, scale = self._value(solution, points), 1.0
            while self._value(solution - scale * step, points) > value and scale > 1e-9:
                scale /= 2
            solution = solution - scale * step
        return {"weight": solution[:-1], "bias": solution[-1:]}

    def _value(self, solution: torch.Tensor, points: torch.Tensor) -> float:
        return float(F.softplus(-points @ solution).mean() + 0.5 * self.weight_decay * solution.square().sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxRegression(TaskFamily):
    """Regularized multinomial logistic regression of generated points, all of them at every step.

    f(W, b) = mean cross-entropy of the scores xW + b + ½ weight_decay (|W|² + |b|²). Points x are N(0, I) [num_rows,
    dim]; the class is the largest of xW*, with W* N(0, 1) [dim, num_classes], replaced by a uniformly drawn one for a
    tenth of the points. W and b, "weight" [dim, num_classes] and "bias" [num_classes], start at N(0, init_scale²).
    The problem is strongly convex; `optimum` solves it by Newton's method.

    Attributes:
        num_classes: at least 2.
        dim: coordinates of a point; at least 1.
        num_rows: points of a task; at least 2.
        weight_decay: positive.
        init_scale: see above; positive.
    """

    name: ClassVar[str] = "softmax_regression"
    num_classes: int = 4
    dim: int = 10
    num_rows: int = 80
    weight_decay: float = 1e-3
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        _at_least(2, num_classes=self.num_classes, num_rows=self.num_rows)
        _at_least(1, dim=self.dim)
        if not self.weight_decay > 0:
            raise ValueError(f"weight_decay must be positive; got {self.weight_decay}")
        if not self.init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {self.init_scale}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        points = torch.randn(self.num_rows, self.dim, generator=generator)
        right = (points @ torch.randn(self.dim, self.num_classes, generator=generator)).argmax(1)
        return {"points": points, "classes": with_noise(right, self.num_classes, 0.1, generator)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {
            "weight": torch.randn(self.dim, self.num_classes, generator=generator) * self.init_scale,
            "bias": torch.randn(self.num_classes, generator=generator) * self.init_scale,
        }

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        penalty = params["weight"].square().sum() + params["bias"].square().sum()
        scores = task["points"] @ params["weight"] + params["bias"]
        return cross_entropy(scores, task["classes"]) + 0.5 * self.weight_decay * penalty

    def optimum(self, task: Tensors, num_steps: int = 30) -> Tensors:
        """The minimizer, in float64, to about 1e-10 in the gradient."""
        exact = {"points": task["points"].double(), "classes": task["classes"]}

        def split(flat: torch.Tensor) -> Tensors:
            return {"weight": flat[self.num_classes :].view(self.dim, -1), "bias": flat[: self.num_classes]}

        start = torch.zeros((self.dim + 1) * self.num_classes, dtype=torch.float64)
        return split(_newton(lambda flat: self.loss(split(flat), exact, {}), start, num_steps))
