"""Small problems, and ES, PES and NRES written out for one arm and one inner step at a time: nothing batched."""

import copy
import dataclasses
from typing import ClassVar

import torch
from rule_cases import bases_by_hand, loud, step_by_hand

from learned_opt.batched import BatchedFamily
from learned_opt.estimators import Workload
from learned_opt.estimators.antithetic import flatten, perturbations, unflatten
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan
from learned_opt.task import TaskFamily, draw_batches, draw_task
from learned_opt.truncation import HorizonSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyBowl(TaskFamily):
    """A curved, non-quadratic loss with mini-batch noise; `noise=0`, `spread=0`: one deterministic task."""

    name: ClassVar[str] = "noisy_bowl"
    dim: int = 3
    noise: float = 0.1
    spread: float = 1.0

    def sample_task(self, split, generator):
        h = torch.linspace(0.5, 2.0, self.dim)
        return {"h": h * (1 + self.spread * 0.5 * torch.rand(self.dim, generator=generator))}

    def init_params(self, task, generator):
        x = torch.linspace(-1.0, 2.0, self.dim) + self.spread * torch.randn(self.dim, generator=generator)
        return {"x": x}

    def sample_batches(self, task, num_steps, generator):
        return {"shift": torch.randn(num_steps, self.dim, generator=generator) * self.noise} if self.noise else {}

    def loss(self, params, task, batch):
        x = params["x"] + batch["shift"] if self.noise else params["x"]
        return 0.1 + (0.5 * task["h"] * x.square() + 0.1 * x.cos()).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTensors(NoisyBowl):
    """The same bowl with its parameters in two tensors."""

    name: ClassVar[str] = "two_tensors"
    dim: int = 5

    def init_params(self, task, generator):
        x = super().init_params(task, generator)["x"]
        return {"one": x[:2], "other": x[2:]}

    def loss(self, params, task, batch):
        return super().loss({"x": torch.cat([params["one"], params["other"]])}, task, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixAndVector(NoisyBowl):
    """The same bowl with its parameters, mixed, in a matrix and a vector."""

    name: ClassVar[str] = "matrix_and_vector"
    dim: int = 8

    def init_params(self, task, generator):
        x = super().init_params(task, generator)["x"]
        return {"matrix": x[:6].view(2, 3), "vector": x[6:]}

    def loss(self, params, task, batch):
        x = torch.cat([params["matrix"].flatten(), params["vector"]])
        mixed = x + 0.5 * x.roll(1) + 0.3 * x.roll(3)
        return super().loss({"x": mixed}, task, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(TaskFamily):
    """<c, x> with batch noise in c: the inner gradient does not depend on x, so that first order is exact."""

    name: ClassVar[str] = "linear"
    dim: int = 3

    def sample_task(self, split, generator):
        return {"c": torch.randn(self.dim, generator=generator)}

    def init_params(self, task, generator):
        return {"x": torch.randn(self.dim, generator=generator)}

    def sample_batches(self, task, num_steps, generator):
        return {"noise": torch.randn(num_steps, self.dim, generator=generator)}

    def loss(self, params, task, batch):
        return ((task["c"] + batch["noise"]) * params["x"]).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola(TaskFamily):
    """½·h·x² from a fixed x₀."""

    name: ClassVar[str] = "parabola"
    h: float = 0.7
    x0: float = 1.5

    def sample_task(self, split, generator):
        return {"h": torch.tensor(self.h, dtype=torch.float64), "x0": torch.tensor(self.x0, dtype=torch.float64)}

    def init_params(self, task, generator):
        return {"x": task["x0"].reshape(1)}

    def loss(self, params, task, batch):
        return 0.5 * task["h"] * params["x"].square().sum()


def workload(rule, family, *, truncation, horizon=None, run_seed=0, random_offsets=True, frozen=(), **meta_loss):
    horizons = None if horizon is None else HorizonSchedule(longest=horizon, random_offsets=random_offsets)
    return Workload(
        rule=rule,
        batched=BatchedFamily(family, dtype=torch.float64),
        plan=EpisodePlan(split="meta_train", run_seed=run_seed, horizons=horizons),
        meta_loss=MetaLoss(**meta_loss),
        truncation=truncation,
        frozen=frozen,
    )


def theta_of(rule, seed=0):
    """Float64, with the LSTM's read-out enlarged so that its updates matter."""
    generator = torch.Generator().manual_seed(seed)
    theta = {n: v.double() for n, v in rule.init_theta(generator).items()}
    return loud({n: v * 10 if n == "output.weight" else v for n, v in theta.items()}, generator)


class Arm:
    """One task run by one optimizer, step by step."""

    def __init__(self, work, particle, episode=0):
        self.work, self.particle = work, particle
        self.start(episode)

    def start(self, episode):
        self.episode, self.step = episode, 0
        self.seed, self.horizon = self.work.plan.draw(self.particle, episode)
        family = self.work.batched.family
        task, params = draw_task(family, self.work.plan.split, self.seed)
        self.task, self.params = ({n: v.double() for n, v in d.items()} for d in (task, params))
        size = sum(v.numel() for v in self.params.values())
        self.state = self.work.rule.init_state(size, dtype=torch.float64)
        self.bases = bases_by_hand(self.work.rule, [tuple(v.shape) for v in self.params.values()])
        self.initial, self.grad = self.evaluate()

    def evaluate(self):
        family = self.work.batched.family
        batch = {n: v[0].double() for n, v in draw_batches(family, self.task, self.seed, self.step, 1).items()}
        leaves = {n: v.detach().requires_grad_() for n, v in self.params.items()}
        loss = family.loss(leaves, self.task, batch)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return loss.detach(), torch.cat([g.reshape(-1) for g in grads])

    def advance(self, theta):
        """One inner step; returns the normalized loss after it, and restarts at the horizon."""
        flat = torch.cat([v.reshape(-1) for v in self.params.values()])
        shapes = [tuple(v.shape) for v in self.params.values()]
        update, self.state = step_by_hand(self.work.rule, theta, self.grad, flat, self.state, shapes, self.bases)
        at = 0
        for name, value in self.params.items():
            self.params[name] = value + update[at : at + value.numel()].view_as(value)
            at += value.numel()
        self.step += 1
        loss, self.grad = self.evaluate()
        value = self.work.meta_loss.normalize(loss, self.initial)
        if self.step == self.horizon:
            self.start(self.episode + 1)
        return value


def reference_estimates(kind, work, theta, particles, sigma, num_truncations):
    """The meta-gradients of `num_truncations` truncations, flat, by the definitions of ES, PES and NRES."""
    pairs = [dict(plus=Arm(work, p), minus=Arm(work, p), seen=[], key=(p, 0)) for p in particles]
    flat, out = flatten(theta), []
    for counter in range(num_truncations):
        total = torch.zeros_like(flat)
        for pair in pairs:

            def noise(name):
                return perturbations(theta, sigma, work.plan.run_seed, [pair["key"]], [name])[0]

            base = pair["plus"]
            if kind == "es":
                pair["plus"], pair["minus"] = copy.copy(base), copy.copy(base)
                for arm in (pair["plus"], pair["minus"]):
                    arm.params, arm.bases = dict(arm.params), copy.deepcopy(arm.bases)
            new = True
            for k in range(work.truncation):
                episode = pair["plus"].episode
                assert episode == pair["minus"].episode
                if kind == "nres":
                    epsilon = noise(episode)
                    direction = epsilon
                else:
                    epsilon = noise(counter)
                    if new and kind == "pes":
                        pair["seen"].append(epsilon)
                        new = False
                    direction = epsilon if kind == "es" else sum(pair["seen"])
                plus = pair["plus"].advance(unflatten(flat + epsilon, theta))
                minus = pair["minus"].advance(unflatten(flat - epsilon, theta))
                weight = float(k == work.truncation - 1) if work.meta_loss.average == "final" else 1 / work.truncation
                total += (plus - minus) * weight * direction
                if pair["plus"].episode != episode:
                    pair["seen"], new = [], True
            if kind == "es":
                for _ in range(work.truncation):
                    base.advance(theta)
                pair["plus"] = base
        out.append(total / (2 * sigma**2 * len(pairs)))
    return out
