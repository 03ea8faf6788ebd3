"""An LSTM that mixes normalized momenta, and sets the size of the step on a logarithmic scale.

Every coordinate runs one LSTM layer on inputs that do not change when the gradient's sign does (`features.momenta`).
Its outputs are read out as the logarithm of a step's size, y₀, and the shares y₁ … y₄ of four directions: the gradient
and its averages at three time scales, each divided by the root of the average square. The update is

    u = scale · exp(R·tanh(y₀/R)) · Σₖ yₖ·dₖ₋₁,

so that it turns with the gradient's sign by construction, and its size may range over e^±R. At first the only share is
−1 of the fastest momentum: Adam with learning rate `scale`. The LSTM learns when to take longer and shorter steps, and
which memory to trust.

With `growth`, one more output y₅ makes the step grow or shrink for good: its size has another factor exp(sₜ), where
sₜ = sₜ₋₁ + growth·tanh(y₅), so that steps find their scale wherever it lies. The LSTM is told how well the gradient
of the *whole tensor* agrees with its momenta (`features.agreement`), and y₅ hears that, and all that the LSTM hears of
the coordinate, directly, too. It begins as half of the tensor's agreement with the faster two and with all three, a
quarter of that with the fastest, half of the coordinate's own with the fastest, less a fifth: steps grow while
gradients go on as before, and shrink where they turn. That much is the idea of Rprop (Riedmiller and Braun 1993) and of
hypergradients (Baydin et al. 2018); when, by how much, and for how long it is right is learned.

With `signal` it is told, as well, how much of the tensor's gradient is signal. In noise a gradient agrees little with
its past, however short the steps are; a rule that shrinks steps below a certain agreement then shrinks them for ever.

With `leak` some of what steps have grown or shrunk by is forgotten where the signal is weak and y₅ speaks for neither:
sₜ = (1 − leak·(1 − ρ)²·(1 − tanh²(y₅)))·sₜ₋₁ + growth·tanh(y₅), with ρ what it is told of the signal. There y₅ is a
little below zero for ever, and steps would shrink to nothing; so they stay where both are in balance. What tells
clearly that steps are too long still makes them as short as they have to be.

With `loudness` steps grow less the quieter gradients are beside what they are divided by: a network that knows its
data by heart has many batches with next to no gradient, which agree, and steps that had grown on them would throw it
out at the next one that has more.

With `clip` that next gradient is scaled down, too: a tensor's gradient that is larger than so many times what it has
been of late counts for no more than that, in the step and in the averages. What it has been of late follows, by a
factor of up to two in each step where `clip` is 4, so that gradients may still become as large as they like.

With `brake` steps shrink at once where a gradient is scaled down so: it says that they have become too long, and by how
much, before one is taken; the agreements would take ten steps to notice, which the loss need not survive. They do not
shrink below e^−`most_braked` for that: where a network knows its data by heart gradients may be zero for hundreds of
batches, and the next one is then louder beyond all measure.

With `relative_eps` such a network comes to rest: a share of how large the tensor's gradients have been is added to what
divides them, so that gradients far below it make next to no step, in whatever units the loss comes.

Averages at several scales are those of Metz et al. 2020 (arXiv:2009.11243); steps as a direction times the exponential
of an output those of Metz et al. 2019 (arXiv:1810.10180). Symmetry and mixture are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from learned_opt.rules.base import RuleConfig
from learned_opt.rules.basis import Basis
from learned_opt.rules.compiled import CompiledRule
from learned_opt.rules.context import TensorLayout
from learned_opt.rules.features import (
    NUM_CONTEXT,
    NUM_DIRECTIONS,
    NUM_EVEN,
    NUM_MOMENTA,
    agreement,
    agreement_terms,
    clip_factor,
    clip_terms,
    largest_root,
    largest_terms,
    momenta,
)
from learned_opt.rules.kernels import native
from learned_opt.rules.kernels.native_shape import Inputs, Shape
from learned_opt.task import Tensors

_MOST_SHRUNK = 12.0  # the kernel's, too
_SIGNAL = NUM_EVEN + NUM_CONTEXT  # the input that tells how strong the signal is
_OWN_AGREEMENT = NUM_MOMENTA  # the input that tells whether a coordinate's gradient goes on as its fastest momentum


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureRuleConfig(RuleConfig):
    """Time scales, size of the LSTM, and range of the step.

    Attributes:
        fast, medium, slow: decays of the three averages of the gradient, each in [0, 1).
        square, recent_square: decays of the average square that normalizes, and of the recent one that it is compared
            with, each in [0, 1).
        square_ratio: the most that the average square may be of the recent one, at least 1.
        eps: added to the root of the average square, positive, in units of the gradient.
        relative_eps: added to it, too, in [0, 1): in units of how large the tensor's gradients have been, the root of
            the mean of the largest average squares that its coordinates have had. With it a network that has learned
            its data by heart comes to rest, whatever the units of the loss; what goes on to smaller and smaller
            gradients without noise gets there more slowly. 0 for none; needs `growth`.
        hidden_size: units of the LSTM, at least 1.
        output_scale: the step that all is relative to, positive, in units of the parameters.
        range: R, bound of the logarithm of a step over `output_scale`, positive.
        growth: the most that a step's logarithm grows or shrinks by for good in one step, not negative; 0 leaves this
            out, the state that it needs, and what is asked of whole tensors.
        most_grown: bound of the logarithm that a step has grown by for good, in (0, 12]; it may shrink by e^−12.
        signal: whether the LSTM is told, beside how gradients agree, how strong their signal is; needs `growth`.
        leak: the share of what a step has grown or shrunk by for good that is forgotten in each where the signal is
            nothing and nothing speaks for longer or shorter ones, in [0, 1); needs `signal`.
        loudness: with it the LSTM is told how loud gradients are, too, the mean of their squares over the average ones
            times this, at most one; and steps grow by so much less. At least 0, which leaves it out; needs `signal`.
        clip: the most that a tensor's gradient may be of what it has been of late, the root of the recent average
            square summed over the tensor; a larger one is scaled down to that. Over 1, or 0 for none; needs `growth`.
        brake: power, at least 0, of what such a gradient is scaled down by that steps, what they have grown or shrunk
            by for good, are scaled down by, too; 0 for none. Needs `clip`.
        most_braked: bound of the logarithm that a step is shrunk to by that, in (0, 12]; one shrunk further stays.
        basis: matrices are taken in the eigenvectors of their gradients' second moments (`learned_opt.rules.basis`)
            along sides of at most so many rows or columns; 0 for none.
        basis_decay: decay of those second moments, in [0, 1).
        basis_every: steps from one change of the eigenvectors to the next, at least 1.
        basis_vectors: vectors of at most so many numbers are taken in such eigenvectors, too, at least 2, or 0 for
            none; needs `basis`. For every one of n numbers that is 8·n bytes of state a number.
    """

    former_settings: ClassVar[Mapping[str, Any]] = {"doubt": 0.0}

    fast: float = 0.9
    medium: float = 0.99
    slow: float = 0.999
    square: float = 0.99
    recent_square: float = 0.9
    square_ratio: float = 64.0
    eps: float = 1e-15
    relative_eps: float = 0.0
    hidden_size: int = 8
    output_scale: float = 0.01
    range: float = 6.0
    growth: float = 0.0
    most_grown: float = 12.0
    signal: bool = False
    leak: float = 0.0
    loudness: float = 0.0
    clip: float = 0.0
    brake: float = 0.0
    most_braked: float = 3.0
    basis: int = 0
    basis_decay: float = 0.95
    basis_every: int = 5
    basis_vectors: int = 0

    def __post_init__(self) -> None:
        for name in ("fast", "medium", "slow", "square", "recent_square", "relative_eps", "leak", "basis_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        for name in ("eps", "output_scale", "range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if not 1 <= self.square_ratio < math.inf:
            raise ValueError(f"square_ratio must be finite and at least 1; got {self.square_ratio}")
        for name in ("most_grown", "most_braked"):
            if not 0 < getattr(self, name) <= 12:
                raise ValueError(f"{name} must lie in (0, 12]; got {getattr(self, name)}")
        if not 0 <= self.growth < math.inf:
            raise ValueError(f"growth must be finite and not negative; got {self.growth}")
        if self.signal and not self.growth:
            raise ValueError("signal needs growth: without it nothing is asked of whole tensors; give a growth above 0")
        if self.leak and not self.signal:
            raise ValueError(f"leak needs signal, which says where; got {self.leak} without; set signal")
        if not 0 <= self.loudness < math.inf:
            raise ValueError(f"loudness must be finite and not negative; got {self.loudness}")
        if self.loudness and not self.signal:
            raise ValueError(f"loudness needs signal: it is told beside it; got {self.loudness} without; set signal")
        if self.clip and not 1 < self.clip < math.inf:
            raise ValueError(f"clip must be finite and over 1, or 0 for none; got {self.clip}")
        if self.clip and not self.growth:
            raise ValueError("clip needs growth: without it nothing is asked of whole tensors; give a growth above 0")
        if self.relative_eps and not self.growth:
            raise ValueError(
                f"relative_eps needs growth: without it nothing is asked of whole tensors; got {self.relative_eps} "
                "without; give a growth above 0"
            )
        if not 0 <= self.brake < math.inf:
            raise ValueError(f"brake must be finite and not negative; got {self.brake}")
        if self.brake and not self.clip:
            raise ValueError(f"brake needs clip, which says when; got {self.brake} without; give a clip over 1")
        for name in ("hidden_size", "basis_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name, what in (("basis", "a matrix's side"), ("basis_vectors", "a vector")):
            value = getattr(self, name)
            if value < 0 or value == 1:
                raise ValueError(f"{name} must be 0, for none, or the length of {what}, at least 2; got {value}")
        if self.basis_vectors and not self.basis:
            raise ValueError(f"basis_vectors needs basis; got {self.basis_vectors} without; give a basis of at least 2")

    @property
    def betas(self) -> tuple[float, ...]:
        """All decays, in the order of `features.momenta`."""
        return self.fast, self.medium, self.slow, self.square, self.recent_square


class MixtureRule(CompiledRule):
    """The LSTM that mixes momenta.

    State: "hidden" and "cell" [1, hidden, n], "m" [3, n], "v" [2, n], or [3, n] with `relative_eps`, "step", and with
    `growth` "log_size" [n], which stays between −12 and `most_grown`.
    """

    kind: ClassVar[str] = "mixture"
    config: MixtureRuleConfig
    linear_state: ClassVar[tuple[str, ...]] = ("m",)

    def __init__(self, config: MixtureRuleConfig | None = None) -> None:
        c = self.config = config or MixtureRuleConfig()
        self._num_told = NUM_CONTEXT + c.signal + (c.loudness > 0) if c.growth else 0
        # Below what is told: what multiplies the gradient, and what is added to what divides it.
        self.num_context = self._num_told + (c.clip > 0) + (c.relative_eps > 0)
        self.basis = None
        if c.basis:
            self.basis = Basis(longest=c.basis, decay=c.basis_decay, every=c.basis_every, vectors=c.basis_vectors)

    def init_theta(self, generator: torch.Generator) -> Tensors:
        """Uniform(±1/√hidden) weights as in `torch.nn.LSTM`, forget bias 1; the read-out a tenth of that, and Adam."""
        size = self.config.hidden_size
        bound = 1 / math.sqrt(size)

        def uniform(bound: float, *shape: int) -> torch.Tensor:
            return (torch.rand(shape, generator=generator) * 2 - 1) * bound

        bias = torch.zeros(4 * size)
        bias[size : 2 * size] = 1.0
        shares = torch.zeros(self._num_outputs)
        shares[2] = -1.0
        theta = {
            "lstm.0.weight": uniform(bound, 4 * size, self._num_inputs + size),
            "lstm.0.bias": bias,
            "output.weight": uniform(bound / 10, self._num_outputs, size),
            "output.bias": shares,
        }
        if self.config.growth:
            # Without an LSTM's say this is Adam whose steps find their scale.
            theta["output.weight"].zero_()
            theta["output.bias"][-1] = -0.2  # steps shrink where nothing speaks for longer ones
            skip = theta["output.skip"] = torch.zeros(self._num_inputs)
            skip[_OWN_AGREEMENT] = 0.5
            skip[NUM_EVEN : NUM_EVEN + NUM_CONTEXT] = torch.tensor([0.25, 0.5, 0.5, 0.0])
            if self.config.signal:  # less so where the signal is weak: there it takes less to speak for them
                theta["output.bias"][-1] += 0.15
                skip[_SIGNAL] = -0.15
        return theta

    @property
    def _num_inputs(self) -> int:
        return NUM_EVEN + self._num_told

    @property
    def _num_outputs(self) -> int:
        return 1 + NUM_DIRECTIONS + (self.config.growth > 0)

    def context_terms(self, grads: torch.Tensor, state: Tensors) -> torch.Tensor:
        c = self.config
        terms = [agreement_terms(grads, state, c.betas, c.square_ratio, c.signal)]
        if c.clip:
            terms.append(clip_terms(grads, state, c.recent_square))
        if c.relative_eps:
            terms.append(largest_terms(state))
        return torch.cat(terms)

    def context_of(self, sums: torch.Tensor) -> torch.Tensor:
        kernel = native.kernel(self.native_shape) if native.unrecorded(sums, dtype=torch.float64) else None
        c = self.config
        if kernel is not None:
            return kernel.agreement(sums, c.loudness, c.clip, c.relative_eps)
        below: list[torch.Tensor] = []
        if c.relative_eps:
            below, sums = [c.relative_eps * largest_root(sums[-2], sums[-1])], sums[:-2]
        if c.clip:
            below, sums = [clip_factor(sums[-2], sums[-1], c.clip), *below], sums[:-2]
        return torch.cat([agreement(sums, c.loudness), *(row[None] for row in below)])

    def context_sums(self, grads: torch.Tensor, state: Tensors, layout: TensorLayout) -> torch.Tensor:
        kernel = native.kernel(self.native_shape) if native.usable(grads, *state.values()) else None
        if kernel is None:
            return super().context_sums(grads, state, layout)
        return kernel.context_sums(grads, state, self.native_inputs, layout)

    def init_state(
        self, num_coordinates: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensors:
        size = self.config.hidden_size
        squares = 3 if self.config.relative_eps else 2
        rows = {"hidden": (1, size), "cell": (1, size), "m": (NUM_MOMENTA,), "v": (squares,), "step": ()}
        if self.config.growth:
            rows["log_size"] = ()
        return {n: torch.zeros(*lead, num_coordinates, dtype=dtype, device=device) for n, lead in rows.items()}

    def update(
        self,
        theta: Tensors,
        grads: torch.Tensor,
        params: torch.Tensor,
        state: Tensors,
        context: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Tensors]:
        c = self.config
        grads, told, factor, eps = self._heard(grads, context)
        directions, inputs, new_state, active = momenta(grads, state, c.betas, c.square_ratio, eps)
        joined = torch.cat([inputs, told, state["hidden"][0]])
        gates = torch.addmm(theta["lstm.0.bias"][:, None], theta["lstm.0.weight"], joined)
        i, f, o = gates[: 3 * c.hidden_size].sigmoid().chunk(3)
        cell = f * state["cell"][0] + i * gates[3 * c.hidden_size :].tanh()
        hidden = o * cell.tanh()
        out = torch.addmm(theta["output.bias"][:, None], theta["output.weight"], hidden)
        new_state |= {"hidden": hidden[None], "cell": cell[None]}
        log_size = (out[0] / c.range).tanh() * c.range
        if c.growth:
            rate = (out[-1] + theta["output.skip"] @ joined[: self._num_inputs]).tanh()
            kept: torch.Tensor | float = 1.0
            if c.leak:
                kept = 1 - c.leak * (1 - joined[_SIGNAL]).square() * (1 - rate.square())
            if c.loudness:  # what is hardly heard is no reason to take longer steps
                rate = torch.where(rate > 0, rate * joined[self._num_inputs - 1], rate)
            grown = kept * state["log_size"] + c.growth * rate
            if c.brake:
                braking = (factor < 1) & (grown > -c.most_braked)
                braked = grown + c.brake * torch.where(braking, factor, 1.0).clamp_min(1e-30).log()
                grown = torch.where(braking, braked.clamp_min(-c.most_braked), grown)
            grown = grown.clamp(-_MOST_SHRUNK, c.most_grown)
            new_state["log_size"] = torch.where(active, grown, state["log_size"])
            log_size = log_size + new_state["log_size"]
        update = log_size.exp() * c.output_scale * (out[1 : 1 + NUM_DIRECTIONS] * directions).sum(0)
        return torch.where(active, update, 0.0), new_state

    def _heard(
        self, grads: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float | torch.Tensor]:
        """What is heard of a gradient and of its tensor, where there is context.

        Returns:
            (the gradient, clipped; what the LSTM is told, zeros without context; what clipped it; what is added to what
            divides it).
        """
        c = self.config
        if context is None:
            return grads, grads.new_zeros(self._num_told, len(grads)), torch.ones_like(grads), c.eps
        eps = c.eps + context[-1] if c.relative_eps else c.eps
        if not c.clip:
            return grads, context[: self._num_told], torch.ones_like(grads), eps
        factor = context[self._num_told]
        return grads * factor, context[: self._num_told], factor, eps

    @functools.cached_property
    def native_shape(self) -> Shape:
        """What the kernel is compiled for."""
        return Shape(
            num_features=self._num_inputs,
            dense_units=0,
            num_layers=1,
            hidden_size=self.config.hidden_size,
            output_tanh=False,
            num_directions=NUM_DIRECTIONS,
            num_context=self._num_told,
            clips=self.config.clip > 0,
            rests=self.config.relative_eps > 0,
        )

    @functools.cached_property
    def native_inputs(self) -> Inputs:
        """How the kernel turns gradients into inputs."""
        c = self.config
        return Inputs(
            kind="momenta",
            betas=c.betas,
            square_ratio=c.square_ratio,
            eps=c.eps,
            log_range=c.range,
            growth=c.growth,
            most_grown=c.most_grown,
            leak=c.leak,
            brake=c.brake,
            most_braked=c.most_braked,
        )

    @property
    def native_scale(self) -> float:
        return self.config.output_scale

    def native_rows(
        self, grads: torch.Tensor, state: Tensors, layout: TensorLayout | None
    ) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
        c = self.config
        grads, told, factor, eps = self._heard(grads, self.context_rows(grads, state, layout))
        directions, inputs, after, active = momenta(grads, state, c.betas, c.square_ratio, eps)
        clipped = [factor[None]] if c.clip else []
        return torch.cat([inputs, told, directions, *clipped]), after, active
