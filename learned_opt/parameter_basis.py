"""The bases of an optimizer's parameters (`learned_opt.rules.basis`): kept as state, and put around a step of the rule.

All state of an optimizer should be tensors of the parameter's shape, so that every checkpoint and sharding tool can
handle it. So the averages and vectors of a matrix's basis, one after another, fill as many such tensors as they need:
"basis.0", "basis.1", …, the last one ending in zeros. Here, too, they are views of one block (`learned_opt.blocks`).

The basis of a sharded parameter (DTensor) is that of the whole: every process gathers gradient and basis, computes the
same, and keeps its own part. A process that has nothing of a parameter takes part all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from learned_opt.blocks import Blocks, local
from learned_opt.coordinates import Entry, Program, whole_blocks
from learned_opt.rules.base import UpdateRule
from learned_opt.rules.basis import Sides, Turn, observe, refresh, turn_of
from learned_opt.task import Tensors

KEY = "basis"


def keys_of(rule: UpdateRule, param: torch.Tensor) -> tuple[str, ...]:
    """The names of the state that holds a parameter's basis; none where it has no basis."""
    sides = rule.basis.sides(param.shape) if rule.basis else None
    if sides is None:
        return ()
    return _keys.__wrapped__(sides) if torch.compiler.is_compiling() else _keys(sides)  # it does not look into caches


@functools.lru_cache(maxsize=1024)
def _keys(sides: Sides) -> tuple[str, ...]:
    """The names of the state that holds the basis of such a matrix."""
    count = sum(math.prod(shape) for shape in sides.shapes.values())
    return tuple(f"{KEY}.{k}" for k in range(-(-count // (sides.rows * sides.columns))))


def unpacked(sides: Sides, rows: torch.Tensor) -> Tensors:
    """The basis in rows [number of keys, numel] of a whole parameter, as views."""
    shapes = sides.shapes
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = rows.reshape(-1)[: sum(sizes)].split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


def packed(sides: Sides, basis: Tensors, num_rows: int) -> torch.Tensor:
    """The rows [num_rows, numel] that hold a basis: the inverse of `unpacked`."""
    flat = torch.cat([basis[name].reshape(-1) for name in sides.shapes])
    size = num_rows * sides.rows * sides.columns
    return torch.nn.functional.pad(flat, (0, size - len(flat))).view(num_rows, -1)


@dataclasses.dataclass(frozen=True)
class Turning:
    """One parameter during a step.

    Attributes:
        entry: the parameter.
        turned: what the rule is given in its place; it finds a parameter of zeros there.
        sides, turn: its matrix, and the basis of this step.
    """

    entry: Entry
    turned: Entry
    sides: Sides
    turn: Turn

    def result(self, there: torch.Tensor) -> torch.Tensor:
        """This process's part [n] of what has these coordinates (its own part, [n]) in the basis."""
        whole = self.turn.back(self.sides.as_matrices(gathered(there, self.entry.key)))
        return own_part(whole.reshape(-1), self.entry.key)


def step(program: Program, entries: Sequence[Entry], blocks: Blocks, bases: Blocks) -> None:
    """Take one step of the rule: moves parameters and state.

    Args:
        program: what to run.
        entries: the parameters of which something is here.
        blocks: where the rule's state is packed.
        bases: where the bases are.
    """
    with torch.autocast(program.device_type, enabled=False):
        given, turnings = _begin(program, entries, bases)
        program.step(list(whole_blocks(given, blocks, program.layout.keys, program.chunk_size)))
        keep = 1 - program.rates.lr * program.rates.weight_decay
        for turning in turnings:
            moved, param = turning.result(turning.turned.param), turning.entry.param
            if param.dtype == program.dtype:
                (param if keep == 1 else param.mul_(keep)).add_(moved)
            else:
                param.copy_(torch.add(param.to(program.dtype) * keep, moved))


def propose(program: Program, entries: Sequence[Entry], blocks: Blocks, bases: Blocks) -> int:
    """Put the rule's updates into the entries, and move its state alone: see `Program.propose`, and `step`."""
    with torch.autocast(program.device_type, enabled=False):
        given, turnings = _begin(program, entries, bases)
        num_frozen = program.propose(list(whole_blocks(given, blocks, program.layout.keys, program.chunk_size)))
        for turning in turnings:
            assert turning.entry.update is not None and turning.turned.update is not None
            turning.entry.update.copy_(turning.result(turning.turned.update))
    return num_frozen


def _begin(program: Program, entries: Sequence[Entry], bases: Blocks) -> tuple[Sequence[Entry], list[Turning]]:
    """Take a step's gradients into the bases.

    Returns:
        The entries, those with a basis replaced by what the rule is to be given; and those parameters with a basis, in
        an order that all processes share, to be handed to `Turning.result` in this order.
    """
    basis = program.rule.basis
    if basis is None:
        return entries, []
    plain = [entry for entry in entries if not hasattr(entry.key, "placements")]
    known = {id(entry.key): entry for entry in [*entries, *program.elsewhere]}
    everywhere = [known[id(param)] for param in program.sharded if id(param) in known]
    turnings: dict[int, Turning] = {}
    for entry in [*plain, *everywhere]:
        sides = basis.sides(entry.key.shape)
        if sides is not None:
            turnings[id(entry.key)] = _begin_one(program, entry, sides, bases)
    given = [turnings[id(e.key)].turned if id(e.key) in turnings else e for e in entries]
    return given, list(turnings.values())


def _begin_one(program: Program, entry: Entry, sides: Sides, bases: Blocks) -> Turning:
    rule, param, dtype = program.rule, entry.key, program.dtype
    assert rule.basis is not None
    keys = _keys(sides)
    block = bases.of([param], [entry.state], keys)
    is_sharded = hasattr(param, "placements")
    if is_sharded:
        own = unpacked(sides, gathered_rows(block.rows, param))
    else:
        own = block.kept = block.kept or unpacked(sides, block.rows)  # the state itself
    grad = sides.as_matrices(gathered(entry.grad.to(dtype), param))
    observe(rule.basis, sides, own, grad, overwrite=True)
    turn = turn_of(own)
    if entry.step % rule.basis.every == 0:
        found = refresh(sides, own, entry.step == 0)
        if entry.step:
            _turn_state(program, entry, sides, turn_of(found).since(turn))
        for name, value in found.items():
            own[name].copy_(value)
    if is_sharded:
        for row, whole in zip(block.rows, packed(sides, own, len(keys))):
            row.copy_(own_part(whole, param))
    turned = own_part(turn.gradients(grad).reshape(-1), param)
    nothing = torch.zeros_like(turned)
    update = None if entry.update is None else torch.empty_like(turned)
    given = dataclasses.replace(entry, param=nothing, grad=turned, update=update)
    return Turning(entry, given, sides, turn)


def _turn_state(program: Program, entry: Entry, sides: Sides, change: Turn) -> None:
    """Turn what the parameter's state holds that is linear in gradients."""
    linear = [key for key, is_linear in zip(program.layout.keys, program.layout.linear) if is_linear]
    if not linear:
        return
    here = [local(entry.state[key]) for key in linear]
    whole = torch.stack([gathered(row.reshape(-1).to(program.dtype), entry.key) for row in here])
    turned = change.into(sides.as_matrices(whole)).flatten(-2)
    torch._foreach_copy_(here, [own_part(new, entry.key).view(row.shape) for row, new in zip(here, turned.unbind(0))])


def gathered_rows(rows: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Rows [k, n] of this process's part of a parameter, as rows [k, numel] of the whole."""
    if not hasattr(param, "placements"):
        return rows
    return torch.stack([gathered(row, param) for row in rows])


def gathered(part: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """This process's part [n] of something of a parameter's shape, as the whole [numel]."""
    if not hasattr(param, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = param
    whole = DTensor.from_local(
        part.reshape(sharded.to_local().shape),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    ).full_tensor()
    return whole.reshape(-1)


def own_part(whole: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """This process's part [n] of the whole [numel]: the inverse of `gathered`."""
    if not hasattr(param, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = param
    mesh = sharded.device_mesh
    copied = DTensor.from_local(whole.view(sharded.shape), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copied.redistribute(placements=sharded.placements).to_local().reshape(-1)
