"""What the rules share whose network a compiled kernel can run: `native` where it can be had, plain torch elsewhere."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable

import torch

from learned_opt.rules.base import UpdateRule
from learned_opt.rules.context import Context, TensorLayout
from learned_opt.rules.kernels import native
from learned_opt.rules.kernels.native_calls import NETWORK_STATE
from learned_opt.rules.kernels.native_shape import Inputs, Shape
from learned_opt.task import Tensors

_NATIVE_CHUNK = 2**16
"""Coordinates given to the compiled kernel at a time; it cuts them into blocks of its own."""


class CompiledRule(UpdateRule):
    """An LSTM rule that says which kernel is its own.

    A subclass describes the kernel and computes the network's inputs in torch. State named in `NETWORK_STATE` is
    the network's; everything else in it is what the inputs are computed from.
    """

    @property
    @abstractmethod
    def native_shape(self) -> Shape:
        """What the kernel is compiled for."""

    @property
    @abstractmethod
    def native_inputs(self) -> Inputs:
        """How the kernel turns gradients into inputs."""

    @property
    @abstractmethod
    def native_scale(self) -> float:
        """Factor on the read-out."""

    @abstractmethod
    def native_rows(
        self, grads: torch.Tensor, state: Tensors, layout: TensorLayout | None
    ) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
        """The kernel's rows [rows, n], the new averages, and a mask [n] of the coordinates that may move."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the rule's weights in theta, which may hold more than them."""
        return tuple(self.init_theta(torch.Generator().manual_seed(0)))

    def native_kernel(self, theta: Tensors) -> native.LSTMKernel | None:
        """The compiled kernel for this rule, where theta's device and type allow one."""
        if not native.usable(*(theta[name] for name in self.names)):
            return None
        return native.kernel(self.native_shape)

    def backward_chunk(self, theta: Tensors, num_steps: int) -> int:
        return _NATIVE_CHUNK if self.native_kernel(theta) else super().backward_chunk(theta, num_steps)

    def backward(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        loss_grads: torch.Tensor,
        context: Context | None = None,
    ) -> Tensors:
        kernel = self.native_kernel(theta)
        if kernel is None:
            return self.torch_backward(theta, grads, params, state, loss_grads, context)
        weights = native.flatten(theta, self.names)
        flat = kernel.backward(weights, self.native_inputs, self.native_scale, grads, state, loss_grads, context)
        return native.unflatten(flat, self.names, theta)

    def torch_backward(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        loss_grads: torch.Tensor,
        context: Context | None,
    ) -> Tensors:
        """`backward` without a kernel; autograd through `update` unless a rule knows better."""
        return super().backward(theta, grads, params, state, loss_grads, context)

    def vjp(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        d_update: torch.Tensor,
        d_state: Tensors,
        layout: TensorLayout | None = None,
    ) -> tuple[Tensors, torch.Tensor, torch.Tensor, Tensors]:
        """See `UpdateRule.vjp`; most of what is before the network, a few numbers a coordinate, is left to autograd."""
        weights = {name: theta[name] for name in self.names}
        kernel = self.native_kernel(theta)
        counted = "step" in state and state["step"].shape == grads.shape
        if kernel is not None and self.native_inputs.kind == "normalized" and counted:
            flat, d_grads = kernel.whole_vjp(
                native.flatten(theta, self.names),
                self.native_inputs,
                self.native_scale,
                grads.detach(),
                state,
                d_update,
                d_state,
            )
            return native.unflatten(flat, self.names, theta), d_grads, torch.zeros_like(params), d_state
        if kernel is None and type(self).torch_network_vjp is CompiledRule.torch_network_vjp:
            return super().vjp(theta, grads, params, state, d_update, d_state, layout)
        d_before = {name: d_state[name] for name in NETWORK_STATE if name in d_state}
        rows, active, pull = self.pullable_rows(grads, state, layout)
        with torch.no_grad():
            if kernel is None:
                d_theta, d_rows = self.torch_network_vjp(weights, rows, active, state, d_update, d_before)
            else:
                flat, d_rows = kernel.vjp(
                    native.flatten(theta, self.names),
                    self.native_inputs,
                    self.native_scale,
                    rows,
                    active,
                    state,
                    d_update,
                    d_before,
                )
                d_theta = native.unflatten(flat, self.names, theta)
        d_grads, d_averages = pull(d_rows, d_state)
        d_all = {**d_before, **d_averages}
        return d_theta, d_grads, torch.zeros_like(params), {name: d_all[name] for name in state}

    def pullable_rows(
        self, grads: torch.Tensor, state: Tensors, layout: TensorLayout | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, Tensors]]]:
        """What is before the network, and the way back through it.

        Returns:
            (the network's rows [rows, n], who may move [n], a function of the cotangents of the rows and of the state
            after the step: those of the gradients, and of the state before that is not the network's).
        """
        grads = grads.detach().requires_grad_()
        averages = {n: v.detach().requires_grad_() for n, v in state.items() if n not in NETWORK_STATE}
        with torch.enable_grad():
            rows, after, active = self.native_rows(grads, averages, layout)

        def pull(d_rows: torch.Tensor, d_state: Tensors) -> tuple[torch.Tensor, Tensors]:
            d_grads, *d_averages = torch.autograd.grad(
                [rows, *after.values()],
                [grads, *averages.values()],
                [d_rows, *(d_state[name] for name in after)],
                allow_unused=True,
                materialize_grads=True,
            )
            return d_grads, dict(zip(averages, d_averages))

        return rows.detach(), active, pull

    def torch_network_vjp(
        self,
        theta: Tensors,
        rows: torch.Tensor,
        active: torch.Tensor,
        state: Tensors,
        d_update: torch.Tensor,
        d_before: Tensors,
    ) -> tuple[Tensors, torch.Tensor]:
        """The network's part of `vjp` without a kernel; a rule that has none gets autograd through `update`.

        Args:
            theta: the rule's weights.
            rows: what the network is given, [rows, n].
            active: which coordinates may move, [n].
            state: rule state before the step.
            d_update: cotangent of the update, [n].
            d_before: those of what is the network's after the step, overwritten with those before it.

        Returns:
            Derivatives with respect to theta and rows.
        """
        raise NotImplementedError
