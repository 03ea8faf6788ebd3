"""The LSTM rule's step in plain torch, written over the state, without a graph and with few temporaries.

Each layer is one matrix product into a reused block of gates (the bias is a column of the weights, against a row of
ones), and everything elementwise happens where the numbers already are; tanh(x) is 2σ(2x) − 1, as in `lstm_torch`.

Coordinates stand in blocks of some 1,500, several to an operation: torch gives whole blocks to its threads, so that one
thread finds in its cache what it wrote there, and handing out the work costs little beside the work. Blocks share the
weights, or each has its own.
"""

from __future__ import annotations

import torch

from learned_opt.rules.base import fitting_chunk, slice_coordinates
from learned_opt.rules.features import NUM_FEATURES, bias_correction, log_and_sign
from learned_opt.rules.lstm import LSTMRule
from learned_opt.rules.lstm_tape import Place, Tape
from learned_opt.rules.lstm_torch import advance, doubled_candidates, for_blocks, product, with_bias
from learned_opt.task import Tensors

_BLOCKS = 8
_LEAST = 64  # coordinates of a block that is worth having


class LSTMStep:
    """Steps of one theta on a fixed number of coordinates.

    Args:
        rule: the update rule.
        theta: its meta-parameters; with a leading dimension, one set for each block.
        num_blocks: blocks of coordinates.
        width: coordinates of a block.
        tape: where to keep the steps for the way back. As many as it has room for are then taken; the network's state
            is read before the first of them alone, and written after the last.

    Attributes:
        active: with a tape, which coordinates each step could move, [blocks, width].
    """

    def __init__(self, rule: LSTMRule, theta: Tensors, num_blocks: int, width: int, tape: Tape | None = None) -> None:
        c = self._config = rule.config
        self._shape = (num_blocks, width)
        self._tape, self._taken = tape, 0
        self.active: list[torch.Tensor] = []
        self._dense = for_blocks(with_bias(theta, "dense"), num_blocks) if c.dense_units else None
        self._layers = [for_blocks(doubled_candidates(theta, layer), num_blocks) for layer in range(c.num_layers)]
        self._output = for_blocks(with_bias(theta, "output"), num_blocks)
        like = theta["output.bias"]
        self._negative = like.new_empty(num_blocks, c.dense_units, width)
        self._minus_one = like.new_full((), -1.0)
        if tape is None:
            self._make_places(rule, like)
        else:
            self._places = list(zip(*tape.places))
            self._features = list(tape.joined[0] if tape.features is None else tape.features)
            self._tops, self._readouts = list(tape.tops), list(tape.readouts)

    def _make_places(self, rule: LSTMRule, like: torch.Tensor) -> None:
        """Buffers that every step uses again; layers share their gates."""

        def ending_in_ones(rows: int) -> torch.Tensor:
            buffer = like.new_empty(self._shape[0], rows + 1, self._shape[1])
            buffer[:, -1] = 1.0
            return buffer

        size = rule.config.hidden_size
        joined = [ending_in_ones(below + size) for below in rule.network.widths]
        top = ending_in_ones(size)
        gates = like.new_empty(self._shape[0], 4 * size, self._shape[1])
        parts = gates.unflatten(1, (4, size)).unbind(1)
        self._places = [
            tuple(
                Place(joint, gates, parts, joint[:, -size - 1 : -1], onward[:, :size])
                for joint, onward in zip(joined, [*joined[1:], top])
            )
        ]
        self._features = [ending_in_ones(rule.network.rows) if rule.config.dense_units else joined[0]]
        self._tops, self._readouts = [top], [like.new_empty(self._shape[0], 1, self._shape[1])]

    def __call__(self, grads: torch.Tensor, state: Tensors) -> torch.Tensor:
        """One step.

        Args:
            grads: [n], n = blocks x width, one block after the other.
            state: tensors [..., n], overwritten, "step" excepted: it may be of one number, and is only read.

        Returns:
            The update [n].
        """
        c, grads = self._config, grads.view(self._shape)
        now = 0 if self._tape is None else self._taken
        places, features, readout = self._places[now], self._features[now], self._readouts[now]
        if c.inputs == "normalized":
            active = self._normalized(grads, state, features)
        else:
            rows, active = log_and_sign(grads.flatten(), c.log_range)
            features[:, :NUM_FEATURES] = rows.view(NUM_FEATURES, *self._shape).transpose(0, 1)
            active = active.view(self._shape)
        if self._dense is not None:
            below = places[0].joint[:, : c.dense_units]
            product(self._dense, features, below)
            # ELU as max(x, exp(min(x, 0)) − 1): torch's own takes twice as long.
            negative = torch.clamp_max(below, 0, out=self._negative).exp_().sub_(1)
            torch.maximum(below, negative, out=below)
        is_first, is_last = now == 0, self._tape is None or now + 1 == self._tape.num_steps
        hiddens, cells = (
            value.view(*value.shape[:-1], *self._shape).transpose(1, 2).unbind(0)
            for value in (state["hidden"], state["cell"])
        )
        for weight, place, hidden, cell in zip(self._layers, places, hiddens, cells):
            old, new = (cell if kept is None else kept for kept in (place.old, place.new))
            if is_first:
                place.before.copy_(hidden)
                if old is not cell:
                    old.copy_(cell)
            advance(weight, place, old, new, self._minus_one)
            if place.after is not None:
                place.after.copy_(place.above)
            if is_last:
                hidden.copy_(place.above)
                if new is not cell:
                    cell.copy_(new)
        product(self._output, self._tops[now], readout)
        update = readout.tanh() if c.output_tanh else readout.clone()
        if self._tape is not None:
            self.active.append(active)
        self._taken += 1
        return update[:, 0].mul_(c.output_scale).masked_fill_(~active, 0).flatten()

    def _normalized(self, grads: torch.Tensor, state: Tensors, features: torch.Tensor) -> torch.Tensor:
        """`features.normalized` with averages and inputs written in place; returns the mask."""
        c = self._config
        m, v = (state[name].view(self._shape) for name in ("m", "v"))
        m.mul_(c.beta).add_(grads, alpha=1 - c.beta)
        v.mul_(c.beta).addcmul_(grads, grads, value=1 - c.beta)
        step = state["step"]
        correction = bias_correction((step if len(step) == 1 else step.view(self._shape)) + 1, c.beta)
        # Where v is zero the inputs are as good as zero, whatever they are divided by, and the update is masked.
        scale = (v / correction).sqrt_().add_(c.eps).reciprocal_()
        torch.mul(grads, scale, out=features[:, 0])
        torch.mul(m, scale.div_(correction), out=features[:, 1])
        return v != 0


class LSTMSteps:
    """Steps of one theta, or of several sets of it side by side, on any number of coordinates.

    Args:
        rule: the update rule.
        theta: its meta-parameters; with several sets each has that leading dimension.
        num_sets: how many optimizers run side by side, each on n / num_sets coordinates of its own.
    """

    def __init__(self, rule: LSTMRule, theta: Tensors, num_sets: int = 1) -> None:
        self._rule, self._theta, self._num_sets = rule, theta, num_sets
        self._width = max(1, fitting_chunk(rule) // 2)
        self._size = 0
        self._parts: list[tuple[slice, LSTMStep]] = []

    def __call__(self, grads: torch.Tensor, state: Tensors) -> torch.Tensor:
        """One step, written over the state, "step" excepted; returns the update [n]."""
        if len(grads) != self._size:
            self._size, self._parts = len(grads), self._cut(len(grads))
        update = torch.empty_like(grads)
        for part, step in self._parts:
            update[part] = step(grads[part], slice_coordinates(state, part.start, part.stop))
        return update

    def _cut(self, n: int) -> list[tuple[slice, LSTMStep]]:
        """The parts of n coordinates that are taken one after the other."""
        per_set = n // self._num_sets
        made: dict[tuple[int, int, int], LSTMStep] = {}
        parts = []
        if self._num_sets > 1 and 0 < per_set <= self._width:  # whole sets side by side
            at_once = max(1, _BLOCKS * self._width // per_set)
            for first in range(0, self._num_sets, at_once):
                last = min(first + at_once, self._num_sets)
                own = {name: v[first:last] for name, v in self._theta.items()}
                step = LSTMStep(self._rule, own, last - first, per_set)
                parts.append((slice(first * per_set, last * per_set), step))
            return parts
        for k in range(self._num_sets):
            own = self._theta if self._num_sets == 1 else {name: v[k] for name, v in self._theta.items()}
            start, stop = k * per_set, (k + 1) * per_set
            # Parts of one size, but for what does not divide: they share their buffers.
            num_parts = -(-per_set // (_BLOCKS * self._width))
            while start < stop:
                num_blocks, width = self._blocks(min(stop - start, -(-per_set // num_parts)))
                if (k, num_blocks, width) not in made:
                    made[k, num_blocks, width] = LSTMStep(self._rule, own, num_blocks, width)
                parts.append((slice(start, start + num_blocks * width), made[k, num_blocks, width]))
                start += num_blocks * width
        return parts

    @staticmethod
    def _blocks(most: int) -> tuple[int, int]:
        """(blocks, coordinates of each) for as many as there may be in a part."""
        return (_BLOCKS, most // _BLOCKS) if most >= _BLOCKS * _LEAST else (1, most)
