"""Augmentations: wrappers around any task family that make its tasks more varied, for meta-training.

Wrappers compose: `Reparametrized(family=GradientNoise(family=ImageMLP()))`. An augmentation draws from a generator of
its own, made from the seed of the one it is given, so the wrapped family's task, initial parameters and mini-batches
are exactly those that it draws with the same seed when it stands alone. Reported metrics are those of the wrapped
family.

Random reparametrization and the convex side problem follow Lv, Jiang and Li, "Learning Gradient Descent: Better
Generalization and Longer Horizons" (2017); the global scale follows Celo (2025). Both are drawn once per task here, so
that a task stays one problem from its first step to its last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors, draw_batches, draw_task, generator_for

SCOPES = ("global", "tensor", "coordinate")


@functools.lru_cache(maxsize=64)
def param_shapes(family: TaskFamily) -> dict[str, tuple[int, ...]]:
    """The shapes of a family's parameters, the same for all of its tasks."""
    _, params = draw_task(family, "meta_train", 0)
    return {name: tuple(value.shape) for name, value in params.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation(TaskFamily):
    """Base of the wrappers: behaves like the family it holds.

    Attributes:
        family: the wrapped family, or its configuration: a mapping with its "name" and its fields.
    """

    family: TaskFamily

    def __post_init__(self) -> None:
        if isinstance(self.family, Mapping):
            import tasks  # the table of names holds this module's classes, so it is complete only after this import

            fields: dict[str, Any] = dict(self.family)
            if "name" not in fields:
                raise ValueError(f"family must have a 'name' beside its fields; got {fields}")
            object.__setattr__(self, "family", tasks.get(fields.pop("name"), **fields))
        if not isinstance(self.family, TaskFamily):
            raise ValueError(f"family must be a TaskFamily or a mapping with its name and fields; got {self.family!r}")

    @property
    def _prefix(self) -> str:
        """Keeps the tensors of nested augmentations apart; the dot marks them as an augmentation's."""
        depth, family = 0, self.family
        while isinstance(family, Augmentation):
            depth, family = depth + 1, family.family
        return f"{self.name}{depth}."

    def _generator(self, generator: torch.Generator) -> torch.Generator:
        return generator_for(generator.initial_seed(), *self._prefix.encode())

    def config(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "family": {"name": self.family.name, **self.family.config()}}

    def describe(self) -> str:
        fields = "".join(f", {k}={v}" for k, v in self.config().items() if k != "family")
        return f"{self.name}({self.family.describe()}{fields})"

    def shared_data(self) -> Tensors:
        return self.family.shared_data()

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        return self.family.sample_task(split, generator)

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return self.family.init_params(task, generator)

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        return self.family.sample_batches(task, num_steps, generator)

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self.family.loss(params, task, batch)

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        return self.family.query_loss(params, task, batch)

    @property
    def gradient_delay(self) -> int:
        return self.family.gradient_delay

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        return self.family.eval_metrics(params, task)


def _check_range(log_range: float) -> None:
    if not 0 < log_range < math.inf:
        raise ValueError(f"log_range must be positive and finite; got {log_range}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reparametrized(Augmentation):
    """The same problem in other units: f_c(p) = f(c · p), started from p₀/c, where the loss is the same.

    Gradients are multiplied by c and distances to the optimum divided by it, which an update rule should not mind.

    Attributes:
        scope: one c for the task ("global"), one for each parameter tensor ("tensor") or one for each number
            ("coordinate").
        log_range: c = exp(U(−log_range, log_range)); positive.
        probability: share of the tasks that are reparametrized, in [0, 1]; the others keep c = 1.
    """

    name: ClassVar[str] = "reparametrized"
    scope: str = "coordinate"
    log_range: float = 3.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {self.scope!r}")
        _check_range(self.log_range)
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1]; got {self.probability}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        own = self._generator(generator)
        changed = float(torch.rand((), generator=own)) < self.probability
        log_range = self.log_range if changed else 0.0
        shared_log = torch.rand((), generator=own)
        task = dict(self.family.sample_task(split, generator))
        for name, shape in param_shapes(self.family).items():
            uniform = shared_log
            if self.scope != "global":
                uniform = torch.rand(shape if self.scope == "coordinate" else (), generator=own)
            task[self._prefix + name] = ((2 * uniform - 1) * log_range).exp()
        return task

    def _original(self, params: Tensors, task: Tensors) -> Tensors:
        return {name: value * task[self._prefix + name] for name, value in params.items()}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        params = self.family.init_params(task, generator)
        return {name: value / task[self._prefix + name] for name, value in params.items()}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self.family.loss(self._original(params, task), task, batch)

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        return self.family.query_loss(self._original(params, task), task, batch)

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        return self.family.eval_metrics(self._original(params, task), task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScaling(Augmentation):
    """The loss times a constant of the task, c = exp(U(−log_range, log_range)); the metrics are not scaled.

    Attributes:
        log_range: see above; positive.
    """

    name: ClassVar[str] = "loss_scaling"
    log_range: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self.log_range)

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        uniform = torch.rand((), generator=self._generator(generator))
        scale = ((2 * uniform - 1) * self.log_range).exp()
        return {**self.family.sample_task(split, generator), self._prefix + "scale": scale}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return task[self._prefix + "scale"] * self.family.loss(params, task, batch)

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        loss = self.family.query_loss(params, task, batch)
        return None if loss is None else task[self._prefix + "scale"] * loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOffset(Augmentation):
    """The loss less a constant; gradients, and the metrics, are what they were.

    A logarithmic meta-loss asks for the same relative progress everywhere, and where the loss ends far above zero, on
    noisy labels or in an autoencoder, all that is left to gain is a few hundredths of it. With an offset a little below
    what can be reached, relative progress is that in what can be gained.

    Attributes:
        offset: what is taken off; finite.
        above_optimum: whether the loss at the task's optimum is taken off as well; for families without mini-batches
            whose tasks have an `optimum`.
    """

    name: ClassVar[str] = "loss_offset"
    offset: float = 0.0
    above_optimum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.offset):
            raise ValueError(f"offset must be finite; got {self.offset}")
        if self.above_optimum and not hasattr(self.family, "optimum"):
            raise ValueError(
                f"above_optimum needs a family whose tasks have a known optimum, which {self.family.describe()} has "
                "not; give offset a number instead"
            )
        if self.above_optimum and draw_batches(self.family, draw_task(self.family, "meta_train", 0)[0], 0, 0, 1):
            raise ValueError(
                f"above_optimum needs a loss that no mini-batch changes; {self.family.describe()} draws mini-batches"
            )

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        task = self.family.sample_task(split, generator)
        if not self.above_optimum:
            return task
        exact = {n: v.double() if v.is_floating_point() else v for n, v in {**task, **self.shared_data()}.items()}
        optimum = {n: v.double() for n, v in self.family.optimum(task).items()}  # type: ignore[attr-defined]
        return {**task, self._prefix + "least": self.family.loss(optimum, exact, {}).float()}

    def _less(self, loss: torch.Tensor, task: Tensors) -> torch.Tensor:
        return loss - self.offset - (task[self._prefix + "least"] if self.above_optimum else 0.0)

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self._less(self.family.loss(params, task, batch), task)

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        loss = self.family.query_loss(params, task, batch)
        return None if loss is None else self._less(loss, task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientNoise(Augmentation):
    """Independent Gaussian noise on every number of every gradient; losses are exact.

    The loss gets the term ⟨ε, p − stop_gradient(p)⟩, which is zero and whose gradient is ε.

    Attributes:
        std: standard deviation of the noise; positive.
    """

    name: ClassVar[str] = "gradient_noise"
    std: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite; got {self.std}")

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        own = self._generator(generator)
        batches = dict(self.family.sample_batches(task, num_steps, generator))
        for name, shape in param_shapes(self.family).items():
            batches[self._prefix + name] = torch.randn(num_steps, *shape, generator=own) * self.std
        return batches

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        loss = self.family.loss(params, task, batch)
        for name, value in params.items():
            loss = loss + (batch[self._prefix + name] * (value - value.detach())).sum()
        return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedGradients(Augmentation):
    """Every step sees the gradient of `delay` steps ago, as with workers that lag behind; losses are those of now.

    The first steps, before which there is no such gradient, see that of the initial parameters. Delays of nested
    wrappers add up. Exact backpropagation (order 2) does not take such families.

    Attributes:
        delay: inner steps; at least 1.
    """

    name: ClassVar[str] = "delayed_gradients"
    delay: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delay < 1:
            raise ValueError(f"delay must be at least 1; got {self.delay}")

    @property
    def gradient_delay(self) -> int:
        return self.delay + self.family.gradient_delay


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallerBatches(Augmentation):
    """Mini-batches of fewer different rows: k of the family's batch_size, k drawn per task from its divisors.

    The k rows are repeated to the family's batch_size, so tasks of different k still run as one batched program, at the
    same cost, and their losses and gradients are those of batches of k rows. Of a family whose tasks count only some
    rows of a batch (`image_mlp_sampled`), that many of the repeated rows count.
    """

    name: ClassVar[str] = "smaller_batches"

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        uniform = torch.rand((), generator=self._generator(generator))
        return {**self.family.sample_task(split, generator), self._prefix + "uniform": uniform}

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        batches = dict(self.family.sample_batches(task, num_steps, generator))
        rows = [name for name, value in batches.items() if "." not in name and value.dim() > 1]
        if not rows:
            raise ValueError(
                f"smaller_batches needs a family that draws mini-batches; {self.family.describe()} draws none"
            )
        for name in rows:
            size = batches[name].shape[1]
            divisors = [k for k in range(1, size + 1) if size % k == 0]
            num_kept = divisors[min(int(float(task[self._prefix + "uniform"]) * len(divisors)), len(divisors) - 1)]
            batches[name] = batches[name][:, torch.arange(size) % num_kept]
        return batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvexMixing(Augmentation):
    """The family's problem and, beside it, a convex one on parameters of its own: + Σᵢ (xᵢ − vᵢ)² / dim.

    It keeps a rule that is being meta-trained from forgetting how to descend where the problem is easy. v and the
    initial x are U(−1, 1); the optimum of the added term is 0.

    Attributes:
        dim: how many parameters are added, as "convex_mixing….x"; at least 1.
    """

    name: ClassVar[str] = "convex_mixing"
    dim: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1; got {self.dim}")

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        own = self._generator(generator)
        target, start = (2 * torch.rand(self.dim, generator=own) - 1 for _ in range(2))
        task = self.family.sample_task(split, generator)
        return {**task, self._prefix + "target": target, self._prefix + "start": start}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {**self.family.init_params(task, generator), self._prefix + "x": task[self._prefix + "start"].clone()}

    def _inner(self, params: Tensors) -> Tensors:
        return {name: value for name, value in params.items() if name != self._prefix + "x"}

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self.family.loss(self._inner(params), task, batch) + self._convex(params, task)

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        loss = self.family.query_loss(self._inner(params), task, batch)
        return None if loss is None else loss + self._convex(params, task)

    def _convex(self, params: Tensors, task: Tensors) -> torch.Tensor:
        return (params[self._prefix + "x"] - task[self._prefix + "target"]).square().mean()

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        return self.family.eval_metrics(self._inner(params), task)
