"""A task family as one batched tensor program.

`BatchedFamily` runs many particles of one family at once: their parameters are one [particles, parameters] matrix,
and one `vmap(grad_and_value(loss))` gives all losses and gradients. Once a shape has been seen a few times
the vectorized function is traced to a flat graph of tensor operations (`make_fx`), which computes the same bits and
spares the function transforms' overhead at every inner step. A trace is kept as long as its family, and whoever
batches the same family anew finds it. A family that `vmap` cannot batch, since its loss branches on the values of
tensors, runs one particle after the other instead, with a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import grad, grad_and_value, vjp, vmap
from torch.utils.weak import WeakIdKeyDictionary

from learned_opt.program import trace
from learned_opt.task import TaskFamily, Tensors, check_split, draw_batches, draw_task, stack

_CALLS_BEFORE_TRACE = 8
_traces = WeakIdKeyDictionary()
"""Per family, by device, dtype and shared data: what was traced, and how often what is not yet was called."""
_VECTOR = "<vector>"  # beside a batch's own names
# Parts of error messages that one particle at a time is no answer to.
_NOT_FOR_ONE_BY_ONE = ("randomness", "out of memory", "allocate memory")


class OneByOneWarning(UserWarning):
    """A family cannot be batched by `torch.func.vmap`: its particles run one by one, correctly and slowly."""


def check_device(device: torch.device | str) -> torch.device:
    """The torch device of this name, or ValueError where there is none on this machine."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA fails an assertion
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}; use cpu") from error
    return found


class BatchedFamily:
    """Vectorized access to a task family.

    Args:
        family: the family to run.
        device: where tasks and parameters live.
        dtype: floating-point type of data, constants and parameters.

    Attributes:
        names, shapes, sizes: the parameters of one task, in order, and how many numbers each has.
        num_parameters: how many numbers that is.
        judged_apart: whether a loss of its own judges the family's parameters (`TaskFamily.query_loss`).

    Warns:
        OneByOneWarning: once, when `torch.func.vmap` cannot batch the family's loss or metrics.

    Raises:
        ValueError: a family whose parameters are missing or not floating point, whose loss is not a scalar, or whose
            tasks' constants have names of the shared data.
    """

    def __init__(
        self, family: TaskFamily, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if not isinstance(family, TaskFamily):
            raise TypeError(f"family must be a TaskFamily; got {type(family).__name__}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type; got {dtype}")
        self.family = family
        self.device = check_device(device)
        self.dtype = dtype
        self._shared = self._move(family.shared_data())
        task, params = draw_task(family, "meta_train", 0)
        if not params:
            raise ValueError(f"{family.name}: init_params returned no parameters; a task needs at least one tensor")
        for name, value in params.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"{family.name}: parameter {name!r} must be a floating-point tensor; got {kind}")
        self.names = list(params)
        self.shapes = [tuple(value.shape) for value in params.values()]
        self.sizes = tuple(value.numel() for value in params.values())
        self.num_parameters = sum(self.sizes)
        shared = tuple((name, value.shape, value.dtype) for name, value in self._shared.items())
        known = _traces.setdefault(family, {})
        self._traced: dict[Any, Any] = known.setdefault((self.device, dtype, shared), {})
        self._one_by_one: set[str] = set()
        clash = sorted(task.keys() & self._shared.keys())
        if clash:
            raise ValueError(f"{family.name}: sample_task and shared_data both return {clash[0]!r}; rename one of them")
        self._check_loss(self._move(task), self._move(params), draw_batches(family, task, 0, 0, 1))

    def _check_loss(self, task: Tensors, params: Tensors, batches: Tensors) -> None:
        batch = {name: value[0] for name, value in self._move(batches).items()}
        with torch.no_grad():
            loss = self.family.loss(params, {**task, **self._shared}, batch)
            query_loss = self.family.query_loss(params, {**task, **self._shared}, batch)
        self.judged_apart = query_loss is not None
        for method, value in (("loss", loss), ("query_loss", query_loss if self.judged_apart else loss)):
            if not isinstance(value, torch.Tensor) or value.dim() != 0:
                got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(
                    f"{self.family.name}: {method} must return a scalar tensor; got {got}. Reduce it, e.g. with .mean()"
                )

    def _move(self, tensors: Tensors) -> Tensors:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in tensors.items()
        }

    def start(self, split: str, seeds: Sequence[int]) -> tuple[Tensors, torch.Tensor]:
        """Draw the tasks with these seeds.

        Returns:
            (tasks, params): the stacked constants, each [particles, …], and the initial parameters
            [particles, num_parameters].
        """
        check_split(split)
        drawn = [draw_task(self.family, split, seed) for seed in seeds]
        for _, params in drawn:
            shapes = [tuple(value.shape) for value in params.values()]
            if list(params) != self.names or shapes != self.shapes:
                raise ValueError(
                    f"{self.family.name}: all tasks of a family must have parameters of one shape; "
                    f"expected {dict(zip(self.names, self.shapes))}, got {dict(zip(params, shapes))}"
                )
        constants = [{n: (tuple(v.shape), v.dtype) for n, v in task.items()} for task, _ in drawn]
        for other in constants:
            if other != constants[0]:
                raise ValueError(
                    f"{self.family.name}: all tasks of a family must have constants of one shape; "
                    f"expected {constants[0]}, got {other}"
                )
        flat = torch.stack([torch.cat([v.reshape(-1) for v in params.values()]) for _, params in drawn])
        return self._move(stack([task for task, _ in drawn])), flat.to(self.device, self.dtype)

    def batches(self, tasks: Tensors, seeds: Sequence[int], steps: Sequence[int], num_steps: int) -> Tensors:
        """The next `num_steps` batches of every particle, each tensor [num_steps, particles, …].

        Args:
            tasks: what `start` returned.
            seeds: the particles' task seeds.
            steps: the inner step each particle's first batch is for.
            num_steps: how many batches.
        """
        rows = []
        for i, (seed, step) in enumerate(zip(seeds, steps)):
            task = {name: value[i] for name, value in tasks.items()}
            drawn = draw_batches(self.family, task, seed, step, num_steps)
            if not drawn:
                return {}
            rows.append(drawn)
        return self._move({name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]})

    def unflatten(self, params: torch.Tensor) -> Tensors:
        """Named views of a flat parameter tensor [..., num_parameters]."""
        parts = params.split(self.sizes, dim=-1)
        lead = params.shape[:-1]
        return {n: part.reshape((*lead, *shape)) for n, shape, part in zip(self.names, self.shapes, parts)}

    def _loss(self, params: torch.Tensor, task: Tensors, shared: Tensors, batch: Tensors) -> torch.Tensor:
        return self.family.loss(self.unflatten(params), {**task, **shared}, batch)

    def _judging_loss(self, params: torch.Tensor, task: Tensors, shared: Tensors, batch: Tensors) -> torch.Tensor:
        loss = self.family.query_loss(self.unflatten(params), {**task, **shared}, batch)
        assert loss is not None  # seen when the family was checked
        return loss

    def _vectorize(self, function: Callable[..., Any], method: str = "loss") -> Callable[..., Any]:
        """The function for all particles at once; one by one once `vmap` has refused this method of the family."""
        together = vmap(function, in_dims=(0, 0, None, 0))

        def one_by_one(params: torch.Tensor, tasks: Tensors, shared: Tensors, batch: Tensors) -> Any:
            outputs = [
                function(params[i], {n: v[i] for n, v in tasks.items()}, shared, {n: v[i] for n, v in batch.items()})
                for i in range(len(params))
            ]
            if isinstance(outputs[0], dict):
                return stack(outputs)
            if isinstance(outputs[0], torch.Tensor):
                return torch.stack(outputs)
            return tuple(torch.stack(part) for part in zip(*outputs))

        def run(*arguments: Any) -> Any:
            if method in self._one_by_one:
                return one_by_one(*arguments)
            try:
                return together(*arguments)
            except RuntimeError as error:
                if any(part in str(error) for part in _NOT_FOR_ONE_BY_ONE):
                    raise
                reason = str(error).strip().splitlines()[0]
            states = self._global_states()
            outputs = one_by_one(*arguments)  # what is wrong with the family itself is raised here, by its own name
            if not all(map(torch.equal, states, self._global_states())):
                raise ValueError(
                    f"{self.family.name}: {method} draws random numbers from torch's global generator; draw them in "
                    "sample_task or sample_batches from the generator given there"
                )
            if not self._one_by_one:
                warnings.warn(
                    f"{self.family.name}: {method} cannot be batched by torch.func.vmap ({reason}). Its particles run "
                    f"one by one, so {len(arguments[0])} of them take {len(arguments[0])} times as long as one. To run "
                    "them together, replace Python branches on the values of tensors, for example by torch.where",
                    OneByOneWarning,
                    stacklevel=4,
                )
            self._one_by_one.add(method)
            return outputs

        return run

    def _global_states(self) -> list[torch.Tensor]:
        """Where torch's global generators stand, the device's own among them."""
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def losses(self, params: torch.Tensor, tasks: Tensors, batch: Tensors) -> torch.Tensor:
        """Losses [particles] at `params` [particles, num_parameters]."""
        return self._run("loss", lambda: self._vectorize(self._loss), params, tasks, batch)

    def losses_and_grads(
        self, params: torch.Tensor, tasks: Tensors, batch: Tensors, *, differentiable: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [particles] and their gradients [particles, num_parameters].

        Both are free of autograd history unless `differentiable`, which keeps the graph back to `params`.
        """

        def function() -> Callable[..., Any]:
            return self._vectorize(grad_and_value(self._loss))

        if differentiable:
            grads, losses = function()(params, tasks, self._shared, batch)
            return losses, grads
        with torch.no_grad():
            grads, losses = self._run("grad", function, params, tasks, batch)
        return losses, grads

    def judged_losses(self, params: torch.Tensor, tasks: Tensors, batch: Tensors) -> torch.Tensor:
        """The losses that judge `params`, [particles], where `judged_apart`, without gradients."""
        with torch.no_grad():
            return self._run("judged", lambda: self._vectorize(self._judging_loss, "query_loss"), params, tasks, batch)

    def judge(
        self, params: torch.Tensor, tasks: Tensors, batch: Tensors, *, differentiable: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `losses_and_grads` returns, of the loss that judges: the family's `query_loss` where it has one."""
        if not self.judged_apart:
            return self.losses_and_grads(params, tasks, batch, differentiable=differentiable)

        def function() -> Callable[..., Any]:
            return self._vectorize(grad_and_value(self._judging_loss), "query_loss")

        if differentiable:
            grads, losses = function()(params, tasks, self._shared, batch)
            return losses, grads
        with torch.no_grad():
            grads, losses = self._run("judge", function, params, tasks, batch)
        return losses, grads

    def hessian_products(
        self, params: torch.Tensor, tasks: Tensors, batch: Tensors, vectors: torch.Tensor
    ) -> torch.Tensor:
        """The Hessian of each particle's loss times its vector: [particles, num_parameters], like `vectors`."""

        def product(flat: torch.Tensor, task: Tensors, shared: Tensors, batch: Tensors) -> torch.Tensor:
            rest = {name: value for name, value in batch.items() if name != _VECTOR}
            pull = vjp(lambda p: grad(self._loss)(p, task, shared, rest), flat)[1]
            return pull(batch[_VECTOR])[0]

        with torch.no_grad():
            return self._run("hessian", lambda: self._vectorize(product), params, tasks, {**batch, _VECTOR: vectors})

    def eval_metrics(self, params: torch.Tensor, tasks: Tensors) -> Tensors:
        """The family's reported metrics, each [particles]; empty where the family reports none."""

        def metrics(flat: torch.Tensor, task: Tensors, shared: Tensors, batch: Tensors) -> Tensors:
            return self.family.eval_metrics(self.unflatten(flat), {**task, **shared})

        with torch.no_grad():
            return self._vectorize(metrics, "eval_metrics")(params, tasks, self._shared, {})

    def _run(
        self,
        kind: str,
        make: Callable[[], Callable[..., Any]],
        params: torch.Tensor,
        tasks: Tensors,
        batch: Tensors,
    ) -> Any:
        """What the function that is made computes: by that function at first, by its trace from then on."""
        arguments = (params, tasks, self._shared, batch)
        key = (
            kind,
            *((n, v.shape, v.dtype) for n, v in [("", params), *sorted(tasks.items()), *sorted(batch.items())]),
        )
        seen = self._traced.get(key, 0)
        if isinstance(seen, int):
            function = make()
            if seen < _CALLS_BEFORE_TRACE:
                outputs = function(*arguments)
                if not self._one_by_one & {"loss", "query_loss"}:  # which is never traced: it branches
                    self._traced[key] = seen + 1
                return outputs

            def program(params: torch.Tensor, tasks: Tensors, shared: Tensors, batch: Tensors) -> Any:
                return function(params, tasks, shared, batch)

            seen = self._traced[key] = trace(program, arguments)
        return seen(*arguments)

    def state_bytes(self, num_particles: int, rows_per_coordinate: int) -> int:
        """Bytes that `num_particles` particles hold between inner steps, with so many state rows per coordinate."""
        return math.ceil(num_particles * self.num_parameters * (rows_per_coordinate + 2) * self.dtype.itemsize)
