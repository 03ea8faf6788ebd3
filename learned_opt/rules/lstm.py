"""The coordinatewise LSTM optimizer (Andrychowicz et al. 2016; RNNprop, Lv, Jiang and Li 2017).

Every coordinate runs its own LSTM, all with the same weights: gradient features go through an optional dense layer with
ELU, then through stacked LSTM layers; a linear read-out gives the update. Rows are features and columns are
coordinates. A layer's four gates are one block of rows in the order input, forget, output, candidate, so
that one matrix product computes them and one sigmoid covers three of them.

The ways back, through a truncation and through one step, are written out by hand (`lstm_torch`). Where a kernel
compiled for this machine can be had (`compiled`), it does the same. Tests hold both to autograd.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.rules import lstm_tape, lstm_torch
from learned_opt.rules.base import RuleConfig
from learned_opt.rules.compiled import CompiledRule
from learned_opt.rules.context import Context, TensorLayout
from learned_opt.rules.features import NUM_FEATURES, log_and_sign, normalized
from learned_opt.rules.kernels.native_shape import Inputs, Shape
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

    def native_rows(
        self, grads: torch.Tensor, state: Tensors, layout: TensorLayout | None = None
    ) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
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
    def native_shape(self) -> Shape:
        """What the kernel is compiled for."""
        c = self.config
        return Shape(
            num_features=NUM_FEATURES,
            dense_units=c.dense_units,
            num_layers=c.num_layers,
            hidden_size=c.hidden_size,
            output_tanh=c.output_tanh,
        )

    @functools.cached_property
    def network(self) -> lstm_tape.Network:
        """The sizes of the network in plain torch."""
        c = self.config
        return lstm_tape.Network(NUM_FEATURES, c.dense_units, c.num_layers, c.hidden_size)

    @functools.cached_property
    def native_inputs(self) -> Inputs:
        """How the kernel turns gradients into inputs."""
        c = self.config
        return Inputs(kind=c.inputs, betas=(c.beta,), eps=c.eps, log_range=c.log_range)

    @property
    def native_scale(self) -> float:
        return self.config.output_scale

    def backward_chunk(self, theta: Tensors, num_steps: int) -> int:
        if self.native_kernel(theta):
            return super().backward_chunk(theta, num_steps)
        # Sharing out an operation among threads costs more than the cache gives: as many as memory is spared for.
        return max(1024, self.network.most_coordinates(num_steps))

    def torch_backward(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        loss_grads: torch.Tensor,
        context: Context | None,
    ) -> Tensors:
        with torch.no_grad():
            inputs = grads.new_empty(len(grads), NUM_FEATURES, grads.shape[1])
            active = torch.empty_like(grads, dtype=torch.bool)
            averages = state
            for t, grad in enumerate(grads):
                inputs[t], averages, active[t] = self.native_rows(grad, averages)
            tape = lstm_torch.run(self.network, theta, inputs, state["hidden"], state["cell"])
            total = self.backward_over(theta, tape, active, loss_grads)
            lstm_tape.give_back(tape)
            return total

    @torch.no_grad()
    def backward_over(
        self, theta: Tensors, tape: lstm_tape.Tape, active: torch.Tensor, loss_grads: torch.Tensor
    ) -> Tensors:
        """`backward` over steps that a tape holds; active: [steps, n], who could move."""
        # The derivative with respect to update t collects every later loss: p_{s+1} contains update t for all s ≥ t.
        cotangents = loss_grads.flip(0).cumsum(0).flip(0)
        way = lstm_torch.WayBack(theta, tape, wants_inputs=False)
        d_reads = self.d_readouts(tape.readouts, cotangents, active)
        for step in reversed(range(tape.num_steps)):
            way.step(step, d_reads[step])
        return way.theta()

    def d_readouts(self, readouts: torch.Tensor, d_update: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Cotangents [..., n] of the read-outs [..., blocks, 1, width], from those of the updates."""
        d_out = d_update * self.config.output_scale * active
        if not self.config.output_tanh:
            return d_out
        return torch.ops.aten.tanh_backward(d_out, readouts.view_as(d_out).tanh())

    def torch_network_vjp(
        self,
        theta: Tensors,
        rows: torch.Tensor,
        active: torch.Tensor,
        state: Tensors,
        d_update: torch.Tensor,
        d_before: Tensors,
    ) -> tuple[Tensors, torch.Tensor]:
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        d_rows = torch.empty_like(rows)
        size = self.backward_chunk(theta, 1)
        for start in range(0, len(d_update), size):
            part = slice(start, start + size)
            before = (state["hidden"][..., part], state["cell"][..., part])
            tape = lstm_torch.run(self.network, theta, rows[None, :, part], *before)
            way = lstm_torch.WayBack(theta, tape, wants_inputs=True)
            way.begin(d_before["hidden"][..., part], d_before["cell"][..., part])
            d_part = way.step(0, self.d_readouts(tape.readouts[0], d_update[part], active[part]))
            assert d_part is not None
            d_rows[:, part] = d_part
            d_before["hidden"][..., part], d_before["cell"][..., part] = way.end()
            for name, value in way.theta().items():
                total[name] += value
            lstm_tape.give_back(tape)
        return total, d_rows
