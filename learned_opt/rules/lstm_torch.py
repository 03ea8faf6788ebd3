"""The LSTM rule's network in plain torch, forwards and backwards over several steps, without an autograd graph.

It runs where no compiled kernel can (`native`): without a compiler, in float64, on other devices. Layer by layer, the
steps are run again, keeping what the way back needs; then back-propagation through time, written out by hand.

What it costs beside the matrix products is passes over memory and tanh. On a CPU torch's sigmoid takes a third of the
time of its tanh, so tanh(x) is 2σ(2x) − 1 here, the same number to rounding: the candidates' weights are doubled, and
one sigmoid covers all four gates. Biases are a column of the weights, against a row of ones.

On a CPU, memory that is fresh from the system costs more to touch than to compute in: every thread keeps what a run was
recorded in, as large as its largest so far, and records the next one there.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from learned_opt.task import Tensors


def with_bias(theta: Tensors, name: str) -> torch.Tensor:
    """A layer's weights [..., outputs, inputs + 1], the bias as their last column."""
    return torch.cat([theta[f"{name}.weight"], theta[f"{name}.bias"][..., None]], -1)


def doubled_candidates(theta: Tensors, layer: int) -> torch.Tensor:
    """A layer's weights [..., 4 hidden, inputs + hidden + 1], biases last, such that σ of the product gives every gate.

    The candidate is 2σ − 1 of its rows.
    """
    weight = with_bias(theta, f"lstm.{layer}")
    weight[..., 3 * weight.shape[-2] // 4 :, :] *= 2
    return weight


class _Kept(threading.local):
    """The calling thread's memory, by type of number."""

    def __init__(self) -> None:
        self.numbers: dict[torch.dtype, torch.Tensor] = {}


_kept = _Kept()
NUMBERS_KEPT = 5
"""Numbers that a tape keeps of a step for each number of the state, about."""
_ALIGNED = 16  # numbers: 64 bytes in single precision


def _buffers(like: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Uninitialized tensors of these shapes; on a CPU, valid until this thread asks again."""
    if like.device.type != "cpu":
        return [like.new_empty(shape) for shape in shapes]
    sizes = [-(-math.prod(shape) // _ALIGNED) * _ALIGNED for shape in shapes]
    flat = _kept.numbers.get(like.dtype)
    if flat is None or len(flat) < sum(sizes):
        _kept.numbers.pop(like.dtype, None)
        with torch.inference_mode(False):  # it may be written into outside of the mode that it is first needed in
            flat = _kept.numbers[like.dtype] = torch.empty(sum(sizes), dtype=like.dtype)
    parts = flat[: sum(sizes)].split(sizes)
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes)]


@dataclasses.dataclass(frozen=True)
class Tape:
    """What `backward` needs of a run of the network; valid until the calling thread's next one.

    Attributes:
        inputs: [steps, rows, n], what the network was given.
        dense: [steps, units, n], what the dense layer made of it, or None.
        joined: per layer [steps + 1, width + hidden + 1, n], the layer's inputs, its last hidden state, and ones.
        gates: per layer [steps, 4 hidden, n], activated.
        cells: per layer [steps + 1, hidden, n].
        bent: per layer [steps, hidden, n], tanh of the cells after each step.
        d_joined: per layer [steps, width + hidden, n], room for derivatives with respect to the joined inputs.
        d_gates: [4 hidden, n], room for those of a step's gates.
    """

    inputs: torch.Tensor
    dense: torch.Tensor | None
    joined: list[torch.Tensor]
    gates: list[torch.Tensor]
    cells: list[torch.Tensor]
    bent: list[torch.Tensor]
    d_joined: list[torch.Tensor]
    d_gates: torch.Tensor


def run(theta: Tensors, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> Tape:
    """Run the network over inputs [steps, rows, n] from a state of two [layers, hidden, n] tensors."""
    num_layers, size, n = hidden.shape
    num_steps = len(inputs)
    dense = None
    if "dense.weight" in theta:
        dense = F.elu_(torch.matmul(theta["dense.weight"], inputs).add_(theta["dense.bias"][:, None]))
    below = inputs if dense is None else dense
    widths = [below.shape[1], *[size] * (num_layers - 1)]
    shapes: list[tuple[int, ...]] = [(4 * size, n)]
    for width in widths:
        shapes += [(num_steps + 1, width + size + 1, n), (num_steps, 4 * size, n), (num_steps + 1, size, n)]
        shapes += [(num_steps, size, n), (num_steps, width + size, n)]
    d_gates, *rooms = _buffers(inputs, shapes)
    tape = Tape(inputs, dense, rooms[::5], rooms[1::5], rooms[2::5], rooms[3::5], rooms[4::5], d_gates)
    minus_one = inputs.new_full((), -1.0)
    for layer, (width, joined, gates, cells, bent) in enumerate(
        zip(widths, tape.joined, tape.gates, tape.cells, tape.bent)
    ):
        weight = doubled_candidates(theta, layer)
        joined[:num_steps, :width] = below
        joined[0, width:-1] = hidden[layer]
        joined[:, -1] = 1
        cells[0] = cell[layer]
        old = cells[0]
        for gate, (i, f, o, candidate), new, curve, joint, above in zip(
            gates, _steps(gates, 4), cells[1:], bent, joined, joined[1:, width:-1]
        ):
            torch.mm(weight, joint, out=gate).sigmoid_()
            torch.add(minus_one, candidate, alpha=2, out=candidate)
            torch.mul(f, old, out=new).addcmul_(i, candidate)
            torch.add(new, new, out=curve).sigmoid_()
            torch.add(minus_one, curve, alpha=2, out=curve)
            torch.mul(o, curve, out=above)
            old = new
        below = joined[1:, width:-1]
    return tape


def _steps(rows: torch.Tensor, num_parts: int) -> list[tuple[torch.Tensor, ...]]:
    """Equal parts of the rows of every step: one view for all steps is cheaper than one a step."""
    num_steps, _, n = rows.shape
    return list(zip(*(part.unbind(0) for part in rows.view(num_steps, num_parts, -1, n).unbind(1))))


def backward(
    theta: Tensors,
    tape: Tape,
    d_out: torch.Tensor,
    output_tanh: bool,
    d_hidden: torch.Tensor,
    d_cell: torch.Tensor,
    wants_inputs: bool,
) -> tuple[Tensors, torch.Tensor | None]:
    """Derivatives of a run.

    Args:
        theta: what it was run with.
        tape: what it left behind.
        d_out: cotangents of the read-outs [steps, n], behind the tanh if there is one.
        output_tanh: whether the read-out passes through tanh.
        d_hidden, d_cell: cotangents of the state after the last step, [layers, hidden, n]; overwritten with those of
            the state before the first.
        wants_inputs: whether to compute the derivative with respect to the inputs.

    Returns:
        (derivatives for every tensor of theta, [steps, rows, n] for the inputs or None; valid as long as the tape).
    """
    num_layers, size, n = d_hidden.shape
    num_steps = len(d_out)
    sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
    tanh_backward = torch.ops.aten.tanh_backward.grad_input
    out: Tensors = {}
    top = tape.joined[-1][1:, -size - 1 : -1]
    if output_tanh:
        y = torch.matmul(theta["output.weight"], top)[:, 0].add_(theta["output.bias"])
        d_out = torch.ops.aten.tanh_backward(d_out, y.tanh_())
    out["output.bias"] = d_out.sum().view(1)
    out["output.weight"] = sum((top[t] @ d_out[t] for t in range(num_steps)), d_out.new_zeros(size)).view(1, size)
    # The derivative with respect to what each layer puts out, before its own recurrent part: [steps, size, n].
    d_above = torch.mul(theta["output.weight"].view(size, 1), d_out[:, None])
    for layer in reversed(range(num_layers)):
        weight = theta[f"lstm.{layer}.weight"]
        width = weight.shape[1] - size
        below = layer > 0 or tape.dense is not None or wants_inputs
        back = (weight if below else weight[:, width:]).t().contiguous()
        d_joined = tape.d_joined[layer] if below else tape.d_joined[layer][:, width:]
        total = d_out.new_zeros(4 * size, width + size + 1)
        later, d_c = d_hidden[layer], d_cell[layer]
        flat = tape.d_gates
        d_i, d_f, d_o, d_candidate = flat.view(4, size, n).unbind(0)
        slope = d_out.new_empty(size, n)
        sigmoids = flat[: 3 * size]
        steps = zip(
            tape.gates[layer][:, : 3 * size],
            _steps(tape.gates[layer], 4),
            tape.cells[layer],
            tape.bent[layer],
            tape.joined[layer].transpose(1, 2),
            d_above,
            d_joined,
        )
        for opened, (i, f, o, candidate), cell, curve, joint, d_output, product in reversed(list(steps)):
            later.add_(d_output)
            torch.mul(later, curve, out=d_o)
            torch.mul(later, o, out=slope)
            d_c.add_(tanh_backward(slope, curve, grad_input=slope))
            torch.mul(d_c, candidate, out=d_i)
            torch.mul(d_c, cell, out=d_f)
            torch.mul(d_c, i, out=d_candidate)
            d_c.mul_(f)
            sigmoid_backward(sigmoids, opened, grad_input=sigmoids)
            tanh_backward(d_candidate, candidate, grad_input=d_candidate)
            total.addmm_(flat, joint)
            later = torch.mm(back, flat, out=product)[-size:]
        d_hidden[layer] = later
        out[f"lstm.{layer}.weight"], out[f"lstm.{layer}.bias"] = total[:, :-1], total[:, -1]
        d_above = d_joined[:, :width]
    if tape.dense is not None:
        d_above = torch.ops.aten.elu_backward(d_above, 1.0, 1.0, 1.0, True, tape.dense)
        out["dense.bias"] = d_above.sum((0, 2))
        out["dense.weight"] = torch.matmul(d_above, tape.inputs.transpose(1, 2)).sum(0)
        if wants_inputs:
            d_above = torch.matmul(theta["dense.weight"].t(), d_above)
    return {name: out[name] for name in theta}, d_above if wants_inputs else None
