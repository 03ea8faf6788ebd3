"""What the way back through the LSTM rule's network needs of the steps that were taken, and the memory that it is in.

On a CPU, memory that is fresh from the system costs more to touch than to compute in, and views of it cost as much as
small operations: every thread keeps the tape that it was last given back, and lends it, or its memory, to the next.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Iterable

import torch

KEPT_NUMBERS = 2**26
"""What tapes may hold at a time: 256 MiB in single precision."""
_ALIGNED = 16  # numbers: 64 bytes in single precision
_BLOCKS = 8
_LEAST = 512  # coordinates of a block, where there are several: a product needs some to be fast


@dataclasses.dataclass(frozen=True)
class Network:
    """The sizes of a network: rows that it is given, units of its dense layer (0 for none), LSTM layers, their size."""

    rows: int
    dense_units: int
    num_layers: int
    size: int

    @property
    def widths(self) -> list[int]:
        """Rows that each LSTM layer is given from below."""
        return [self.dense_units or self.rows, *[self.size] * (self.num_layers - 1)]

    def most_coordinates(self, num_steps: int) -> int:
        """How many coordinates a tape of so many steps may have."""
        each = Tape.numbers(self, num_steps, 1, _ALIGNED) // _ALIGNED
        return KEPT_NUMBERS // each // _BLOCKS * _BLOCKS


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer works in a step: tensors [blocks, rows, width].

    Attributes:
        joint: its inputs, its last hidden state, and ones.
        gates, parts: its gates, together and one by one.
        before, above: where it finds its last hidden state, and where it puts the new one.
        old, new: its cells before and after; None where the state's own are overwritten.
        after: where a copy of the new hidden state goes, if anywhere.
        sigmoids: the gates but for the candidate; None without a way back.
    """

    joint: torch.Tensor
    gates: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    before: torch.Tensor
    above: torch.Tensor
    old: torch.Tensor | None = None
    new: torch.Tensor | None = None
    after: torch.Tensor | None = None
    sigmoids: torch.Tensor | None = None


class Tape:
    """What `lstm_torch.WayBack` needs of some steps of the network, on coordinates in blocks of one width.

    Args:
        sizes: the network, and numbers of steps, of blocks, and of coordinates of each.
        memory: at least `numbers(*sizes)` numbers.

    Attributes:
        features: [steps, blocks, rows + 1, width], what a dense layer was given, and ones; None without.
        joined: per layer [steps + 1, blocks, below + hidden + 1, width], its inputs, its last hidden state, and ones.
        gates: per layer [steps, blocks, 4 hidden, width], activated.
        cells: per layer [steps + 1, blocks, hidden, width], before the first step and after each.
        tops: [steps, blocks, hidden + 1, width], what the read-out is made of, and ones; a part of `joined`.
        readouts: [steps, blocks, 1, width], what the network puts out.
        places: the same layer by layer and step by step.
    """

    def __init__(self, sizes: tuple[Network, int, int, int], memory: torch.Tensor) -> None:
        self.sizes, self.memory = sizes, memory
        self.network, self.num_steps, self.num_blocks, self.width = sizes
        shapes = self._shapes(*sizes)
        places = itertools.accumulate((_aligned(math.prod(shape)) for shape in shapes), initial=0)
        parts = [memory[place : place + math.prod(shape)].view(shape) for place, shape in zip(places, shapes)]
        self.features = parts.pop() if self.network.dense_units else None
        self.readouts = parts.pop()
        self.joined, self.gates, self.cells = parts[::3], parts[1::3], parts[2::3]
        for rows in self.joined if self.features is None else [self.features, *self.joined]:
            rows[:, :, -1] = 1
        self.tops = self.joined[-1][1:, :, -self.network.size - 1 :]
        self.places = [self._places(layer) for layer in range(self.network.num_layers)]

    @staticmethod
    def numbers(network: Network, num_steps: int, num_blocks: int, width: int) -> int:
        """How many numbers such a tape takes."""
        return sum(_aligned(math.prod(shape)) for shape in Tape._shapes(network, num_steps, num_blocks, width))

    @staticmethod
    def _shapes(network: Network, num_steps: int, num_blocks: int, width: int) -> list[tuple[int, ...]]:
        shapes = []
        for below in network.widths:
            shapes += [(num_steps + 1, below + network.size + 1), (num_steps, 4 * network.size)]
            shapes.append((num_steps + 1, network.size))
        shapes += [(num_steps, 1), *[(num_steps, network.rows + 1)] * (network.dense_units > 0)]
        return [(steps, num_blocks, rows, width) for steps, rows in shapes]

    def _places(self, layer: int) -> list[Place]:
        """Those of a layer in every step: one view for all steps is cheaper than one a step."""
        size, joined, gates, cells = self.network.size, self.joined[layer], self.gates[layer], self.cells[layer]
        recurrent, after = self.recurrent(layer), self.recurrent(layer)[1:]
        is_top = layer + 1 == self.network.num_layers
        copies: Iterable[torch.Tensor | None] = itertools.repeat(None) if is_top else after
        rows = zip(
            joined,
            gates,
            zip(*(part.unbind(0) for part in gates.unflatten(2, (4, size)).unbind(2))),
            recurrent,
            after if is_top else self.joined[layer + 1][:, :, :size],
            cells,
            cells[1:],
            copies,
            gates[:, :, : 3 * size],
        )
        return [Place(*row) for row in rows]

    def recurrent(self, layer: int) -> torch.Tensor:
        """[steps + 1, blocks, hidden, width], a layer's hidden state before the first step and after each."""
        return self.joined[layer][:, :, -self.network.size - 1 : -1]

    def clear(self, columns: torch.Tensor) -> None:
        """Put zeros where coordinates, a mask [n], are not to count: what stands there may be NaN."""
        mask = columns.view(self.num_blocks, 1, self.width)
        ones = [*([] if self.features is None else [self.features]), *self.joined]
        for rows in (*[rows[:, :, :-1] for rows in ones], *self.gates, *self.cells, self.readouts):
            rows.masked_fill_(mask, 0.0)

    def in_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, rows, n] viewed as […, blocks, rows, width]."""
        return rows.unflatten(-1, (self.num_blocks, self.width)).transpose(-3, -2)


def _aligned(numbers: int) -> int:
    return -(-numbers // _ALIGNED) * _ALIGNED


class _Kept(threading.local):
    """The calling thread's tape that is not lent, by type of number."""

    def __init__(self) -> None:
        self.tapes: dict[torch.dtype, Tape] = {}


_kept = _Kept()


def lend(network: Network, like: torch.Tensor, num_steps: int, num_coordinates: int) -> Tape:
    """A tape to be written, until it is given back; a dtype's one tape on a CPU belongs to the calling thread."""
    num_blocks = next(
        count
        for count in range(_BLOCKS, 0, -1)
        if count == 1 or (num_coordinates % count == 0 and num_coordinates >= count * _LEAST)
    )
    sizes = (network, num_steps, num_blocks, num_coordinates // num_blocks)
    kept = _kept.tapes.pop(like.dtype, None) if like.device.type == "cpu" else None
    if kept is not None and kept.sizes == sizes:
        return kept
    memory = None if kept is None or len(kept.memory) < Tape.numbers(*sizes) else kept.memory
    del kept  # before there is more
    with torch.inference_mode(False):  # it may be written into outside of the mode that it is first needed in
        if memory is None:
            memory = torch.empty(Tape.numbers(*sizes), dtype=like.dtype, device=like.device)
        return Tape(sizes, memory)


def give_back(tape: Tape) -> None:
    """Let the thread use a tape again, or its memory."""
    if tape.memory.device.type == "cpu":
        known = _kept.tapes.get(tape.memory.dtype)
        if known is None or len(known.memory) <= len(tape.memory):
            _kept.tapes[tape.memory.dtype] = tape
