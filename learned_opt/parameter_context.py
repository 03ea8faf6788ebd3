"""What a rule is told of the parameter tensors of an optimizer, computed piece by piece.

A large parameter is worked on in chunks, and a sharded one lies on several processes. The sums that a context is made
of (`learned_opt.rules.context`) are added up over all pieces before any piece takes its step. Pieces are always cut at
the same places, wherever an optimizer's chunks end, so that sums are rounded alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from learned_opt.rules.base import UpdateRule
from learned_opt.rules.context import Context, TensorLayout, joined
from learned_opt.task import Tensors

if TYPE_CHECKING:
    from learned_opt.coordinates import Chunk

Sums = dict[int, torch.Tensor]
"""id of a parameter -> the sums over what has been seen of it, [terms]."""

_PIECE = {"cpu": 2**14}  # four pieces are summed at once, by as many threads
_PIECE_ELSEWHERE = 2**20  # few large launches


def summed_at_once(device_type: str) -> int:
    """Coordinates of a large parameter to be given to `add_sums` at a time: a number of whole pieces."""
    return 4 * piece_size(device_type) if device_type in _PIECE else _PIECE_ELSEWHERE


def piece_size(device_type: str) -> int:
    """The coordinates of a piece: what is no longer than that is summed at once."""
    return _PIECE.get(device_type, _PIECE_ELSEWHERE)


def add_sums(sums: Sums, rule: UpdateRule, chunk: Chunk, grads: torch.Tensor, state: Tensors) -> None:
    """Add what a chunk has to say of its parameters.

    Args:
        sums: added to.
        rule: one that takes context.
        chunk: of whole parameters, or of the next `summed_at_once` coordinates of one.
        grads: [n], of the chunk.
        state: rule state before the step, tensors [..., n].
    """
    size = piece_size(grads.device.type)
    owners, sizes = [], []
    for owner, param in zip(chunk.owners, chunk.params):
        cuts = [*range(0, param.numel(), size), param.numel()]
        owners += [owner] * (len(cuts) - 1)
        sizes += [stop - start for start, stop in zip(cuts, cuts[1:])]
    found = rule.context_sums(grads, state, TensorLayout(tuple(sizes)))
    for owner, column in zip(owners, found.unbind(-1)):
        before = sums.get(id(owner))
        sums[id(owner)] = column if before is None else before + column


def add_over_ranks(sums: Sums, sharded: Sequence[Any], nothing: torch.Tensor) -> None:
    """Complete the sums of parameters of which this process holds a part, which may be empty.

    Every process of a mesh must call this, with the same parameters in the same order.

    Args:
        sums: those of the parts here; replaced.
        sharded: the parameters, DTensors of one mesh or several.
        nothing: the sums over no coordinates, [terms].
    """
    import torch.distributed as dist

    together: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
    for param in sharded:
        split = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
        together[tuple(param.device_mesh.get_group(dim) for dim in split)].append(param)
    for groups, params in together.items():
        total = torch.stack([sums.get(id(param), nothing) for param in params])
        for group in groups:
            dist.all_reduce(total, group=group)
        sums.update(zip(map(id, params), total.unbind()))


def context_of_block(sums: Sums, rule: UpdateRule, block: Chunk, dtype: torch.dtype) -> Context:
    """The context of a block's parameters in this dtype, once their sums are complete."""
    values = rule.context_of(torch.stack([sums[id(owner)] for owner in block.owners], -1))
    return joined(values.to(dtype), [p.numel() for p in block.params])
