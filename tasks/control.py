"""Policy optimization through differentiable dynamics: a pendulum to swing up and a cart-pole to balance.

A task is a machine of its own, with masses and lengths drawn around the usual ones. The loss is the mean cost of a
short run of a small policy network from random starting states, a fresh draw of them at every step; the gradient runs
through the dynamics. `eval_metrics` reports the "test_loss" from starting states that belong to the task and are never
trained on.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar

import torch

from learned_opt.task import TaskFamily, Tensors
from tasks.supervised import apply_mlp, check_network, init_mlp

_TEST_STARTS = 64
_GRAVITY = 9.81


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlFamily(TaskFamily):
    """Mean cost of a policy along runs from random states. Its parameters are those of `tasks.supervised.init_mlp`.

    Attributes:
        num_steps: time steps of a run; at least 1.
        batch_size: starting states per inner step; at least 1.
        spread: masses and lengths are the usual ones times exp(U(−spread, spread)); at least 0.
        hidden: widths of the policy's hidden layers.
        activation: one of `tasks.activations.ACTIVATIONS`.
        init: "normal" or "fan_in"; see `tasks.supervised.init_mlp`.
        init_scale: see init.
    """

    num_features: ClassVar[int]
    num_constants: ClassVar[int]
    num_steps: int = 40
    batch_size: int = 16
    spread: float = 0.3
    hidden: tuple[int, ...] = (16,)
    activation: str = "tanh"
    init: str = "fan_in"
    init_scale: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_network(self.hidden, self.activation, self.init, self.init_scale)
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.spread < math.inf:
            raise ValueError(f"spread must be non-negative and finite; got {self.spread}")

    @abstractmethod
    def starts(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Starting states [*shape, state]."""

    @abstractmethod
    def features(self, state: torch.Tensor) -> torch.Tensor:
        """What the policy sees [runs, num_features] of states [runs, state]."""

    @abstractmethod
    def step(
        self, state: torch.Tensor, action: torch.Tensor, machine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(next states [runs, state], costs [runs]) for actions [runs] and the machine's factors [num_constants]."""

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        factors = ((2 * torch.rand(self.num_constants, generator=generator) - 1) * self.spread).exp()
        return {"machine": factors, "test_starts": self.starts((_TEST_STARTS,), generator)}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return init_mlp([self.num_features, *self.hidden, 1], self.init, self.init_scale, generator)

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        return {"starts": self.starts((num_steps, self.batch_size), generator)}

    def run(self, params: Tensors | None, machine: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Mean cost of runs from states [runs, state]; without parameters, that of doing nothing."""
        total = torch.zeros_like(state[:, 0])
        for _ in range(self.num_steps):
            if params is None:
                action = torch.zeros_like(state[:, 0])
            else:
                action = torch.tanh(apply_mlp(params, self.activation, self.features(state))[:, 0])
            state, cost = self.step(state, action, machine)
            total = total + cost
        return (total / self.num_steps).mean()

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self.run(params, task["machine"], batch["starts"])

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" from the task's held-out starting states, and the "idle_loss" of doing nothing there."""
        return {
            "test_loss": self.run(params, task["machine"], task["test_starts"]),
            "idle_loss": self.run(None, task["machine"], task["test_starts"]),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pendulum(ControlFamily):
    """Swing a pendulum up and hold it there with a bounded torque.

    The state is the angle from upright and its velocity; the mass is 1 kg, the length 1 m, the torque at most 5 Nm,
    times the task's factors of mass and length; steps are of 0.05 s (semi-implicit Euler). A step costs (1 − cos
    angle) + 0.05 velocity² + 0.01 action². Starts are angles U(−π, π) and velocities U(−1, 1). Reference: 0 is the
    infimum; "idle_loss" is that of no torque.
    """

    name: ClassVar[str] = "pendulum"
    num_features: ClassVar[int] = 3
    num_constants: ClassVar[int] = 2

    def starts(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return (2 * torch.rand(*shape, 2, generator=generator) - 1) * torch.tensor([math.pi, 1.0])

    def features(self, state: torch.Tensor) -> torch.Tensor:
        return torch.stack([state[:, 0].cos(), state[:, 0].sin(), state[:, 1] / 4], dim=1)

    def step(
        self, state: torch.Tensor, action: torch.Tensor, machine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mass, length = machine[0], machine[1]
        angle, velocity = state[:, 0], state[:, 1]
        cost = 1 - angle.cos() + 0.05 * velocity.square() + 0.01 * action.square()
        velocity = velocity + 0.05 * (_GRAVITY / length * angle.sin() + 5 * action / (mass * length**2))
        return torch.stack([angle + 0.05 * velocity, velocity], dim=1), cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class CartPole(ControlFamily):
    """Keep a pole upright on a cart that a bounded force pushes (Barto, Sutton and Anderson, 1983).

    The state is position, velocity, angle from upright and angular velocity; the cart is 1 kg, the pole 0.1 kg and 1 m
    long (0.5 m to its centre), the force at most 10 N, times the task's factors of the three; steps are of 0.02 s
    (semi-implicit Euler). A step costs (1 − cos angle) + 0.05 position² + 0.01 angular velocity² + 0.001 action².
    Starts are U(−0.3, 0.3) in all four. Reference: 0 is the infimum; "idle_loss" is that of no force.
    """

    name: ClassVar[str] = "cart_pole"
    num_features: ClassVar[int] = 5
    num_constants: ClassVar[int] = 3

    def starts(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return (2 * torch.rand(*shape, 4, generator=generator) - 1) * 0.3

    def features(self, state: torch.Tensor) -> torch.Tensor:
        position, velocity, angle, spin = state.unbind(1)
        return torch.stack([position, velocity, angle.cos(), angle.sin(), spin], dim=1)

    def step(
        self, state: torch.Tensor, action: torch.Tensor, machine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cart, pole, half = machine[0], 0.1 * machine[1], 0.5 * machine[2]
        position, velocity, angle, spin = state.unbind(1)
        cost = 1 - angle.cos() + 0.05 * position.square() + 0.01 * spin.square() + 0.001 * action.square()
        push = (10 * action + pole * half * spin.square() * angle.sin()) / (cart + pole)
        turn = _GRAVITY * angle.sin() - angle.cos() * push
        turn = turn / (half * (4 / 3 - pole * angle.cos().square() / (cart + pole)))
        velocity = velocity + 0.02 * (push - pole * half * turn * angle.cos() / (cart + pole))
        spin = spin + 0.02 * turn
        return torch.stack([position + 0.02 * velocity, velocity, angle + 0.02 * spin, spin], dim=1), cost
