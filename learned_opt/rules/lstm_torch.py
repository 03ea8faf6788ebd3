"""The LSTM rule's network in plain torch, forwards and backwards over several steps, without an autograd graph.

It runs where no compiled kernel can (`native`): without a compiler, in float64, on other devices. Layer by layer, the
steps are run again, keeping what the way back needs; then back-propagation through time, written out by hand.

What it costs beside the matrix products is passes over memory and tanh. On a CPU torch's sigmoid takes a third of the
time of its tanh, so tanh(x) is 2σ(2x) − 1 here, the same number to rounding: the candidates' weights are doubled, and
one sigmoid covers all four gates. Biases are a column of the weights, against a row of ones.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from learned_opt.rules.lstm_tape import Network, Place, Tape, lend
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


def product(weight: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """weight [blocks, outputs, rows] times rows [blocks, rows, width]."""
    if len(out) > 1:
        return torch.bmm(weight, rows, out=out)
    torch.mm(weight[0], rows[0], out=out[0])  # torch's threads share one product, but not a batch of one
    return out


def advance(weight: torch.Tensor, place: Place, old: torch.Tensor, new: torch.Tensor, minus_one: torch.Tensor) -> None:
    """One step of one layer.

    Args:
        weight: of `doubled_candidates`, for every block.
        place: where its inputs are, and where its gates and its hidden state go.
        old, new: cells before, and where to put those after; may be the same.
        minus_one: that number.
    """
    i, f, o, candidate = place.parts
    product(weight, place.joint, place.gates).sigmoid_()
    torch.add(minus_one, candidate, alpha=2, out=candidate)  # tanh
    torch.mul(f, old, out=new).addcmul_(i, candidate)
    torch.add(new, new, out=place.above).sigmoid_()
    torch.add(minus_one, place.above, alpha=2, out=place.above).mul_(o)


def for_blocks(weight: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Weights with a leading dimension of blocks."""
    return weight if weight.dim() == 3 else weight.expand(num_blocks, -1, -1)


def run(network: Network, theta: Tensors, inputs: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> Tape:
    """Run the network over inputs [steps, rows, n] from a state of two [layers, hidden, n] tensors.

    Returns:
        A tape that is lent: to be given back.
    """
    tape = lend(network, inputs, len(inputs), inputs.shape[-1])
    below = tape.in_blocks(inputs)
    if tape.features is not None:
        tape.features[:, :, :-1] = below
        below = F.elu_(torch.matmul(with_bias(theta, "dense"), tape.features))
    tape.joined[0][:-1, :, : below.shape[2]] = below
    minus_one = inputs.new_full((), -1.0)
    for layer, (places, cells) in enumerate(zip(tape.places, tape.cells)):
        weight = for_blocks(doubled_candidates(theta, layer), tape.num_blocks)
        places[0].before.copy_(tape.in_blocks(hidden[layer]))
        cells[0] = tape.in_blocks(cell[layer])
        for step, place in enumerate(places):
            assert place.old is not None and place.new is not None
            advance(weight, place, place.old, place.new, minus_one)
            if place.after is not None and step + 1 < tape.num_steps:
                place.after.copy_(place.above)
    output = for_blocks(with_bias(theta, "output"), tape.num_blocks)
    for top, readout in zip(tape.tops, tape.readouts):
        product(output, top, readout)
    return tape


def backward(
    theta: Tensors,
    tape: Tape,
    d_out: torch.Tensor,
    d_hidden: torch.Tensor,
    d_cell: torch.Tensor,
    wants_inputs: bool,
) -> tuple[Tensors, torch.Tensor | None]:
    """Derivatives of some steps.

    Args:
        theta: what they were taken with.
        tape: what they left behind; overwritten.
        d_out: cotangents of the read-outs [steps, n].
        d_hidden, d_cell: cotangents of the state after the last step, [layers, hidden, n]; overwritten with those of
            the state before the first.
        wants_inputs: whether to compute the derivative with respect to the inputs.

    Returns:
        (derivatives for every tensor of theta, [steps, rows, n] for the inputs or None; valid until the tape is given
        back).
    """
    network, size, num_blocks = tape.network, tape.network.size, tape.num_blocks
    sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
    tanh_backward = torch.ops.aten.tanh_backward.grad_input
    out: Tensors = {}
    d_reads = d_out.view(tape.readouts.shape)
    both = torch.matmul(tape.tops, d_reads.transpose(2, 3)).sum((0, 1))
    out["output.weight"], out["output.bias"] = both[:-1].view(1, size), both[-1]
    output = theta["output.weight"].view(size, 1)
    dense = tape.joined[0][:-1, :, : network.dense_units].clone() if network.dense_units else None
    minus_one = d_out.new_full((), -1.0)
    flat, curve = torch.empty_like(tape.gates[0][0]), torch.empty_like(tape.cells[0][0])
    slope, sigmoids = torch.empty_like(curve), flat[:, : 3 * size]
    flat_turned = flat.transpose(1, 2)
    d_i, d_f, d_o, d_candidate = flat.unflatten(1, (4, size)).unbind(1)
    for layer in reversed(range(network.num_layers)):
        weight, width = theta[f"lstm.{layer}.weight"], network.widths[layer]
        below = layer > 0 or dense is not None or wants_inputs
        back = for_blocks((weight if below else weight[:, width:]).t().contiguous(), num_blocks)
        total = d_out.new_zeros(num_blocks, width + size + 1, 4 * size)
        later, d_c = tape.in_blocks(d_hidden[layer]), tape.in_blocks(d_cell[layer])
        is_top = layer + 1 == network.num_layers
        for place, d_read in reversed(list(zip(tape.places[layer], d_reads))):
            i, f, o, candidate = place.parts
            if is_top:
                later.addcmul_(output, d_read)
            else:
                later.add_(place.above)  # where the layer above left the derivative with respect to its inputs
            torch.add(place.new, place.new, out=curve).sigmoid_()
            torch.add(minus_one, curve, alpha=2, out=curve)
            torch.mul(later, curve, out=d_o)
            torch.mul(later, o, out=slope)
            d_c.add_(tanh_backward(slope, curve, grad_input=slope))
            torch.mul(d_c, candidate, out=d_i)
            torch.mul(d_c, place.old, out=d_f)
            torch.mul(d_c, i, out=d_candidate)
            d_c.mul_(f)
            sigmoid_backward(sigmoids, place.sigmoids, grad_input=sigmoids)
            tanh_backward(d_candidate, candidate, grad_input=d_candidate)
            _add_product(total, place.joint, flat_turned)
            product(back, flat, place.rows if below else place.before)
            later = place.before
        tape.in_blocks(d_hidden[layer]).copy_(later)
        whole = total.sum(0)
        out[f"lstm.{layer}.weight"], out[f"lstm.{layer}.bias"] = whole[:-1].t(), whole[-1]
    d_inputs = tape.joined[0][:-1, :, : network.widths[0]]
    if dense is not None and tape.features is not None:
        d_dense = torch.ops.aten.elu_backward(d_inputs, 1.0, 1.0, 1.0, True, dense)
        whole = torch.matmul(d_dense, tape.features.transpose(2, 3)).sum((0, 1))
        out["dense.weight"], out["dense.bias"] = whole[:, :-1], whole[:, -1]
        d_inputs = torch.matmul(theta["dense.weight"].t(), d_dense) if wants_inputs else d_inputs
    found = {name: out[name] for name in theta}
    return found, d_inputs.transpose(1, 2).flatten(2) if wants_inputs else None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left times right, block by block."""
    if len(total) > 1:
        total.baddbmm_(left, right)
    else:
        total[0].addmm_(left[0], right[0])
