"""Meta-training written for JAX, as fast as we could make it: the contender to beat.

`lax.scan` over inner steps, `vmap` over the particles of a group, `lax.map` over groups, one compiled program for the
whole outer step, particles spread over host devices. Coordinates are last, and the rule runs in chunks of them that
stay in a core's cache. Where gradients are constants, the unroll runs without derivative, and a reversed scan then
differentiates the rule alone, computing its gates again. It has kept each step's states, or else their inputs alone,
and the states are computed again chunk by chunk: each has workloads where it is faster, and `variants` lists what is
tried. The exact gradient is autodiff through the scan, each step checkpointed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from benchmarks.meta_training.jax_rule import make_rule
from benchmarks.meta_training.jax_tasks import Arrays, jax_task
from benchmarks.meta_training.workloads import SpeedWorkload


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the work is cut.

    Attributes:
        group: particles (or arms) that run together.
        chunk: coordinates that the rule takes at a time.
        replay: whether the unroll keeps gradients alone, and states are computed again; first order only.
    """

    group: int
    chunk: int
    replay: bool = False


def variants(workload: SpeedWorkload, num_devices: int) -> list[Variant]:
    """The cuts worth trying on this workload."""
    if workload.name == "w2":
        each = workload.num_particles // num_devices
        return [Variant(each, each * 10), Variant(each // 4, each * 10 // 4)]
    if workload.name == "w4":
        return [Variant(1, 2048), Variant(1, 512, True)]
    cuts = [Variant(1, 1510), Variant(1, 504)]
    return cuts if workload.pairs or workload.exact else [*cuts, Variant(1, 1510, True)]


class JaxMetaTraining:
    """One meta-training run.

    Args:
        workload: what to train.
        theta: initial meta-parameters, numpy arrays by name.
        num_devices: host devices to spread particles over; they must be there.
        variant: how to cut the work.
        seed: of tasks, batches and perturbations.
    """

    def __init__(
        self, workload: SpeedWorkload, theta: dict[str, np.ndarray], num_devices: int, variant: Variant, seed: int = 0
    ) -> None:
        self.workload, self.variant = workload, variant
        self.task = jax_task(workload.family)
        self.features, self.network = make_rule(workload.rule.config)
        self.trainer = workload.settings.trainer
        num_runs = workload.num_particles * (2 if workload.pairs else 1)
        if num_runs % (variant.group * num_devices) or (workload.pairs and variant.group != 1):
            raise ValueError(
                f"groups of {variant.group} do not divide {num_runs} particles over {num_devices} devices; "
                "choose another group"
            )
        self.num_groups = num_runs // variant.group
        self.mesh = Mesh(np.array(jax.devices()[:num_devices]), ("devices",))
        self.sharded, self.shared = NamedSharding(self.mesh, Spec("devices")), NamedSharding(self.mesh, Spec())
        self.key = jax.random.key(seed)
        self.theta = jax.device_put({n: jnp.asarray(v) for n, v in theta.items()}, self.shared)
        self.moments = jax.device_put(adam_start(self.theta), self.shared)
        self.start = jax.jit(self._start, out_shardings=self.sharded)
        self.outer = jax.jit(self._outer, donate_argnums=2)
        self.outer_step = 0

    def step(self) -> int:
        """One outer step; returns the inner steps x particles that it took."""
        self.key, key, fresh = jax.random.split(self.key, 3)
        if self.outer_step % self.workload.episode == 0:
            self.particles = self.start(fresh)
        self.theta, self.moments, self.particles = self.outer(self.theta, self.moments, self.particles, key)
        jax.block_until_ready(self.theta)
        self.outer_step += 1
        return self.workload.truncation * self.workload.num_particles

    def _rows(self, key: Any, *lead: int) -> Any:
        task = self.task
        shape = (*lead, max(task.batch_size, 1))
        return jax.random.randint(key, shape, task.first_row, task.first_row + task.num_rows)

    def _start(self, key: Any) -> Arrays:
        groups, size = self.num_groups, self.variant.group
        tasks, rows = jax.random.split(key)
        keys = jax.random.split(tasks, groups * size)
        if self.workload.pairs:  # both arms of a pair, one after the other, share their task
            keys = jnp.repeat(keys[: groups // 2], 2, axis=0)
        constants, params = jax.vmap(self.task.start)(keys)
        flat = jax.vmap(self.task.flatten)(params)
        fresh = self.fresh(flat, constants, self._rows(rows, groups * size))
        if self.workload.pairs:
            seen = {n: jnp.zeros((groups // 2, *v.shape)) for n, v in self.theta.items()}
            return {"runs": fresh, "seen": seen}
        return {"runs": fresh}

    def fresh(self, params: Any, constants: Arrays, rows: Any) -> Arrays:
        """Particles at their start, in groups: params [runs, D], rows [runs, batch]."""
        losses, grads = self._evaluate(params, constants, rows)
        grouped = {"params": params, "grads": grads, "initial": losses, "constants": constants}
        runs = jax.tree.map(lambda x: x.reshape(self.num_groups, self.variant.group, *x.shape[1:]), grouped)
        config, num_chunks = self.workload.rule.config, self.num_chunks
        lead = (self.num_groups, num_chunks)
        for name in ("m", "v"):
            runs[name] = jnp.zeros((*lead, self.variant.chunk))
        for name in ("hidden", "cell"):
            shape = (*lead, config.hidden_size, self.variant.chunk)
            runs[name] = tuple(jnp.zeros(shape) for _ in range(config.num_layers))
        runs["step"] = jnp.zeros(self.num_groups)
        return runs

    def _evaluate(self, params: Any, constants: Arrays, rows: Any) -> tuple[Any, Any]:
        """Losses and gradients of several tasks: together, or one by one where they run one by one anyway.

        Convolutions whose kernels differ are much slower together, if JAX can do them at all.
        """
        if self.variant.group > 1:
            return jax.vmap(self.task.loss_and_grad)(params, constants, rows)
        one = lambda part: self.task.loss_and_grad(*part)  # noqa: E731
        if len(params) > 1:
            return lax.map(one, (params, constants, rows))
        return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], (params, constants, rows))))

    @property
    def num_chunks(self) -> int:
        """Chunks that a group's coordinates fill, the last one padded."""
        return -(-self.variant.group * self.task.num_parameters // self.variant.chunk)

    def _cut(self, rows: Any) -> Any:
        """[..., group, D] as [..., chunks, chunk], padded with zeros."""
        flat = rows.reshape(*rows.shape[:-2], -1)
        space = self.num_chunks * self.variant.chunk - flat.shape[-1]
        flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, space)])
        return flat.reshape(*flat.shape[:-1], self.num_chunks, self.variant.chunk)

    def _inner_step(self, theta: Arrays, run: Arrays, rows: Any) -> tuple[Arrays, Any, Any]:
        """(the run one step on, losses [group], what the backward pass needs of the rule's step)."""
        step = run["step"] + 1

        def one(_: None, part: Any) -> tuple[None, Any]:
            grads, m, v, hidden, cell = part
            x, m, v, active = self.features(grads, m, v, step)
            update, hidden, cell = self.network(theta, x, hidden, cell)
            return None, ((m, v, hidden, cell), x, active, jnp.where(active, update, 0.0))

        parts = (self._cut(run["grads"]), run["m"], run["v"], run["hidden"], run["cell"])
        _, ((m, v, hidden, cell), x, active, update) = _scan(one, None, parts)
        params = run["params"]
        params = params + update.reshape(-1)[: params.size].reshape(params.shape)
        losses, grads = self._evaluate(params, run["constants"], rows)
        after = {"params": params, "grads": grads, "m": m, "v": v, "hidden": hidden, "cell": cell, "step": step}
        return {**run, **after}, losses, (x, active, run["hidden"], run["cell"])

    def _meta_loss(self, losses: Any, initial: Any) -> Any:
        meta = self.trainer.meta_loss
        count = self.workload.truncation * self.workload.num_particles
        return jnp.log(jnp.clip(losses / initial, meta.floor, meta.clip)).sum() / count

    def first_order(self, theta: Arrays, run: Arrays, rows: Any) -> tuple[Arrays, Arrays]:
        """(a group's share of the meta-gradient, the group one truncation on), gradients being constants."""
        replay = self.variant.replay

        def forward(run: Arrays, rows: Any) -> tuple[Arrays, Any]:
            before = run["grads"]
            run, losses, kept = self._inner_step(theta, run, rows)
            return run, (losses, before, run["grads"], None if replay else kept)

        after, (losses, inputs, grads, kept) = lax.scan(forward, run, rows)
        weights = jax.grad(self._meta_loss)(losses, run["initial"])
        # The derivative with respect to an update collects every later loss.
        cotangents = lax.cumsum(self._cut(grads * weights[..., None]), 0, reverse=True)
        back = self._back_by_replay(theta, run, inputs) if replay else self._back_over_kept(theta, run, kept)
        return back(cotangents), after

    def _pull(self, theta: Arrays, total: Arrays, part: Any) -> tuple[Arrays, Any]:
        """One step of one chunk backwards: adds to the total, returns the cotangents of the states before it."""
        x, active, cotangent, hidden, cell, d_hidden, d_cell = part
        _, pull = jax.vjp(lambda t, h, c: self.network(t, x, h, c), theta, hidden, cell)
        d_theta, d_hidden, d_cell = pull((jnp.where(active, cotangent, 0.0), d_hidden, d_cell))
        return jax.tree.map(jnp.add, total, d_theta), (d_hidden, d_cell)

    def _back_over_kept(self, theta: Arrays, run: Arrays, kept: Any) -> Callable[[Any], Arrays]:
        """The backward pass over kept states, step by step and in each step chunk by chunk."""
        x, active, hidden, cell = kept

        def back(cotangents: Any) -> Arrays:
            def step(carry: Any, kept: Any) -> tuple[Any, None]:
                total, d_hidden, d_cell = carry
                parts = (*kept, d_hidden, d_cell)
                total, (d_hidden, d_cell) = _scan(lambda t, part: self._pull(theta, t, part), total, parts)
                return (total, d_hidden, d_cell), None

            none = jax.tree.map(jnp.zeros_like, (theta, run["hidden"], run["cell"]))
            (total, _, _), _ = lax.scan(step, none, (x, active, cotangents, hidden, cell), reverse=True)
            return total

        return back

    def _back_by_replay(self, theta: Arrays, run: Arrays, inputs: Any) -> Callable[[Any], Arrays]:
        """The backward pass chunk by chunk, and in each chunk all steps forward once more, then backward."""

        def chunk(total: Arrays, part: Any) -> tuple[Arrays, None]:
            grads, cotangents, m, v, hidden, cell = part

            def forward(carry: Any, grads: Any) -> tuple[Any, Any]:
                m, v, step, before = carry
                x, m, v, active = self.features(grads, m, v, step + 1)
                _, hidden, cell = self.network(theta, x, *before)
                return (m, v, step + 1, (hidden, cell)), (x, active, *before)

            _, (x, active, *states) = lax.scan(forward, (m, v, run["step"], (hidden, cell)), grads)

            def backward(carry: Any, kept: Any) -> tuple[Any, None]:
                total, later = carry
                return self._pull(theta, total, (*kept, *later)), None

            none = jax.tree.map(jnp.zeros_like, (hidden, cell))
            (total, _), _ = lax.scan(backward, (total, none), (x, active, cotangents, *states), reverse=True)
            return total, None

        def back(cotangents: Any) -> Arrays:
            by_chunk = [jnp.swapaxes(x, 0, 1) for x in (self._cut(inputs), cotangents)]
            parts = (*by_chunk, run["m"], run["v"], run["hidden"], run["cell"])
            return _scan(chunk, jax.tree.map(jnp.zeros_like, theta), parts)[0]

        return back

    def exact(self, theta: Arrays, run: Arrays, rows: Any) -> tuple[Arrays, Arrays]:
        """The same through the inner gradients."""

        def unrolled(theta: Arrays) -> tuple[Any, Arrays]:
            @jax.checkpoint
            def forward(run: Arrays, rows: Any) -> tuple[Arrays, Any]:
                run, losses, _ = self._inner_step(theta, run, rows)
                return run, losses

            after, losses = lax.scan(forward, run, rows)
            return self._meta_loss(losses, run["initial"]), after

        return jax.grad(unrolled, has_aux=True)(theta)

    def persistent_es(self, theta: Arrays, particles: Arrays, noise: Arrays, rows: Any) -> tuple[Arrays, Arrays]:
        """(these pairs' share of the PES meta-gradient, the pairs one truncation on).

        Args:
            theta: meta-parameters.
            particles: "runs" of both arms of each pair, one after the other, and the perturbations "seen" so far.
            noise: [pairs, …] by name.
            rows: [arms, steps, 1, batch], the same for both arms.
        """
        seen = jax.tree.map(jnp.add, particles["seen"], noise)
        num = next(iter(noise.values())).shape[0]
        signs = jnp.tile(jnp.array([1.0, -1.0]), num)
        arms = {n: theta[n] + jnp.repeat(v, 2, 0) * _lift(signs, v) for n, v in noise.items()}

        def arm(inputs: Any) -> tuple[Any, Arrays]:
            perturbed, run, rows = inputs

            def forward(run: Arrays, rows: Any) -> tuple[Arrays, Any]:
                run, losses, _ = self._inner_step(perturbed, run, rows)
                return run, losses

            after, losses = lax.scan(forward, run, rows)
            return self._meta_loss(losses, run["initial"]), after

        values, after = lax.map(arm, (arms, particles["runs"], rows))
        sigma = self.workload.settings.estimator_settings["sigma"]
        difference = (values[::2] - values[1::2]) / (2 * sigma**2)
        grads = {n: (v * _lift(difference, v)).sum(0) for n, v in seen.items()}
        return grads, {"runs": after, "seen": seen}

    def _outer(self, theta: Arrays, moments: Arrays, particles: Arrays, key: Any) -> tuple[Arrays, Arrays, Arrays]:
        keys = jax.random.split(key, self.num_groups)
        steps, group = self.workload.truncation, self.variant.group

        def local(theta: Arrays, particles: Arrays, keys: Any) -> tuple[Arrays, Arrays]:
            if self.workload.pairs:
                keys = keys[::2]
                rows = jnp.repeat(jax.vmap(lambda k: self._rows(k, steps, 1))(keys), 2, axis=0)
                noise = jax.vmap(self._noise)(keys)
                grads, after = self.persistent_es(theta, particles, noise, rows)
            else:
                estimate = self.exact if self.workload.exact else self.first_order
                rows = jax.vmap(lambda k: self._rows(k, steps, group))(keys)
                grads, runs = lax.map(lambda part: estimate(theta, *part), (particles["runs"], rows))
                grads, after = jax.tree.map(lambda x: x.sum(0), grads), {"runs": runs}
            return jax.tree.map(lambda x: lax.psum(x, "devices"), grads), after

        both = (Spec(), Spec("devices"))
        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=(*both, Spec("devices")), out_specs=both, check_vma=False
        )
        grads, particles = mapped(theta, particles, keys)
        theta, moments = adam(theta, moments, grads, self.trainer.learning_rate, self.trainer.clip_norm)
        return theta, moments, particles

    def _noise(self, key: Any) -> Arrays:
        sigma, keys = self.workload.settings.estimator_settings["sigma"], jax.random.split(key, len(self.theta))
        return {n: sigma * jax.random.normal(k, v.shape) for k, (n, v) in zip(keys, self.theta.items())}


def _scan(function: Any, carry: Any, parts: Any) -> tuple[Any, Any]:
    """`lax.scan`, without the loop where there is one part alone."""
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return lax.scan(function, carry, parts)
    carry, out = function(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], out)


def _lift(values: Any, like: Any) -> Any:
    """[n] with trailing dimensions as those of `like` [pairs, …]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def adam_start(theta: Arrays) -> Arrays:
    """The state of `adam` before its first step."""
    return {**{name: jax.tree.map(jnp.zeros_like, theta) for name in ("m", "v")}, "step": jnp.zeros(())}


def adam(theta: Arrays, moments: Arrays, grads: Arrays, rate: float, clip_norm: float) -> tuple[Arrays, Arrays]:
    """One step of Adam on gradients clipped by their global norm."""
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in grads.values()))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / (norm + 1e-6)), grads)
    step = moments["step"] + 1
    m = jax.tree.map(lambda old, g: 0.9 * old + 0.1 * g, moments["m"], grads)
    v = jax.tree.map(lambda old, g: 0.999 * old + 0.001 * g * g, moments["v"], grads)
    scale1, scale2 = 1 / (1 - 0.9**step), 1 / (1 - 0.999**step)
    theta = jax.tree.map(lambda p, a, b: p - rate * a * scale1 / (jnp.sqrt(b * scale2) + 1e-8), theta, m, v)
    return theta, {"m": m, "v": v, "step": step}
