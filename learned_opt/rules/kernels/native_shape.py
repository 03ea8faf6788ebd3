"""What the compiled LSTM kernel is built for, and what turns gradients into its inputs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernel is compiled for: sizes of the network, and what becomes of its output.

    Attributes:
        num_features, dense_units, num_layers, hidden_size: of the network; no dense layer with 0 units.
        output_tanh: whether the outputs pass through tanh.
        num_directions: 0 where the one output is the update; else how many directions the update is mixed from.
        num_context: how many of the features are of the whole parameter tensor. With any, one more output changes
            "log_size", the logarithm of what a mixed step is multiplied by.
        clips: whether there is one more row of context, which multiplies the gradient and brakes; it comes last among
            the network's inputs and directions, too.
        rests: whether there is another, which is added to what divides the gradient; it comes last of the context.
    """

    num_features: int
    dense_units: int
    num_layers: int
    hidden_size: int
    output_tanh: bool
    num_directions: int = 0
    num_context: int = 0
    clips: bool = False
    rests: bool = False

    def defines(self) -> list[str]:
        """The compiler's arguments."""
        values = {
            "FEATURES": self.num_features,
            "DENSE": self.dense_units,
            "LAYERS": self.num_layers,
            "HIDDEN": self.hidden_size,
            "OUTPUT_TANH": int(self.output_tanh),
            "DIRECTIONS": self.num_directions,
            "CONTEXT": self.num_context,
            "CLIPS": int(self.clips),
            "RESTS": int(self.rests),
        }
        return [f"-D{name}={value}" for name, value in values.items()]

    @property
    def num_weights(self) -> int:
        """The numbers in the LSTM layers, each as wide as the widest."""
        widest = max(self.dense_units or self.num_features, self.hidden_size)
        return self.num_layers * 4 * self.hidden_size * (widest + self.hidden_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What turns gradients into the network's inputs; see `learned_opt.rules.features`.

    Attributes:
        kind: "normalized", "log_and_sign", "momenta", or "given": the inputs themselves (and directions, below them)
            are passed instead of gradients.
        betas: decays of the averages: one with "normalized", five with "momenta".
        square_ratio: of "momenta".
        eps: of "normalized" and "momenta".
        log_range: of "log_and_sign"; with directions, bound of the logarithm of a step.
        growth: the most that "log_size" changes by in a step.
        most_grown: its upper bound.
        leak: the share of it that a step forgets where there is no signal.
        brake: the power of what a gradient is clipped by that it shrinks by.
        most_braked: bound of what it shrinks to for that.
    """

    kind: str
    betas: tuple[float, ...] = ()
    square_ratio: float = 1.0
    eps: float = 0.0
    log_range: float = 1.0
    growth: float = 0.0
    most_grown: float = 12.0
    leak: float = 0.0
    brake: float = 0.0
    most_braked: float = 12.0

    @property
    def numbers(self) -> tuple[float, ...]:
        """What the kernel is passed beside the decays."""
        sizes = self.growth, self.most_grown, self.leak, self.brake, self.most_braked
        return self.square_ratio, self.eps, self.log_range, *sizes
