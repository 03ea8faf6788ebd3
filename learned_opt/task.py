"""What a task family must provide, and how a task's randomness is named.

A *task* is one problem to optimize. A *task family* is a distribution over tasks of one shape, so that
many of them run as one batched tensor program. A family is written for **one** task at a time, with plain
tensors and an explicit generator; `learned_opt.batched` stacks and vectorizes it.

Every random number of a task comes from the task's seed, an integer in [0, 2**32) whose residue modulo 3 is
its split. Two splits can therefore never share a seed, and a task can be rebuilt, anywhere and at any time,
from its seed alone: that is what makes runs resumable to the bit and independent of how particles are
distributed over processes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

SPLITS: tuple[str, ...] = ("meta_train", "meta_validation", "meta_test")
"""Meta-train learns theta, meta-validation chooses a checkpoint, meta-test is only reported."""

_BATCH_BLOCK = 32
"""Batches are drawn in blocks of this many inner steps, so that step t has the same batch whatever the truncation."""


def check_split(split: str) -> str:
    """Return `split`, or raise ValueError naming the splits there are."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return split


def task_seed(split: str, *key: int) -> int:
    """The seed of the task that `key` names, for example (run seed, particle, episode).

    Args:
        split: one of `SPLITS`.
        *key: non-negative integers; distinct keys of one length give (up to hashing) independent seeds.

    Returns:
        An integer in [0, 2**32) that is congruent to the split's index modulo 3.
    """
    word = int(np.random.SeedSequence(entropy=list(key)).generate_state(1, np.uint32)[0])
    return (word % ((2**32 - 2) // 3)) * 3 + SPLITS.index(check_split(split))


def generator_for(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for the given task seed; with a key, for one named stream of that task."""
    if key:
        seed = int(np.random.SeedSequence(entropy=[seed, *key]).generate_state(1, np.uint32)[0])
    return torch.Generator().manual_seed(seed)


class TaskFamily(ABC):
    """A distribution over tasks of one shape.

    Subclasses are frozen keyword-only dataclasses whose fields are plain values (numbers, strings, tuples), so that
    a family is rebuilt from its name and `config()` alone. Anything large, such as a data set, is loaded by
    `shared_data`. All methods see one task; none may read global random state.
    """

    name: ClassVar[str]

    @abstractmethod
    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        """Draw one task's constants: a dict of tensors, possibly empty.

        Args:
            split: which of `SPLITS` to draw from; families with data must use disjoint rows for each.
            generator: the only source of randomness.
        """

    @abstractmethod
    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        """Draw the task's initial parameters: a dict of floating-point tensors, the same shapes for every task."""

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        """Draw `num_steps` batches, stacked: every tensor has leading dimension num_steps.

        Row numbers are enough: `loss` can index the data with them. Full-batch families return an empty dict.
        """
        return {}

    @abstractmethod
    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        """The scalar loss on one batch; must be a `torch.func` function (no in-place changes of its inputs).

        `task` holds what `sample_task` returned and, beside it, what `shared_data` returned.
        """

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        """The scalar loss that judges parameters in meta-training, where it is not `loss`; None where it is.

        A few-shot task learns from its support by `loss`, and is judged on its query rows by this: the meta-loss is of
        these values, while the inner gradients stay those of `loss`. A `torch.func` function like `loss`, of the same
        arguments; a family returns None for all of its tasks or for none.
        """
        return None

    @property
    def gradient_delay(self) -> int:
        """How many inner steps old the gradients are that updates are made of; 0 for those of now."""
        return 0

    def shared_data(self) -> Tensors:
        """Tensors that all tasks share, such as a data set; loaded once, moved to the device, never copied per task."""
        return {}

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """Scalars to report for trained parameters, such as the loss and accuracy on rows held out of the task."""
        return {}

    def config(self) -> dict[str, Any]:
        """The fields as plain values: together with `name`, all that is needed to build the family again."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}

    def describe(self) -> str:
        """A short label for tables and messages."""
        fields = ", ".join(f"{k}={v}" for k, v in self.config().items())
        return f"{self.name}({fields})"


def draw_task(family: TaskFamily, split: str, seed: int) -> tuple[Tensors, Tensors]:
    """The constants and the initial parameters of the family's task with this seed."""
    generator = generator_for(seed)
    task = family.sample_task(split, generator)
    return task, family.init_params(task, generator)


def draw_batches(family: TaskFamily, task: Tensors, seed: int, first_step: int, num_steps: int) -> Tensors:
    """The batches of steps first_step … first_step + num_steps − 1, stacked; the same however they are asked for."""
    blocks: list[Tensors] = []
    for block in range(first_step // _BATCH_BLOCK, (first_step + num_steps - 1) // _BATCH_BLOCK + 1):
        drawn = family.sample_batches(task, _BATCH_BLOCK, generator_for(seed, block))
        if not drawn:
            return {}
        for name, value in drawn.items():
            if value.shape[:1] != (_BATCH_BLOCK,):
                raise ValueError(
                    f"{family.name}: sample_batches must stack num_steps batches along a leading dimension; asked for "
                    f"{_BATCH_BLOCK}, got {name!r} of shape {tuple(value.shape)}"
                )
        start = max(first_step - block * _BATCH_BLOCK, 0)
        stop = min(first_step + num_steps - block * _BATCH_BLOCK, _BATCH_BLOCK)
        blocks.append({name: value[start:stop] for name, value in drawn.items()})
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def stack(rows: Sequence[Tensors]) -> Tensors:
    """Stack dicts of equally shaped tensors along a new leading dimension."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
