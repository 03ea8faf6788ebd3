"""What an update rule has learned, asked of the rule itself.

A rule is fed gradients of our choosing and its updates are read off, beside those of `torch.optim.Adam` and `RMSprop`
at learning rate 1 and otherwise their defaults, fed the same. No task is involved, except where gradients are recorded
along a real run. Whatever the rule keeps in its state, and whatever its size, the questions are the same:

* *Update map*: the update as a function of the newest gradient and of momentum. Before it, the rule sees a history of
  gradients with root mean square 1 and mean μ, namely μ ± √(1 − μ²) with random signs; the map is the mean over
  histories. μ is what momentum-keeping rules measure, but needs none of their state to define.
* *Responses*: the updates to a constant gradient, to one that changes its sign, to a spike, and to pure noise.
* *Scale response*: the update after a constant gradient of every size. A rule that normalizes its inputs gives a flat
  line; gradient descent a slope of one.
* *Effective learning rate*: at every step, the root mean square over coordinates of the update, divided by that of
  Adam's direction m̂/(√v̂ + ε). Adam's own is its learning rate at every step.
* *Memory*: rank correlations (Spearman) of every cell of an LSTM, or of every other number that a rule keeps, with what
  it might keep track of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from learned_opt.batched import BatchedFamily
from learned_opt.evaluation.memory import Memory, memory
from learned_opt.evaluation.metrics import Array
from learned_opt.evaluation.replay import REFERENCES, as_double, effective_rate, reference_updates, replay, run_steps
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.rules.base import UpdateRule
from learned_opt.task import TaskFamily, Tensors
from learned_opt.turning import Turns
from learned_opt.unroll import inner_steps, learned_move

_WARM_UP = 60
_SIGNAL_STEPS, EVENT = 100, 50
_SPIKE = 30.0


@dataclasses.dataclass(frozen=True)
class UpdateMap:
    """Updates over momentum and gradient, both in units of the gradients' root mean square.

    Attributes:
        momenta: [M], in [−1, 1]; gradients: [G].
        updates: "rule" and the names of `REFERENCES`, each [M, G].
    """

    momenta: Array
    gradients: Array
    updates: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Response:
    """Updates to one made-up signal.

    Attributes:
        gradients: [steps], the signal.
        updates: "rule" and the names of `REFERENCES`, each [steps].
    """

    gradients: Array
    updates: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Some coordinates of a run on a real task, in float64, in the basis of the rule where it has one.

    Attributes:
        gradients, updates: [steps, n].
        losses: [steps + 1], the mean over the tasks.
        context: [steps, num_context, n], what the rule was told of each coordinate's tensor; None if it takes none.
    """

    gradients: Array
    updates: Array
    losses: Array
    context: Array | None = None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """All answers for one rule.

    Attributes:
        update_map: see `update_map`.
        responses: signal -> response.
        scales, scale_updates: [S], gradient sizes and the size of the update after a constant gradient of each.
        effective_rates: stream -> [steps]; "synthetic", and every family that was given.
        memory: over all streams.
    """

    update_map: UpdateMap
    responses: dict[str, Response]
    scales: Array
    scale_updates: Array
    effective_rates: dict[str, Array]
    memory: Memory

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None."""

        def plain(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return plain(value.tolist())
            if isinstance(value, Mapping):
                return {name: plain(item) for name, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        out = plain(dataclasses.asdict(self))
        assert isinstance(out, dict)
        return out


def explain(
    rule: UpdateRule,
    theta: Tensors,
    families: Mapping[str, TaskFamily] | None = None,
    *,
    horizon: int = 200,
    scale: float = 1.0,
) -> Explanation:
    """Ask everything of one rule.

    Args:
        rule: the update rule.
        theta: its meta-parameters.
        families: label -> family to record real runs on; none by default.
        horizon: steps of synthetic and real runs, at least 2.
        scale: root mean square of the made-up gradients, positive; for rules that do not normalize theirs.

    Raises:
        ValueError: an argument out of range.
    """
    if horizon < 2:
        raise ValueError(f"horizon must be at least 2; got {horizon}")
    streams = {"synthetic": synthetic_gradients(horizon) * scale}
    replays = {"synthetic": replay(rule, theta, streams["synthetic"])}
    for label, family in (families or {}).items():
        found = trace(rule, theta, family, horizon)
        streams[label], replays[label] = found.gradients, replay(rule, theta, found.gradients, found.context)
    scales, sizes = scale_response(rule, theta)
    return Explanation(
        update_map=update_map(rule, theta, scale=scale),
        responses=responses(rule, theta, scale=scale),
        scales=scales,
        scale_updates=sizes,
        effective_rates={label: effective_rate(replays[label].updates, streams[label]) for label in streams},
        memory=memory(list(streams.values()), list(replays.values())),
    )


def _check_scale(scale: float) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite; got {scale}")


@torch.no_grad()
def update_map(
    rule: UpdateRule,
    theta: Tensors,
    *,
    num_momenta: int = 25,
    num_gradients: int = 33,
    widest: float = 4.0,
    num_histories: int = 32,
    scale: float = 1.0,
    seed: int = 0,
) -> UpdateMap:
    """The update over momentum μ in [−1, 1] and the newest gradient in [−widest, widest]; see the module.

    Args:
        rule, theta: the optimizer.
        num_momenta, num_gradients: resolution, odd numbers have zero in the middle.
        widest: largest gradient, in units of `scale`.
        num_histories: how many sign sequences to average over, even: each comes with its opposite.
        scale: root mean square of the history.
        seed: of the signs.
    """
    _check_scale(scale)
    random = np.random.default_rng(seed)
    half = random.choice([-1.0, 1.0], size=(_WARM_UP, max(1, num_histories // 2)))
    signs = np.concatenate([half, -half], axis=1)
    momenta, gradients = np.linspace(-1, 1, num_momenta), np.linspace(-widest, widest, num_gradients)
    # [steps, histories, momenta], one coordinate each.
    noise = np.sqrt(1 - momenta**2)
    history = scale * (momenta + signs[:, :, None] * noise)
    flat = torch.as_tensor(history.reshape(_WARM_UP, -1))
    theta = as_double(theta)
    _, states = run_steps(rule, theta, flat, rule.init_state(flat.shape[1], dtype=torch.float64))
    # Every history then goes on with each of the gradients: its state is copied rather than computed again.
    state = {n: v if v.shape[-1] == 1 else v.repeat_interleave(num_gradients, dim=-1) for n, v in states[-1].items()}
    newest = torch.as_tensor(scale * np.tile(gradients, flat.shape[1]))
    updates, _ = run_steps(rule, theta, newest[None], state)
    shape = (signs.shape[1], num_momenta, num_gradients)
    found = {"rule": updates[0].numpy().reshape(shape).mean(0)}
    full = np.concatenate([flat.numpy().repeat(num_gradients, axis=1), newest.numpy()[None]])
    found |= {name: reference_updates(name, full)[-1].reshape(shape).mean(0) for name in REFERENCES}
    return UpdateMap(momenta, gradients, found)


def signals(scale: float = 1.0, seed: int = 0) -> dict[str, Array]:
    """The made-up signals, each [100]; what happens, happens at step 50.

    Args:
        scale: of all of them, positive.
        seed: of the noise.
    """
    steps = np.arange(_SIGNAL_STEPS)
    noise = np.random.default_rng(seed).normal(size=_SIGNAL_STEPS)
    found = {
        "constant gradient": np.ones(_SIGNAL_STEPS),
        "sign flip": np.where(steps < EVENT, 1.0, -1.0),
        f"spike, {_SPIKE:g} times": np.where(steps == EVENT, _SPIKE, 1.0),
        "noise alone": noise / np.sqrt((noise**2).mean()),
    }
    return {name: scale * signal for name, signal in found.items()}


def responses(rule: UpdateRule, theta: Tensors, *, scale: float = 1.0) -> dict[str, Response]:
    """The updates to each of `signals`, and those of the references."""
    _check_scale(scale)
    named = signals(scale)
    grads = np.stack(list(named.values()), axis=1)
    updates = {"rule": replay(rule, theta, grads).updates}
    updates |= {name: reference_updates(name, grads) for name in REFERENCES}
    return {
        name: Response(grads[:, k], {who: found[:, k] for who, found in updates.items()})
        for k, name in enumerate(named)
    }


def scale_response(rule: UpdateRule, theta: Tensors, *, num_steps: int = 50) -> tuple[Array, Array]:
    """Gradient sizes from 1e-8 to 1e4, and the size of the update after `num_steps` constant gradients of each."""
    scales = np.logspace(-8, 4, 49)
    updates = replay(rule, theta, np.tile(scales, (num_steps, 1))).updates
    return scales, np.abs(updates[-1])


def synthetic_gradients(num_steps: int, num_coordinates: int = 256, seed: int = 0) -> Array:
    """Gradients [steps, n] as training has them: a signal that fades, under noise, at very different scales.

    Coordinate i has scale·(±exp(−t/τ) + σ·noise), with scale and time constant τ log-uniform in [1e-4, 1] and
    [10, num_steps], and σ uniform in [0, 1].
    """
    random = np.random.default_rng(seed)
    n = num_coordinates
    scale = 10 ** random.uniform(-4, 0, n) * random.choice([-1.0, 1.0], n)
    fade = np.exp(random.uniform(math.log(10), math.log(max(num_steps, 11)), n))
    noise = random.uniform(0, 1, n) * random.normal(size=(num_steps, n))
    return scale * (np.exp(-np.arange(num_steps)[:, None] / fade) + noise)


@torch.no_grad()
def trace(
    rule: UpdateRule,
    theta: Tensors,
    family: TaskFamily,
    horizon: int,
    *,
    num_tasks: int = 2,
    num_coordinates: int = 512,
    seed: int = 0,
) -> Trace:
    """Record gradients and updates of some coordinates while the rule optimizes meta-validation tasks of a family.

    A rule with a basis is recorded in it. What it remembers of a matrix's gradients turns when the basis changes, so
    that a replay of single coordinates is then no longer exact.

    Args:
        rule, theta: the optimizer.
        family: the family.
        horizon: inner steps, at least 1.
        num_tasks: how many tasks.
        num_coordinates: at most so many coordinates, drawn from all tasks' parameters.
        seed: of the tasks and of the choice.
    """
    batched = BatchedFamily(family, dtype=torch.float64)
    particles = start_particles(batched, rule, EpisodePlan(split="meta_validation", run_seed=seed), range(num_tasks))
    total = particles.params.numel()
    chosen = torch.as_tensor(np.random.default_rng(seed).permutation(total)[:num_coordinates])
    contexts: list[torch.Tensor] = []
    turns: list[Turns] = []
    move = learned_move(rule, as_double(theta), particles, contexts=contexts, turns=turns)
    seen, moved, losses = [], [], [particles.losses]
    grads, params = particles.grads, particles.params
    for loss, _, _ in inner_steps(batched, particles, horizon, move):
        update = particles.params - params
        if turns:
            grads, update = turns[-1].gradients(grads), turns[-1].into(update)
            turns.clear()
        seen.append(grads.reshape(-1)[chosen])
        moved.append(update.reshape(-1)[chosen])
        losses.append(loss)
        grads, params = particles.grads, particles.params  # what the next step sees, which may be an older gradient
    told = torch.stack(contexts)[..., particles.layout.index(batched.device)[chosen]].numpy() if contexts else None
    return Trace(torch.stack(seen).numpy(), torch.stack(moved).numpy(), torch.stack(losses).mean(1).numpy(), told)
