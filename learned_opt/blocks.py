"""The state of an optimizer's parameters, packed: matrices of which the state tensors are views.

A rule wants its state as a matrix [rows, coordinates], of one large parameter or of many small ones; everybody else
wants one tensor of the parameter's shape per row. Blocks are a cache and nothing else: state that somebody replaced
(loading, moving between devices, copying) is recognized by its address and packed again, and `unpack` makes separate
tensors of the views before anyone saves them, since a pickled view would carry its whole block along.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor (DTensor), or the tensor itself."""
    if type(tensor) is torch.Tensor:  # the most frequent, and asking it for what it has not is slow
        return tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _as_sharded(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A DTensor around this process's part where `like` is one; else the part itself."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class Block:
    """The packed state of some parameters: a matrix [rows, coordinates], of which their state tensors are views."""

    def __init__(self, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
        self.params = [weakref.ref(param) for param in params]
        self.sizes = [local(param).numel() for param in params]
        parts = [[local(state[key]) for key in keys] for state in states]
        first = parts[0][0] if keys else local(params[0])
        self.rows = torch.empty(len(keys), sum(self.sizes), dtype=first.dtype, device=first.device)
        for state, old, columns in zip(states, parts, self.rows.split(self.sizes, 1)):
            for key, part, row in zip(keys, old, columns.unbind(0)):
                state[key] = _as_sharded(row.view(part.shape).copy_(part), state[key])
        self._keys = tuple(keys)
        self._views: list[list[tuple[str, torch.Tensor, int]]] = [
            [(key, state[key], local(state[key]).data_ptr()) for key in keys] for state in states
        ]
        self.kept: Any = None  # what a user of the rows makes of them, once

    def holds(self, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], keys: Sequence[str]) -> bool:
        """Whether these parameters' state tensors are still the views of this block that they were made."""
        if self._keys != tuple(keys) or not all(ref() is param for ref, param in zip(self.params, params)):
            return False
        for state, views in zip(states, self._views):
            for key, view, address in views:
                # An address alone may have been given to another tensor; a tensor may have been given other memory.
                if state.get(key) is not view:
                    return False
                if local(view).data_ptr() != address:
                    return False
        return True


class Blocks:
    """The blocks of an optimizer, kept from step to step."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, ...], Block] = {}

    def of(self, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], keys: Sequence[str]) -> Block:
        """The block of these parameters; packs their state where it is not yet, or no longer."""
        name = tuple(map(id, params))
        block = self._blocks.get(name)
        if block is None or not block.holds(params, states, keys):
            mine = set(name)
            self._blocks = {
                other: kept
                for other, kept in self._blocks.items()
                if mine.isdisjoint(other) and all(ref() is not None for ref in kept.params)
            }
            block = self._blocks[name] = Block(params, states, keys)
        return block

    def unpack(self, state: MutableMapping[Any, dict[str, Any]]) -> None:
        """Give every state tensor memory of its own, and forget the blocks."""
        for block in self._blocks.values():
            for ref in block.params:
                param = ref()
                if param is None or param not in state:
                    continue
                for key, value in state[param].items():
                    if isinstance(value, torch.Tensor) and local(value).untyped_storage().data_ptr() == (
                        block.rows.untyped_storage().data_ptr()
                    ):
                        state[param][key] = value.clone(memory_format=torch.contiguous_format)
        self._blocks = {}
