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


class WayBack:
    """Goes back over the steps of a tape, which stays as it is, the last step first.

    Args:
        theta: what the steps were taken with.
        tape: what they left behind.
        wants_inputs: whether derivatives with respect to the inputs are wanted, too.
    """

    def __init__(self, theta: Tensors, tape: Tape, wants_inputs: bool) -> None:
        network, size, num_blocks = tape.network, tape.network.size, tape.num_blocks
        like = tape.memory
        self._theta, self._tape, self._wants_inputs = theta, tape, wants_inputs
        self._output = theta["output.weight"].view(size, 1)
        self._minus_one = like.new_full((), -1.0)
        self._d_reads = torch.empty_like(tape.readouts)
        self._dense = with_bias(theta, "dense") if network.dense_units else None
        self._dense_total = like.new_zeros(network.dense_units, network.rows + 1)
        self._weights, self._totals, self._below, self._later, self._joint, self._d_cells = [], [], [], [], [], []
        for layer, width in enumerate(network.widths):
            weight = theta[f"lstm.{layer}.weight"]
            below = width if layer or network.dense_units or wants_inputs else 0
            self._weights.append(for_blocks(weight[:, width - below :].t().contiguous(), num_blocks))
            self._totals.append(like.new_zeros(num_blocks, width + size + 1, 4 * size))
            joint = like.new_zeros(num_blocks, below + size, tape.width)
            self._joint.append(joint)
            self._below.append(joint[:, :below])
            self._later.append(joint[:, below:])
            self._d_cells.append(like.new_zeros(num_blocks, size, tape.width))
        self._flat, self._curve = torch.empty_like(tape.gates[0][0]), torch.empty_like(tape.cells[0][0])
        self._slope = torch.empty_like(self._curve)
        self._parts = self._flat.unflatten(1, (4, size)).unbind(1)

    def begin(self, d_hidden: torch.Tensor, d_cell: torch.Tensor) -> None:
        """Cotangents of the state after the last step, [layers, hidden, n]; zero where this is not called."""
        for layer in range(self._tape.network.num_layers):
            self._later[layer].copy_(self._tape.in_blocks(d_hidden[layer]))
            self._d_cells[layer].copy_(self._tape.in_blocks(d_cell[layer]))

    def step(self, index: int, d_out: torch.Tensor) -> torch.Tensor | None:
        """One step.

        Args:
            index: its place on the tape: one less than the last time.
            d_out: cotangents of the read-outs [n].

        Returns:
            Derivatives with respect to the inputs [rows, n], if they are wanted; a view, valid until the next step.
        """
        tape, size = self._tape, self._tape.network.size
        d_read = self._d_reads[index].copy_(d_out.view(tape.num_blocks, 1, tape.width))
        self._later[-1].addcmul_(self._output, d_read)
        for layer in reversed(range(tape.network.num_layers)):
            place, later, d_cell = tape.places[layer][index], self._later[layer], self._d_cells[layer]
            if layer + 1 < tape.network.num_layers:
                later.add_(self._below[layer + 1])
            self._gates_back(place, later, d_cell, size)
            _add_product(self._totals[layer], place.joint, self._flat.transpose(1, 2))
            product(self._weights[layer], self._flat, self._joint[layer])
        d_inputs = self._below[0]
        if tape.features is not None:
            assert self._dense is not None
            activated = tape.joined[0][index, :, : tape.network.dense_units]
            d_inputs = torch.ops.aten.elu_backward(d_inputs, 1.0, 1.0, 1.0, True, activated)
            self._dense_total += torch.matmul(d_inputs, tape.features[index].transpose(1, 2)).sum(0)
            if self._wants_inputs:
                d_inputs = torch.matmul(self._dense[:, :-1].t(), d_inputs)
        return d_inputs.transpose(0, 1).flatten(1) if self._wants_inputs else None

    def _gates_back(self, place: Place, later: torch.Tensor, d_cell: torch.Tensor, size: int) -> None:
        """From a layer's hidden state and cell to its gates (in the scratch) and to the cell before."""
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        tanh_backward = torch.ops.aten.tanh_backward.grad_input
        assert place.old is not None and place.new is not None
        i, f, o, candidate = place.parts
        d_i, d_f, d_o, d_candidate = self._parts
        curve, slope, sigmoids = self._curve, self._slope, self._flat[:, : 3 * size]
        torch.add(place.new, place.new, out=curve).sigmoid_()
        torch.add(self._minus_one, curve, alpha=2, out=curve)
        torch.mul(later, curve, out=d_o)
        torch.mul(later, o, out=slope)
        d_cell.add_(tanh_backward(slope, curve, grad_input=slope))
        torch.mul(d_cell, candidate, out=d_i)
        torch.mul(d_cell, place.old, out=d_f)
        torch.mul(d_cell, i, out=d_candidate)
        d_cell.mul_(f)
        sigmoid_backward(sigmoids, place.sigmoids, grad_input=sigmoids)
        tanh_backward(d_candidate, candidate, grad_input=d_candidate)

    def end(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cotangents of the state before the step that was taken last: two [layers, hidden, n]."""

        def rows(blocks: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack([block.transpose(0, 1).flatten(1) for block in blocks])

        return rows(self._later), rows(self._d_cells)

    def theta(self) -> Tensors:
        """Derivatives for every tensor of theta, once every step of the tape has been taken."""
        out: Tensors = {}
        both = torch.matmul(self._tape.tops, self._d_reads.transpose(2, 3)).sum((0, 1))
        out["output.weight"], out["output.bias"] = both[:-1].view(1, -1), both[-1]
        for layer, total in enumerate(self._totals):
            whole = total.sum(0)
            out[f"lstm.{layer}.weight"], out[f"lstm.{layer}.bias"] = whole[:-1].t(), whole[-1]
        if self._dense is not None:
            out["dense.weight"], out["dense.bias"] = self._dense_total[:, :-1], self._dense_total[:, -1]
        return {name: out[name] for name in self._theta}


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left times right, block by block."""
    if len(total) > 1:
        total.baddbmm_(left, right)
    else:
        total[0].addmm_(left[0], right[0])
