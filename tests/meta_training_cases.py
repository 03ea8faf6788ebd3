"""One truncation of tiny versions of the speed workloads, in float64: ours, and JAX in a process of its own.

python meta_training_cases.py     prints, as JSON, the relative difference of each case's meta-gradient to ours
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.meta_training.workloads import SpeedWorkload
from learned_opt import estimators
from learned_opt.estimators.antithetic import perturbations, unflatten
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.particles import first
from learned_opt.task import Tensors

TRUNCATION = 3
CASES = {"w1": 2, "w2": 3, "w3": 4, "w4": 1, "w5": 2}
"""Preset -> particles."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What every implementation starts from, and our meta-gradient.

    For PES, there are two arms a pair, and all plus arms come first."""

    workload: SpeedWorkload
    theta: Tensors
    params: torch.Tensor
    constants: Tensors
    first_batch: Tensors
    batches: Tensors
    noise: Tensors
    grads: Tensors


def case(name: str) -> Case:
    """One truncation from fresh tasks, with a theta that moves parameters by amounts that matter."""
    workload = SpeedWorkload.of(name, truncation=TRUNCATION, num_particles=CASES[name])
    if name == "w4":  # the same layers, narrower
        families = {"digits": {**workload.settings.families["digits"], "channels": (3, 4, 5), "activation": "relu"}}
        workload = SpeedWorkload(name, dataclasses.replace(workload.settings, families=families))
    settings, rule = workload.settings, workload.rule
    generator = torch.Generator().manual_seed(0)
    theta = {n: 3 * v.double() for n, v in rule.init_theta(generator).items()}
    trainer = MetaTrainer(
        rule,
        {"family": workload.family},
        settings.trainer,
        estimators.get(settings.estimator, **settings.estimator_settings),
        theta=theta,
        dtype=torch.float64,
    )
    work, state = trainer.work["family"], trainer.estimator_states["family"]
    particles = state.particles if workload.pairs else state
    params, seeds, num = particles.params.clone(), particles.seeds, len(particles)
    first_batch = first(work.batched.batches(particles.tasks, seeds, [0] * num, 1))
    batches = work.batched.batches(particles.tasks, seeds, [1] * num, TRUNCATION)
    noise: Tensors = {}
    if workload.pairs:
        sigma = settings.estimator_settings["sigma"]
        drawn = perturbations(theta, sigma, settings.trainer.seed, state.pairs, [0] * len(state.pairs))
        noise = unflatten(drawn, theta)
    grads = trainer.estimator.estimate(work, theta, state).grads
    return Case(workload, theta, params, particles.tasks, first_batch, batches, noise, grads)


def difference(found: dict[str, Any], wanted: Tensors) -> float:
    """The largest difference relative to the tensor's largest entry."""
    return max(float((torch.as_tensor(found[n]) - v).abs().max() / v.abs().max()) for n, v in wanted.items())


def jax_differences() -> dict[str, float]:
    """Every case and way of cutting it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from benchmarks.meta_training.jax_scan import JaxMetaTraining, Variant

    jax.config.update("jax_enable_x64", True)
    out = {}
    cuts = {
        "w1": [Variant(1, 1000), Variant(2, 1000, True)],
        "w2": [Variant(3, 20)],
        "w3": [Variant(1, 1000)],
        "w4": [Variant(1, 300, True)],
        "w5": [Variant(1, 1000)],
    }
    for name, ways in cuts.items():
        given = case(name)
        num, pairs = len(given.params), given.workload.pairs
        # JAX has the two arms of a pair side by side.
        order = np.arange(num).reshape(2, -1).T.ravel() if pairs else np.arange(num)
        params = jnp.asarray(given.params.numpy()[order])
        constants = {n: jnp.asarray(v.numpy()[order]) for n, v in given.constants.items()}
        no_rows = torch.zeros(num, 1, dtype=torch.int64)
        start = jnp.asarray(given.first_batch.get("rows", no_rows).numpy()[order])
        rows = given.batches.get("rows", no_rows.expand(TRUNCATION, num, 1)).transpose(0, 1).numpy()[order]
        for way in ways:
            training = JaxMetaTraining(given.workload, {n: v.numpy() for n, v in given.theta.items()}, 1, way)
            runs = jax.jit(training.fresh)(params, constants, start)
            grouped = jnp.asarray(rows.reshape(-1, way.group, *rows.shape[1:]).swapaxes(1, 2))
            theta = training.theta
            if pairs:
                noise = {n: jnp.asarray(v.numpy()) for n, v in given.noise.items()}
                seen = {n: jnp.zeros_like(v) for n, v in noise.items()}
                grads, _ = jax.jit(training.persistent_es)(theta, {"runs": runs, "seen": seen}, noise, grouped)
            else:
                estimate = training.exact if given.workload.exact else training.first_order

                def all_groups(theta: Any, runs: Any, grouped: Any, estimate: Any = estimate) -> Any:
                    return lax.map(lambda part: estimate(theta, *part)[0], (runs, grouped))

                by_group = jax.jit(all_groups)(theta, runs, grouped)
                grads = {n: v.sum(0) for n, v in by_group.items()}
            out[f"{name}, {way}"] = difference({n: np.array(v) for n, v in grads.items()}, given.grads)
        if name not in ("w1", "w3"):
            continue
        before = {n: np.array(v) for n, v in training.theta.items()}
        count = training.step()  # as it is timed: over devices, with its own tasks and batches
        assert count == TRUNCATION * given.workload.num_particles
        assert all(np.isfinite(v).all() and (np.array(v) != before[n]).any() for n, v in training.theta.items())
    return out


def jax_adam_difference() -> float:
    """Five steps of the benchmark's Adam, clipped, against torch's."""
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.meta_training.jax_scan import adam, adam_start

    random = np.random.default_rng(0)
    start = {"a": random.normal(size=(3, 2)), "b": random.normal(size=4)}
    leaves = {n: torch.tensor(v, requires_grad=True) for n, v in start.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.1)
    theta = {n: jnp.asarray(v) for n, v in start.items()}
    moments = adam_start(theta)
    for i in range(5):
        grads = {n: random.normal(size=v.shape) * 0.3 * i for n, v in start.items()}
        theta, moments = adam(theta, moments, {n: jnp.asarray(g) for n, g in grads.items()}, 0.1, 1.0)
        for n, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[n])
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
    return difference({n: np.array(v) for n, v in theta.items()}, {n: v.detach() for n, v in leaves.items()})


if __name__ == "__main__":
    found = jax_differences()
    print(json.dumps({**found, "adam": jax_adam_difference()}))
