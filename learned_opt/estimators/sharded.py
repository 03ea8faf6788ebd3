"""Estimators over several ranks: each holds a share of the particles, and means are taken over all of them.

An estimate is a mean over valid particles, so that of all ranks is the mean of theirs weighted by how many each had.
Most estimators run on one rank's particles and know nothing of the others; those that combine estimates in ways that
are not linear (`imitation`, `mix`) take the mean over ranks themselves, before they combine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from learned_opt.distributed import Ranks
from learned_opt.estimators.base import Estimate, Estimator, Workload
from learned_opt.task import Tensors


def sharded(estimator: Estimator) -> Estimator:
    """`estimator` with each rank on its share of the particles; one that sees to that itself is returned as it is."""
    return estimator if getattr(estimator, "spans_ranks", False) else Sharded(estimator)


class Sharded(Estimator):
    """An estimator on this rank's share of the particles; its state is None where the rank holds none.

    Args:
        inner: the estimator.
    """

    kind: ClassVar[str] = "sharded"
    spans_ranks: ClassVar[bool] = True

    def __init__(self, inner: Estimator) -> None:
        self.inner = inner

    def init(self, work: Workload, theta: Tensors, ids: Sequence[int]) -> Any:
        units = self.inner.units(work, ids)
        mine = work.ranks.share(units, first=ids[0] // len(units[0]))
        return self.inner.init(work, theta, [i for unit in mine for i in unit]) if mine else None

    def estimate(self, work: Workload, theta: Tensors, state: Any) -> Estimate:
        if state is None:
            return self.inner.nothing(work, theta)
        return self.inner.estimate(work, theta, state)

    def horizons(self, state: Any) -> list[int]:
        return [] if state is None else self.inner.horizons(state)

    def state_dict(self, state: Any) -> Any:
        return None if state is None else self.inner.state_dict(state)

    def load_state_dict(self, work: Workload, saved: dict[str, Any]) -> Any:
        mine = saved if work.ranks.size == 1 else self.inner.part(saved, work.ranks)
        return None if mine is None else self.inner.load_state_dict(work, mine)

    def merge(self, parts: Sequence[Any]) -> Any:
        present = [part for part in parts if part is not None]
        return present[0] if len(present) == 1 else self.inner.merge(present) if present else None


def mean_over_ranks(
    estimates: Sequence[Estimate], ranks: Ranks, numbers: Sequence[float] = ()
) -> tuple[list[Estimate], list[float]]:
    """The estimates of all ranks' particles, in one exchange.

    Args:
        estimates: this rank's; every rank has them in the same order, with the same theta.
        ranks: who takes part.
        numbers: to be added over ranks on the way.

    Returns:
        (estimates, the same on every rank: means for gradients and meta-losses, sums for counts; sums of `numbers`).
    """
    if ranks.size == 1:
        return list(estimates), list(numbers)
    rows = []
    for e in estimates:
        head = torch.tensor(
            [e.weight, e.weight * e.meta_loss, e.num_inner_steps, e.num_invalid, e.num_clipped], dtype=torch.float64
        )
        flat = torch.cat([g.reshape(-1) for g in e.grads.values()])
        rows += [head.to(flat.device), flat.double() * e.weight]
    device = rows[1].device if rows else torch.device("cpu")
    total = ranks.sum(torch.cat([*rows, torch.tensor(list(numbers), dtype=torch.float64, device=device)]))
    means, at = [], 0
    for e in estimates:
        weight, meta_loss, *counts = total[at : at + 5].tolist()
        at += 5
        grads: Tensors = {}
        for name, value in e.grads.items():
            grads[name] = (total[at : at + value.numel()] / max(weight, 1.0)).view_as(value).to(value.dtype)
            at += value.numel()
        inner_steps, invalid, clipped = (int(c) for c in counts)
        means.append(
            dataclasses.replace(
                e,
                grads=grads,
                meta_loss=meta_loss / max(weight, 1.0),
                num_inner_steps=inner_steps,
                num_invalid=invalid,
                num_clipped=clipped,
                weight=weight,
            )
        )
    return means, total[at:].tolist()


def with_own_counts(mean: Estimate, own: Estimate) -> Estimate:
    """A mean over ranks that other ranks will hold as well: counts of this rank alone, and one vote for each rank."""
    return dataclasses.replace(
        mean,
        num_inner_steps=own.num_inner_steps,
        num_invalid=own.num_invalid,
        num_clipped=own.num_clipped,
        weight=1.0,
    )
