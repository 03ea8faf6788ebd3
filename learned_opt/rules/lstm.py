"""The coordinatewise LSTM optimizer (Andrychowicz et al. 2016; RNNprop, Lv, Jiang and Li 2017).

Every coordinate runs its own LSTM, all with the same weights: gradient features go through an optional dense layer with
ELU, then through stacked LSTM layers; a linear read-out gives the update. Rows are features and columns are
coordinates. A layer's four gates are one block of rows in the order input, forget, output, candidate, so
that one matrix product computes them and one sigmoid covers three of them.

`torch_backward` is back-propagation through time written out by hand: it keeps the activated gates of a chunk's run and
needs no autograd graph. Where a kernel compiled for this machine can be had (`compiled`), it does the same. Tests hold
both to autograd.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.rules import native
from learned_opt.rules.base import RuleConfig
from learned_opt.rules.compiled import CompiledRule
from learned_opt.rules.features import NUM_FEATURES, log_and_sign, normalized
from learned_opt.task import Tensors

INPUTS = ("normalized", "log_and_sign")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMRuleConfig(RuleConfig):
    """Shape and inputs of the LSTM.

    Attributes:
        inputs: "normalized" (g/√v̂, m̂/√v̂) or "log_and_sign".
        beta: decay of the moving averages of normalized inputs, in [0, 1).
        eps: added to √v̂, positive.
        log_range: p of log-and-sign inputs, positive.
        dense_units: width of the ELU layer before the LSTM; 0 for none.
        num_layers: LSTM layers, at least 1.
        hidden_size: units per LSTM layer, at least 1.
        output_scale: factor on the read-out, positive.
        output_tanh: whether the read-out passes through tanh, which bounds a step by output_scale.
    """

    inputs: str = "normalized"
    beta: float = 0.95
    eps: float = 1e-10
    log_range: float = 10.0
    dense_units: int = 0
    num_layers: int = 1
    hidden_size: int = 8
    output_scale: float = 0.1
    output_tanh: bool = True

    def __post_init__(self) -> None:
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs must be one of {', '.join(INPUTS)}; got {self.inputs!r}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1); got {self.beta}")
        for name in ("eps", "log_range", "output_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name, least in (("dense_units", 0), ("num_layers", 1), ("hidden_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")


class LSTMRule(CompiledRule):
    """The coordinatewise LSTM.

    State: "hidden" and "cell" [layers, hidden, n]; with normalized inputs also "m", "v", "step".
    """

    kind: ClassVar[str] = "lstm"
    config: LSTMRuleConfig

    def __init__(self, config: LSTMRuleConfig | None = None) -> None:
        self.config = config or LSTMRuleConfig()

    def _input_size(self, layer: int) -> int:
        if layer:
            return self.config.hidden_size
        return self.config.dense_units or NUM_FEATURES

    def init_theta(self, generator: torch.Generator) -> Tensors:
        """Uniform(±1/√hidden) weights as in `torch.nn.LSTM`, forget bias 1, and a read-out a tenth of that."""
        c = self.config

        def uniform(bound: float, *shape: int) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) * bound

        theta: Tensors = {}
        if c.dense_units:
            theta["dense.weight"] = uniform(1 / math.sqrt(NUM_FEATURES), c.dense_units, NUM_FEATURES)
            theta["dense.bias"] = torch.zeros(c.dense_units)
        bound = 1 / math.sqrt(c.hidden_size)
        for layer in range(c.num_layers):
            theta[f"lstm.{layer}.weight"] = uniform(bound, 4 * c.hidden_size, self._input_size(layer) + c.hidden_size)
            bias = torch.zeros(4 * c.hidden_size)
            bias[c.hidden_size : 2 * c.hidden_size] = 1.0
            theta[f"lstm.{layer}.bias"] = bias
        theta["output.weight"] = uniform(bound / 10, 1, c.hidden_size)
        theta["output.bias"] = torch.zeros(1)
        return theta

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        c = self.config
        shape = (c.num_layers, c.hidden_size, num_coordinates)
        state = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("hidden", "cell")}
        if c.inputs == "normalized":
            state |= {name: torch.zeros(num_coordinates, dtype=dtype, device=device) for name in ("m", "v", "step")}
        return state

    def native_rows(self, grads: torch.Tensor, state: Tensors) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
        if self.config.inputs == "log_and_sign":
            inputs, active = log_and_sign(grads, self.config.log_range)
            return inputs, {}, active
        return normalized(grads, state, self.config.beta, self.config.eps)

    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        c = self.config
        x, new_state, active = self.native_rows(grads, state)
        if c.dense_units:
            x = F.elu(torch.addmm(theta["dense.bias"][:, None], theta["dense.weight"], x))
        hidden, cell = [], []
        for layer in range(c.num_layers):
            joined = torch.cat([x, state["hidden"][layer]])
            gates = torch.addmm(theta[f"lstm.{layer}.bias"][:, None], theta[f"lstm.{layer}.weight"], joined)
            i, f, o = gates[: 3 * c.hidden_size].sigmoid().chunk(3)
            candidate = gates[3 * c.hidden_size :].tanh()
            cell.append(f * state["cell"][layer] + i * candidate)
            x = o * cell[-1].tanh()
            hidden.append(x)
        out = torch.addmm(theta["output.bias"][:, None], theta["output.weight"], x)[0]
        out = (out.tanh() if c.output_tanh else out) * c.output_scale
        return torch.where(active, out, 0.0), {**new_state, "hidden": torch.stack(hidden), "cell": torch.stack(cell)}

    @functools.cached_property
    def native_shape(self) -> native.Shape:
        """What the kernel is compiled for."""
        c = self.config
        return native.Shape(
            num_features=NUM_FEATURES,
            dense_units=c.dense_units,
            num_layers=c.num_layers,
            hidden_size=c.hidden_size,
            output_tanh=c.output_tanh,
        )

    @functools.cached_property
    def native_inputs(self) -> native.Inputs:
        """How the kernel turns gradients into inputs."""
        c = self.config
        return native.Inputs(kind=c.inputs, betas=(c.beta,), eps=c.eps, log_range=c.log_range)

    @property
    def native_scale(self) -> float:
        return self.config.output_scale

    def torch_backward(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors, loss_grads: torch.Tensor
    ) -> Tensors:
        with torch.no_grad():
            tape = self._replay(theta, grads, state)
            # The derivative with respect to update t collects every later loss: p_{s+1} contains update t for all
            # s ≥ t.
            cotangents = loss_grads.flip(0).cumsum(0).flip(0)
            return self._backward_through_time(theta, tape, cotangents)

    def _replay(self, theta: Tensors, grads: torch.Tensor, state: Tensors) -> _Tape:
        """Run the steps again, keeping each step's joined inputs, activated gates and cells."""
        c, (num_steps, n) = self.config, grads.shape
        size = c.hidden_size
        features = []
        active = torch.empty(num_steps, n, dtype=torch.bool, device=grads.device)
        part = state
        for t in range(num_steps):
            row, part, active[t] = self.native_rows(grads[t], part)
            features.append(row)
        inputs = torch.stack(features)
        dense = None
        if c.dense_units:
            dense = F.elu_(torch.matmul(theta["dense.weight"], inputs).add_(theta["dense.bias"][:, None]))
        below = inputs if dense is None else dense
        joined, gates, cells = [], [], []
        for layer in range(c.num_layers):
            weight, bias = theta[f"lstm.{layer}.weight"], theta[f"lstm.{layer}.bias"][:, None]
            width = below.shape[1]
            joint = grads.new_empty(num_steps + 1, width + size, n)
            joint[:num_steps, :width] = below
            joint[0, width:] = state["hidden"][layer]
            gate = grads.new_empty(num_steps, 4 * size, n)
            cell = grads.new_empty(num_steps + 1, size, n)
            cell[0] = state["cell"][layer]
            for t in range(num_steps):
                torch.addmm(bias, weight, joint[t], out=gate[t])
                gate[t, : 3 * size].sigmoid_()
                gate[t, 3 * size :].tanh_()
                i, f, o, candidate = gate[t].view(4, size, n).unbind(0)
                torch.mul(f, cell[t], out=cell[t + 1]).addcmul_(i, candidate)
                torch.tanh(cell[t + 1], out=joint[t + 1, width:]).mul_(o)
            joined.append(joint)
            gates.append(gate)
            cells.append(cell)
            below = joint[1:, width:]
        return _Tape(inputs, dense, active, joined, gates, cells)

    def _backward_through_time(self, theta: Tensors, tape: _Tape, cotangents: torch.Tensor) -> Tensors:
        c, (num_steps, n) = self.config, cotangents.shape
        size = c.hidden_size
        out: Tensors = {}
        top = tape.joined[-1][1:, -size:]
        d_out = cotangents * c.output_scale * tape.active
        if c.output_tanh:
            y = torch.matmul(theta["output.weight"], top)[:, 0].add_(theta["output.bias"])
            d_out = torch.ops.aten.tanh_backward(d_out, y.tanh_())
        out["output.bias"] = d_out.sum().view(1)
        out["output.weight"] = sum((top[t] @ d_out[t] for t in range(num_steps)), d_out.new_zeros(size)).view(1, size)
        # The derivative with respect to what each layer puts out, before its own recurrent part: [steps, size, n].
        d_above = theta["output.weight"].view(size, 1) * d_out[:, None]
        for layer in reversed(range(c.num_layers)):
            weight = theta[f"lstm.{layer}.weight"]
            joint, gate, cell = tape.joined[layer], tape.gates[layer], tape.cells[layer]
            width = joint.shape[1] - size
            d_weight = torch.zeros_like(weight)
            d_bias = torch.zeros_like(theta[f"lstm.{layer}.bias"])
            wants_inputs = layer > 0 or c.dense_units > 0
            d_below = d_out.new_empty(num_steps, width, n) if wants_inputs else None
            back = weight.t() if wants_inputs else weight[:, width:].t()
            d_hidden = d_out.new_zeros(size, n)
            d_cell = d_out.new_zeros(size, n)
            dz = d_out.new_empty(4, size, n)
            for t in reversed(range(num_steps)):
                i, f, o, candidate = gate[t].view(4, size, n).unbind(0)
                d_hidden = d_hidden.add_(d_above[t])
                tanh_cell = cell[t + 1].tanh()
                torch.mul(d_hidden, tanh_cell, out=dz[2])
                d_cell.add_(torch.ops.aten.tanh_backward(d_hidden.mul_(o), tanh_cell))
                torch.mul(d_cell, candidate, out=dz[0])
                torch.mul(d_cell, cell[t], out=dz[1])
                torch.mul(d_cell, i, out=dz[3])
                d_cell.mul_(f)
                sigmoids = dz[:3].view(3 * size, n)
                torch.ops.aten.sigmoid_backward.grad_input(sigmoids, gate[t, : 3 * size], grad_input=sigmoids)
                torch.ops.aten.tanh_backward.grad_input(dz[3], candidate, grad_input=dz[3])
                flat = dz.view(4 * size, n)
                d_weight.addmm_(flat, joint[t].t())
                d_bias.add_(flat.sum(1))
                d_joint = back @ flat
                if d_below is not None:
                    d_below[t] = d_joint[:width]
                    d_hidden = d_joint[width:]
                else:
                    d_hidden = d_joint
            out[f"lstm.{layer}.weight"], out[f"lstm.{layer}.bias"] = d_weight, d_bias
            if d_below is not None:
                d_above = d_below
        if tape.dense is not None:
            d_dense = torch.ops.aten.elu_backward(d_above, 1.0, 1.0, 1.0, True, tape.dense)
            out["dense.bias"] = d_dense.sum((0, 2))
            out["dense.weight"] = torch.matmul(d_dense, tape.inputs.transpose(1, 2)).sum(0)
        return {name: out[name] for name in theta}


@dataclasses.dataclass(frozen=True)
class _Tape:
    """What `backward` keeps of a run.

    Inputs [steps, 2, n], dense [steps, units, n] or None, active [steps, n], and per layer
    joined inputs [steps + 1, width + hidden, n], activated gates [steps, 4 hidden, n], cells [steps + 1, hidden, n]."""

    inputs: torch.Tensor
    dense: torch.Tensor | None
    active: torch.Tensor
    joined: list[torch.Tensor]
    gates: list[torch.Tensor]
    cells: list[torch.Tensor]
