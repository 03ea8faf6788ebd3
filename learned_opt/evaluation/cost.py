"""What an inner step costs in wall-clock time: the gradient and the optimizer's own step, as a user pays them.

Measured apart from the runs, which are batched, on one task of the family: the loss and its backward pass in plain
autograd, then `step` of the optimizer a user would build over parameters of their true shapes: `LearnedOptimizer` for a
learned one, the torch optimizer itself for a baseline. `torch.utils.benchmark` repeats each for a given time at the
process's number of threads and takes the median. A time on a busy machine is the time of a busy machine.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from learned_opt.artifact import Artifact
from learned_opt.evaluation.baselines import Baseline
from learned_opt.evaluation.results import Cost
from learned_opt.optimizer import LearnedOptimizer
from learned_opt.task import TaskFamily, Tensors, draw_batches, draw_task, task_seed

DEFAULT_SECONDS = 0.2
_RATE = 1e-12


@dataclasses.dataclass(frozen=True)
class Setting:
    """One task of a family, ready to be timed.

    Attributes:
        params: leaves that require a gradient, and hold one.
        gradient: seconds for the loss and its backward pass.
    """

    params: list[torch.Tensor]
    gradient: float


def prepare(family: TaskFamily, *, device: torch.device | str = "cpu", seconds: float = DEFAULT_SECONDS) -> Setting:
    """Draw a meta-validation task of the family in float32 and time its gradient.

    Args:
        family: the family.
        device: where to run.
        seconds: how long to measure, positive.

    Raises:
        ValueError: seconds out of range.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds must be positive and finite; got {seconds}")
    seed = task_seed("meta_validation", 0, 0, 0)
    task, start = draw_task(family, "meta_validation", seed)
    batches = draw_batches(family, task, seed, 0, 1)

    def move(tensors: Tensors) -> Tensors:
        return {n: v.to(device, torch.float32 if v.is_floating_point() else v.dtype) for n, v in tensors.items()}

    task, batch = {**move(task), **move(family.shared_data())}, {n: v[0] for n, v in move(batches).items()}
    params = {n: v.detach().clone().requires_grad_() for n, v in move(start).items()}

    def backward() -> None:
        for leaf in params.values():
            leaf.grad = None
        family.loss(params, task, batch).backward()

    time = _median_seconds("work()", {"work": backward}, seconds)
    for leaf in params.values():
        # A parameter that the loss does not touch has no gradient, and optimizers then leave it out.
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return Setting(list(params.values()), time)


def measure(candidate: Baseline | Artifact, setting: Setting, *, seconds: float = DEFAULT_SECONDS) -> Cost:
    """The cost of a step with this optimizer.

    Args:
        candidate: a baseline or a learned optimizer.
        setting: what `prepare` returned; its parameters are copied.
        seconds: how long to measure, positive.
    """
    params = []
    for leaf in setting.params:
        params.append(leaf.detach().clone().requires_grad_())
        assert leaf.grad is not None
        params[-1].grad = leaf.grad.clone()
    optimizer: torch.optim.Optimizer
    if isinstance(candidate, Baseline):
        # At a rate of next to nothing: the time is the same, and neither parameters nor what an optimizer estimates
        # from them run away while the same gradient comes thousands of times.
        optimizer = candidate.make([{"params": params, "lr": _RATE}])
    else:
        optimizer = LearnedOptimizer(params, weights=candidate)
    optimizer.step()
    return Cost(gradient=setting.gradient, step=_median_seconds("work()", {"work": optimizer.step}, seconds))


def _median_seconds(statement: str, names: dict[str, Any], seconds: float) -> float:
    from torch.utils.benchmark import Timer  # brings setuptools along, which few runs have a use for

    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)
