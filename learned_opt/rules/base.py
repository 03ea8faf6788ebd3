"""The interface of an update rule, and its application chunk by chunk.

An update rule is a pure function: (theta, gradients, parameters, rule state) to (update, new rule state), with
parameters_new = parameters + update. Everything is held *coordinates last*: gradients are [n], every state tensor is
[..., n], so that a matrix product over features runs over contiguous coordinates. Rules are coordinatewise: column i of
the result depends on column i of the inputs alone, so any split of the coordinates gives the same numbers. What a rule
is to know of a coordinate's whole parameter tensor is computed beforehand and passed in (`learned_opt.rules.context`),
and which coordinates a matrix has may be chosen beforehand, too (`learned_opt.rules.basis`).
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from learned_opt.task import Tensors

if TYPE_CHECKING:
    from learned_opt.rules.basis import Basis
    from learned_opt.rules.context import Context, TensorLayout

_CACHED_NUMBERS = 2**18
"""How many numbers of rule state a chunk may have for its temporaries to stay in a core's second-level cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Base of the rules' configurations: frozen, validated when made, plain values only.

    Attributes:
        former_settings: those that there are no longer and that exported files may hold, with the value at which they
            did nothing.
    """

    former_settings: ClassVar[Mapping[str, Any]] = {}


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "true or false"),
}


def check_types(rule: str, config: type[RuleConfig], settings: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first setting that is not of its field's type; ranges are the configuration's own."""
    for field in dataclasses.fields(config):
        types, words = _TYPES[str(field.type)]
        value = settings.get(field.name, field.default)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"{field.name} of rule {rule!r} must be {words}; got {value!r}")


class UpdateRule(ABC):
    """A learned update rule. Holds its configuration and no tensors; theta and state are passed in.

    Attributes:
        kind: the name the rule is registered under.
        num_context: rows of context that `update` is given; 0 for a rule that needs none.
        basis: the basis that it wants the gradients of matrices in, and makes updates in (`learned_opt.rules.basis`);
            None for the coordinates as they are. A rule with a basis must not use `params`, which are not turned.
        linear_state: names of state that is linear in the gradients so far; it turns with the basis.
    """

    kind: ClassVar[str]
    config: RuleConfig
    num_context: int = 0
    basis: Basis | None = None
    linear_state: ClassVar[tuple[str, ...]] = ()

    def turns(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether any tensor of these shapes is taken in a basis."""
        return self.basis is not None and any(map(self.basis.sides, shapes))

    @abstractmethod
    def init_theta(self, generator: torch.Generator) -> Tensors:
        """Fresh meta-parameters, float32 on the CPU: a flat dict of tensors."""

    @abstractmethod
    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        """The state of coordinates that have seen no gradient: a dict of [..., num_coordinates] tensors, all zero.

        The entry "step", where there is one, counts inner steps and may also be passed as a [1] tensor.
        """

    def context_terms(self, grads: torch.Tensor, state: Tensors) -> torch.Tensor:
        """What is summed over a tensor's coordinates for the context: [terms, n], from gradients [n] and state."""
        raise NotImplementedError

    def context_of(self, sums: torch.Tensor) -> torch.Tensor:
        """The context [num_context, …] that sums [terms, …] of `context_terms` make."""
        raise NotImplementedError

    def context_sums(self, grads: torch.Tensor, state: Tensors, layout: TensorLayout) -> torch.Tensor:
        """The sums of `context_terms` over every tensor, [terms, tensors], as `TensorLayout.sums` has them."""
        return layout.sums(self.context_terms(grads, state))

    @abstractmethod
    def update(
        self, theta: Tensors, grads: torch.Tensor, params: torch.Tensor, state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """One step.

        A rule with `num_context` takes a fifth argument, the context's rows [num_context, n]; zeros by default.

        Args:
            theta: the meta-parameters, of the dtype of `grads`.
            grads: gradients [n].
            params: parameters [n].
            state: rule state, tensors [..., n]; not modified.

        Returns:
            (update [n], new state). A coordinate that has never had a non-zero gradient gets update 0.
        """

    def _update(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        context: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Tensors]:
        """`update`, with the context's rows if there are any."""
        more = () if context is None else (context,)
        return self.update(theta, grads, params, state, *more)

    def backward(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        loss_grads: torch.Tensor,
        context: Context | None = None,
    ) -> Tensors:
        """Gradient with respect to theta of sum_t <loss_grads[t], p_{t+1}>, where p_{t+1} = p_t + update_t.

        Gradients are constants, which makes this the first-order meta-gradient of the run of steps. The reference
        implementation is autograd through `update`; a rule may override it with a faster route that gives
        the same numbers.

        Args:
            theta: meta-parameters.
            grads: [steps, n], the gradient that each step saw.
            params: [n], the parameters before the first step.
            state: rule state before the first step.
            loss_grads: [steps, n], derivative of the meta-loss with respect to the parameters after each step, through
                the loss evaluated there alone.
            context: of every step, for a rule that takes one; constant, like the gradients.

        Returns:
            A tensor for every tensor of theta.
        """
        rows = [None] * len(grads) if context is None else context.rows(grads.shape[1])
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        with torch.enable_grad():
            total = grads.new_zeros(())
            for grad, loss_grad, told in zip(grads, loss_grads, rows):
                update, state = self._update(leaves, grad, params, state, told)
                params = params + update
                total = total + (params * loss_grad).sum()
            out = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {n: torch.zeros_like(theta[n]) if g is None else g for n, g in zip(leaves, out)}

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
        """Pull cotangents of one step's results back to all that it was given.

        The reference implementation is autograd through `update`; a rule may override it with a faster route that
        gives the same numbers.

        Args:
            theta, grads, params, state: what `update` was given.
            d_update: cotangent of the update [n].
            d_state: cotangents of the new state, contiguous tensors [..., n]; their memory may be used for the result.
            layout: of the coordinates, for a rule that takes context, which is then part of what is differentiated.

        Returns:
            Derivatives with respect to theta, grads [n], params [n] and state.
        """
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        grads, params = grads.detach().requires_grad_(), params.detach().requires_grad_()
        before = {name: value.detach().requires_grad_() for name, value in state.items()}
        with torch.enable_grad():
            update, after = self._update(leaves, grads, params, before, self.context_rows(grads, before, layout))
            results, cotangents = [update, *after.values()], [d_update, *(d_state[name] for name in after)]
            pairs = [(r, c) for r, c in zip(results, cotangents) if r.requires_grad]
            out = torch.autograd.grad(
                [r for r, _ in pairs],
                [*leaves.values(), grads, params, *before.values()],
                [c for _, c in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
        num = len(leaves)
        return dict(zip(leaves, out)), out[num], out[num + 1], dict(zip(before, out[num + 2 :]))

    def context_rows(self, grads: torch.Tensor, state: Tensors, layout: TensorLayout | None) -> torch.Tensor | None:
        """The context's rows [num_context, n] before a step; None without a layout, or for a rule that takes none."""
        if layout is None or not self.num_context:
            return None
        values = self.context_of(layout.sums(self.context_terms(grads, state))).to(grads.dtype)
        return values.index_select(-1, layout.index(grads.device))

    def backward_chunk(self, theta: Tensors, num_steps: int) -> int:
        """Coordinates to pass to `backward` at a time: half of what a step takes, since it keeps every step's work."""
        return fitting_chunk(self) // 2

    @functools.cached_property
    def rows_per_coordinate(self) -> int:
        """How many numbers of state a coordinate has, the step count excluded."""
        return sum(v[..., 0].numel() for n, v in self.init_state(1).items() if n != "step")

    def settings(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return dataclasses.asdict(self.config)


def fitting_chunk(rule: UpdateRule) -> int:
    """Coordinates per chunk for which the rule's temporaries stay in a core's cache: more for a smaller rule."""
    return max(1024, _CACHED_NUMBERS // max(rule.rows_per_coordinate, 1))


def slice_coordinates(tensors: Tensors, start: int, stop: int) -> Tensors:
    """Columns start … stop − 1 of every tensor; tensors of one column (shared counts) are passed whole."""
    return {n: v if v.shape[-1] == 1 else v[..., start:stop] for n, v in tensors.items()}


def chunked_update(
    rule: UpdateRule,
    theta: Tensors,
    grads: torch.Tensor,
    params: torch.Tensor,
    state: Tensors,
    *,
    chunk_size: int | None = None,
    context: Context | None = None,
) -> tuple[torch.Tensor, Tensors]:
    """`rule.update` over [n] coordinates, `chunk_size` (or `fitting_chunk`) at a time: temporaries stay small."""
    n = grads.shape[-1]
    chunk_size = chunk_size or fitting_chunk(rule)

    def told(start: int, stop: int) -> tuple[torch.Tensor, ...]:
        return () if context is None else (context.of(start, stop).rows(stop - start),)

    if n <= chunk_size:
        return rule.update(theta, grads, params, state, *told(0, n))
    update = torch.empty_like(grads)
    new_state: Tensors = {}
    for start in range(0, n, chunk_size):
        stop = min(start + chunk_size, n)
        part, part_state = rule.update(
            theta, grads[start:stop], params[start:stop], slice_coordinates(state, start, stop), *told(start, stop)
        )
        update[start:stop] = part
        for name, value in part_state.items():
            if state[name].shape[-1] == 1:
                new_state[name] = value
                continue
            if name not in new_state:
                new_state[name] = torch.empty(*value.shape[:-1], n, dtype=value.dtype, device=value.device)
            new_state[name][..., start:stop] = value
    return update, new_state
