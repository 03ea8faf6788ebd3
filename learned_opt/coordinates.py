"""Running an update rule over parameter tensors: from tensors to coordinates and back, chunk by chunk.

A rule works on coordinates, and holds its state coordinates last. An optimizer's state must be one tensor of the
parameter's shape per row of the rule's state, so that every checkpoint and sharding tool can handle it. Here the two
meet: a block (`learned_opt.blocks`) is a matrix [rows, coordinates] that holds the state of one large tensor or of many
small ones. The rule runs over a block's columns in chunks, in place. Temporaries are bounded by the chunk, whatever the
size of the tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from learned_opt.blocks import Blocks, local
from learned_opt.parameter_context import (
    Sums,
    add_over_ranks,
    add_sums,
    context_of_block,
    piece_size,
    summed_at_once,
)
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.context import Context, TensorLayout
from learned_opt.rules.context import context as context_of
from learned_opt.rules.inplace import Scratch, update_
from learned_opt.rules.kernels import fused
from learned_opt.rules.lstm import LSTMRule
from learned_opt.task import Tensors

STEP = "step"
_CACHE_NUMBERS = 2**21
"""Numbers that may be in use at once by a chunk: state and gates of a 2x20 LSTM for 12,000 coordinates, 8 MiB."""
_GPU_NUMBERS = 2**26
"""The same on a GPU, where few large launches count: 400,000 coordinates of that LSTM, 256 MiB."""


def default_chunk_size(num_rows: int, device_type: str = "cpu") -> int:
    """Coordinates per chunk that keep the temporaries of a rule with so many rows of state in 8 MiB: the fastest.

    On a GPU: in 256 MiB.
    """
    if device_type == "cuda":
        return max(_GPU_NUMBERS // (2 * num_rows + 1) // 256 * 256, 1024)
    return min(max(_CACHE_NUMBERS // (2 * num_rows + 1) // 256 * 256, 1024), 65536)


class StateLayout:
    """The rows of a rule's state: what each is called, and where it belongs in the rule's own tensors.

    Attributes:
        keys: a name for each row, such as "hidden.0.3" for hidden[0, 3] or "m" for m.
        linear: whether each is linear in the gradients so far (`UpdateRule.linear_state`).
        has_step: whether the rule counts its steps.
    """

    def __init__(self, rule: UpdateRule) -> None:
        example = rule.init_state(1)
        self.has_step = STEP in example
        self.keys: list[str] = []
        self._parts: list[tuple[str, int, int, tuple[int, ...]]] = []
        for name, value in example.items():
            if name == STEP:
                continue
            lead = tuple(value.shape[:-1])
            start = len(self.keys)
            indices = itertools.product(*(range(size) for size in lead))
            self.keys += [".".join([name, *map(str, index)]) for index in indices]
            self._parts.append((name, start, len(self.keys), lead))
        self.linear = [key.partition(".")[0] in rule.linear_state for key in self.keys]

    def to_rule(self, rows: torch.Tensor, step: torch.Tensor | None) -> Tensors:
        """The rule's state from its rows [num_rows, n], as views, and its step count [1] or [n]."""
        n = rows.shape[1]
        state = {name: rows[start:stop].view(*lead, n) for name, start, stop, lead in self._parts}
        return state if step is None else {**state, STEP: step}

    def from_rule(self, state: Tensors, num_coordinates: int) -> torch.Tensor:
        """The rows [num_rows, n] of a rule's state, copied."""
        if not self._parts:
            return torch.empty(0, num_coordinates)
        return torch.cat([state[name].reshape(stop - start, -1) for name, start, stop, _ in self._parts])


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """What the rule computes in: float32, or float64 for float64 parameters."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def dense(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of this process's part of a parameter, strided: what a sparse one leaves out is zero."""
    if hasattr(grad, "placements") and grad.placements != getattr(param, "placements", None):
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    grad = local(grad)
    return grad if grad.layout == torch.strided else grad.to_dense()


@dataclasses.dataclass
class Entry:
    """One parameter in a step, this process's part of it where it is sharded.

    Attributes:
        key: the parameter itself.
        param: flat, [n]; written in place.
        grad: flat, [n].
        state: the optimizer's state of the parameter.
        step: how many steps the parameter has had before this one.
        update: where to put the update, flat [n], instead of moving the parameter; None to move it.
    """

    key: torch.Tensor
    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]
    step: float
    update: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the optimizer does with the rule's update: p ← (1 − lr·weight_decay)·p + lr·update.

    Attributes:
        lr: multiplier of the update.
        weight_decay: share of the parameter that a step removes, before lr.
        maximize: climb instead of descend.
    """

    lr: float
    weight_decay: float
    maximize: bool


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive columns of a block, and the pieces of parameters and gradients that they belong to.

    Attributes:
        rows: state [num_rows, n], a view.
        params, grads: flat pieces, n coordinates in all.
        steps: step count of each piece.
        owners: the parameter that each piece is of.
        updates: where to put the update, flat pieces; empty to move the parameters.

    A chunk of one parameter may be cut; one of several is small enough as it is.
    """

    rows: torch.Tensor
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    steps: list[float]
    owners: list[torch.Tensor]
    updates: list[torch.Tensor]

    def is_small(self, size: int, device_type: str) -> bool:
        """Whether `cut` leaves it as it is, and the sums over each of its parameters are taken in one piece."""
        longest = max((len(param) for param in self.params), default=0)
        return self.rows.shape[1] <= size and longest <= piece_size(device_type)

    def cut(self, size: int) -> list[Chunk]:
        """The same coordinates, at most `size` at a time if they are of one parameter."""
        if len(self.params) > 1 or self.rows.shape[1] <= size:
            return [self]
        (params,), (grads,) = ([part.split(size) for part in pieces] for pieces in (self.params, self.grads))
        updates = [[part] for update in self.updates for part in update.split(size)] or [[]] * len(params)
        return [
            Chunk(rows, [param], [grad], self.steps, self.owners, update)
            for rows, param, grad, update in zip(self.rows.split(size, 1), params, grads, updates)
        ]


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Tensors]
"""Gradients and parameters [n], the state's rows [num_rows, n], and the rule's state, views of the rows."""

Do = Callable[[Chunk, Inputs | None, Context | None], None]
"""What is done with a chunk: its inputs may be there already, and there may be a context."""


def plan(entries: Sequence[Entry], chunk_size: int) -> Iterator[list[Entry]]:
    """Which entries share a block: a large one has its own, small ones share up to `chunk_size` coordinates."""
    shared: list[Entry] = []
    room = chunk_size
    for entry in entries:
        size = entry.param.numel()
        if 2 * size > chunk_size:
            yield [entry]
            continue
        if size > room:
            yield shared
            shared, room = [], chunk_size
        shared.append(entry)
        room -= size
    if shared:
        yield shared


def whole_blocks(entries: Sequence[Entry], blocks: Blocks, keys: Sequence[str], chunk_size: int) -> Iterator[Chunk]:
    """The coordinates of the entries, block by block: `Chunk.cut` makes at most `chunk_size` at a time of them."""
    for members in plan(entries, chunk_size):
        owners = [e.key for e in members]
        block = blocks.of(owners, [e.state for e in members], keys)
        pieces = [e.param for e in members], [e.grad for e in members], [e.step for e in members]
        yield Chunk(block.rows, *pieces, owners, [e.update for e in members if e.update is not None])


@dataclasses.dataclass(frozen=True)
class Program:
    """An update rule ready to run on chunks of one device, outside of autocast.

    Attributes:
        rule, layout: the rule and the rows of its state.
        theta: its meta-parameters, on the device and of `dtype`.
        dtype: what is computed in.
        rates: what is done with the updates.
        chunk_size: coordinates at a time; what is computed does not depend on it.
        prepared: what `inplace.prepare` has made of theta; may be empty.
        sharded: the parameters of which this process holds a part, also an empty one, in an order that all share.
        elsewhere: those of them of which it holds an empty part.
    """

    rule: UpdateRule
    layout: StateLayout
    theta: Tensors
    dtype: torch.dtype
    rates: Rates
    chunk_size: int
    prepared: Scratch = dataclasses.field(default_factory=dict)
    sharded: Sequence[torch.Tensor] = ()
    elsewhere: Sequence[Entry] = ()

    @property
    def device_type(self) -> str:
        """The kind of device that it runs on, such as "cpu"."""
        return next(iter(self.theta.values())).device.type

    def step(self, work: Sequence[Chunk]) -> None:
        """Take one step of the rule on whole blocks: moves parameters and state."""
        self._run(self._stepper, work)

    def propose(self, work: Sequence[Chunk]) -> int:
        """Put the updates where the blocks say, zero where an update or the new state is not finite; moves state alone.

        Returns:
            The number of such coordinates; their state stays what it was, or not finite if it was that.
        """
        num_frozen: list[int] = []
        self._run(lambda: self._proposer(num_frozen), work)
        return sum(num_frozen)

    def _run(self, make: Callable[[], Do], work: Sequence[Chunk]) -> None:
        # One chunk after another: torch's own threads share each operation. Threads that each own chunks were slower,
        # since they hand the interpreter's lock back and forth at every operation.
        do = make()
        if self.rule.num_context and len(work) == 1 and not self.sharded:
            (block,) = work
            if block.is_small(self.chunk_size, self.device_type):  # what is gathered for the context serves the step
                inputs = self._inputs(block)
                sizes = tuple(len(param) for param in block.params)
                do(block, inputs, context_of(self.rule, inputs[0], inputs[3], TensorLayout(sizes)))
                return
        for block, context in zip(work, self._contexts(work, self.device_type)):
            for chunk in block.cut(self.chunk_size):
                do(chunk, None, context)

    def _contexts(self, work: Sequence[Chunk], device: str) -> Sequence[Context | None]:
        """What the rule is told of the tensors of every block."""
        if not self.rule.num_context:
            return [None] * len(work)
        sums: Sums = {}
        for block in work:
            for chunk in block.cut(summed_at_once(device)):
                grads, _, _, state = self._inputs(chunk)
                add_sums(sums, self.rule, chunk, grads, state)
        if self.sharded:
            add_over_ranks(sums, self.sharded, self._no_sums())
        return [context_of_block(sums, self.rule, block, self.dtype) for block in work]

    def _no_sums(self) -> torch.Tensor:
        """The sums over no coordinates."""
        like = next(iter(self.theta.values()))
        state = self.rule.init_state(1, dtype=like.dtype, device=like.device)
        return self.rule.context_sums(like.new_zeros(1), state, TensorLayout((1,)))[:, 0]

    def _inputs(self, chunk: Chunk) -> Inputs:
        """Gradients and parameters [n], the state's rows [num_rows, n], and the rule's state, views of the rows."""
        grads, params = _gather(chunk.grads, self.dtype), _gather(chunk.params, self.dtype)
        rows = chunk.rows.to(self.dtype)
        state = self.layout.to_rule(rows, _step_counts(chunk, self.layout, grads))
        return -grads if self.rates.maximize else grads, params, rows, state

    def _stepper(self) -> Do:
        scratch = {**self.prepared}
        lr, keep = self.rates.lr, 1 - self.rates.lr * self.rates.weight_decay
        fused_step = self._fused_stepper(fused.Factors(lr, keep, self.rates.maximize))

        def step(chunk: Chunk, inputs: Inputs | None, context: Context | None) -> None:
            if fused_step is not None and fused_step(chunk):
                return
            grads, params, rows, state = inputs or self._inputs(chunk)
            update = update_(self.rule, self.theta, grads, params, state, scratch, context)
            if rows is not chunk.rows:
                chunk.rows.copy_(rows)
            if params is chunk.params[0]:
                params.mul_(keep).add_(update, alpha=lr) if keep != 1 else params.add_(update, alpha=lr)
                return
            # Parameters of lower precision are rounded once, here.
            moved = torch.add(params * keep, update, alpha=lr)
            torch._foreach_copy_(chunk.params, list(moved.split([p.numel() for p in chunk.params])))

        return step

    def _fused_stepper(self, factors: fused.Factors) -> Callable[[Chunk], bool] | None:
        """What takes a chunk's step in one kernel, or says that it cannot; None where there is no such kernel."""
        rule = self.rule
        if not isinstance(rule, LSTMRule) or not fused.wanted(rule, self.theta["output.bias"].device, self.dtype):
            return None
        weights = fused.flat_weights(rule, self.theta)

        def step(chunk: Chunk) -> bool:
            sizes = [p.numel() for p in chunk.params]
            # The kernel reads and writes lower precision itself: nothing is converted here.
            params = chunk.params[0] if len(sizes) == 1 else torch.cat(chunk.params)
            grads = chunk.grads[0].contiguous() if len(sizes) == 1 else torch.cat(chunk.grads)
            counts = list(zip(chunk.steps, sizes))
            taken = fused.fused_step(rule, self.theta, weights, params, grads, chunk.rows, counts, factors)
            if taken and len(sizes) > 1:
                torch._foreach_copy_(chunk.params, list(params.split(sizes)))
            return taken

        return step

    def _proposer(self, num_frozen: list[int]) -> Do:
        scratch = {**self.prepared}

        def propose(chunk: Chunk, inputs: Inputs | None, context: Context | None) -> None:
            grads, params, rows, state = inputs or self._inputs(chunk)
            # From finite gradients and a finite state an LSTM gets to a finite state: its gates are bounded.
            bounded = isinstance(self.rule, LSTMRule)
            old_rows = chunk.rows.clone() if rows is chunk.rows and not bounded else chunk.rows
            # The same code as an unguarded step: the numbers are equal to the bit.
            update = update_(self.rule, self.theta, grads, params, state, scratch, context)
            # One sum tells that all is finite; it may overflow where nothing else does, so a bad one decides nothing.
            if not math.isfinite(float(update.sum() if bounded else update.sum() + rows.sum())):
                sound = update.isfinite() & rows.isfinite().all(0)
                if rows is not old_rows:
                    rows.copy_(torch.where(sound, rows, old_rows))
                update = torch.where(sound, update, 0.0)
                num_frozen.append(int((~sound).sum()))
            if rows is not chunk.rows:
                chunk.rows.copy_(rows)
            torch._foreach_copy_(chunk.updates, list(update.split([u.numel() for u in chunk.updates])))

        return propose


def _gather(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """One flat tensor of this dtype with the contents of all; where there is one tensor of this dtype, that one."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(dtype)


def _step_counts(chunk: Chunk, layout: StateLayout, like: torch.Tensor) -> torch.Tensor | None:
    """The step counts of the chunk's coordinates: [1] where they agree, else [n]; None if the rule does not count."""
    if not layout.has_step:
        return None
    if len(set(chunk.steps)) == 1:
        return like.new_full((1,), chunk.steps[0])
    return torch.cat([like.new_full((p.numel(),), s) for p, s in zip(chunk.params, chunk.steps)])
