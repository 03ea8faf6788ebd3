"""The inner loop: cut anywhere it gives the same bits, and a particle that breaks down touches no other."""

import copy
import dataclasses
import io
import math
from typing import ClassVar

import pytest
import torch
from rule_cases import agreement_by_hand, loud, update_by_hand

from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan, Particles, restart, start_particles
from learned_opt.task import TaskFamily, draw_task
from learned_opt.truncation import HorizonSchedule
from learned_opt.unroll import unroll
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

LISTS = ("ids", "seeds", "episodes", "steps", "horizons")
TENSORS = ("params", "grads", "losses", "initial")
FAMILIES = {"quadratic": Quadratic(dim=4), "digits": ImageMLP(hidden=(3,), batch_size=8)}


def theta_of(rule, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(generator)
    # A louder read-out, so that the LSTM moves as far as its output scale allows.
    return loud({n: v.to(dtype) * (10 if n == "output.weight" else 1) for n, v in theta.items()}, generator)


def plan_of(longest=7, split="meta_train", **settings):
    horizons = HorizonSchedule(longest=longest, **settings) if longest else None
    return EpisodePlan(split=split, run_seed=3, horizons=horizons)


def assert_same_bits(a: Particles, b: Particles, columns=None):
    columns = list(range(len(a))) if columns is None else columns
    for name in LISTS:
        assert [getattr(a, name)[c] for c in columns] == [getattr(b, name)[c] for c in columns]
    for name in TENSORS:
        assert torch.equal(getattr(a, name)[columns], getattr(b, name)[columns])
    assert a.tasks.keys() == b.tasks.keys() and a.rule_state.keys() == b.rule_state.keys()
    for name, value in a.tasks.items():
        assert torch.equal(value[columns], b.tasks[name][columns])
    for name, value in a.rule_state.items():
        rows, others = (v.unflatten(-1, (len(a), -1))[..., columns, :] for v in (value, b.rule_state[name]))
        assert torch.equal(rows, others)


RECORDED = [("quadratic", "nothing"), ("quadratic", "stages"), ("digits", "gradients")]


@pytest.mark.parametrize("rule_name", list(rules.RULES))
@pytest.mark.parametrize(("family_name", "record"), RECORDED)
def test_k_steps_and_k_more_equal_2k(family_name, rule_name, record):
    rule, plan = rules.get(rule_name), plan_of()
    theta = theta_of(rule, torch.float32)
    whole, cut = BatchedFamily(FAMILIES[family_name]), BatchedFamily(FAMILIES[family_name])
    a, b = start_particles(whole, rule, plan, range(3)), start_particles(cut, rule, plan, range(3))
    for _ in range(2):  # ten steps at horizon 7: resets in the middle, and by the second round a traced program
        long = unroll(rule, theta, whole, plan, a, 10, record=record)
        short = [unroll(rule, theta, cut, plan, b, 5, record="nothing") for _ in range(2)]
        assert torch.equal(long.losses, torch.cat([s.losses for s in short]))
        assert torch.equal(long.initial, torch.cat([s.initial for s in short]))
        assert_same_bits(a, b)
    assert min(a.episodes) >= 2
    assert torch.isfinite(long.losses).all() and long.valid.all()


def test_gradient_descent_in_closed_form_with_resets():
    rule = rules.get("sgd", lr=0.01)
    theta = theta_of(rule)
    lr = float(theta["log_lr"].exp())
    plan = plan_of(longest=4)
    batched = BatchedFamily(Quadratic(dim=3), dtype=torch.float64)
    particles = start_particles(batched, rule, plan, [5, 2])
    segment = unroll(rule, theta, batched, plan, particles, 11, record="gradients")
    for column, particle in enumerate([5, 2]):
        episode, step = 0, 0
        for t in range(11):
            seed, horizon = plan.draw(particle, episode)
            task, params = draw_task(Quadratic(dim=3), "meta_train", seed)
            w, y, x0 = task["w"].double(), task["y"].double(), params["theta"].double()
            # x_t = x* + (I − 2·lr·WᵀW)^t (x₀ − x*)
            best = torch.linalg.solve(w, y)
            power = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 2 * lr * w.T @ w, step)
            before = best + power @ (x0 - best)
            step += 1
            power = torch.linalg.matrix_power(torch.eye(3, dtype=torch.float64) - 2 * lr * w.T @ w, step)
            after = best + power @ (x0 - best)

            def close(got, want):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

            close(segment.losses[t, column], (w @ after - y).square().sum())
            close(segment.initial[t, column], (w @ x0 - y).square().sum())
            close(segment.inputs[t, column], 2 * w.T @ (w @ before - y))
            close(segment.outputs[t, column], 2 * w.T @ (w @ after - y))
            if step == horizon:
                episode, step = episode + 1, 0
        assert (particles.episodes[column], particles.steps[column]) == (episode, step)
        assert (particles.seeds[column], particles.horizons[column]) == plan.draw(particle, episode)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.usefixtures("kernels")
def test_a_rule_is_told_of_each_particle_s_own_tensors(chunk_size, dtype, tolerance):
    """Against one particle and one tensor at a time, with particles that restart inside the segment."""
    rule, plan, num_steps = rules.get("paced"), plan_of(), 10
    theta = theta_of(rule, dtype)
    batched = BatchedFamily(FAMILIES["digits"], dtype=dtype)
    particles = start_particles(batched, rule, plan, range(3))
    before = copy.deepcopy(particles.state_dict())
    segment = unroll(rule, theta, batched, plan, particles, num_steps, record="gradients", chunk_size=chunk_size)
    assert batched.sizes == (192, 3, 30, 10) and segment.contexts.shape == (num_steps, 4, 3, 4)
    assert particles.layout.index(torch.device("cpu")).bincount().tolist() == list(batched.sizes * 3)
    starts = {(run.start, c): run.params[k] for run in segment.runs for k, c in enumerate(run.columns.tolist())}
    assert len(starts) > 3
    exact = {n: v.double() for n, v in theta.items()}
    for column in range(3):
        state = rule.init_state(batched.num_parameters, dtype=torch.float64)
        params, horizon, step = before["params"][column].double(), before["horizons"][column], 0
        for t in range(num_steps):
            if t and (t, column) in starts:
                assert step == horizon
                state = rule.init_state(batched.num_parameters, dtype=torch.float64)
                params, horizon, step = starts[t, column].double(), particles.horizons[column], 0
            grads, start = segment.inputs[t, column].double(), 0
            for tensor, size in enumerate(batched.sizes):
                part = {n: v[..., start : start + size] for n, v in state.items()}
                want = agreement_by_hand(rule, grads[start : start + size], part)
                close = dict(rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(segment.contexts[t, :, column, tensor].double(), want, **close)
                assert step == 0 or want.abs().min() > 0
                start += size
            update, state = update_by_hand(rule, exact, grads, params, state, batched.sizes)
            params, step = params + update, step + 1
        scale = float(params.abs().max())
        torch.testing.assert_close(particles.params[column].double(), params, rtol=tolerance, atol=tolerance * scale)


def test_contexts_are_kept_where_a_replay_needs_them():
    plan, batched = plan_of(), BatchedFamily(FAMILIES["quadratic"])
    for name, record, kept in (("paced", "gradients", True), ("paced", "stages", False), ("adam", "gradients", False)):
        rule = rules.get(name)
        particles = start_particles(batched, rule, plan, range(2))
        segment = unroll(rule, theta_of(rule, torch.float32), batched, plan, particles, 3, record=record)
        assert (segment.contexts is not None) == kept


def test_runs_tile_the_segment():
    rule, plan = rules.get("adam"), plan_of(longest=4)
    batched = BatchedFamily(Quadratic(dim=3))
    particles = start_particles(batched, rule, plan, range(5))
    segment = unroll(rule, theta_of(rule, torch.float32), batched, plan, particles, 9, record="gradients")
    covered = torch.zeros(9, 5, dtype=torch.int64)
    for run in segment.runs:
        columns = range(5) if run.columns is None else run.columns.tolist()
        assert run.params.shape == (len(columns), 3)
        assert run.rule_state["m"].shape == (len(columns) * 3,)
        for column in columns:
            covered[run.start : run.stop, column] += 1
            if run.start:
                assert run.rule_state["step"].count_nonzero() == 0  # every later run is a fresh start
    assert (covered == 1).all()


def test_never_resets_without_a_schedule():
    rule, plan = rules.get("adam"), plan_of(longest=0)
    batched = BatchedFamily(Quadratic(dim=3))
    particles = start_particles(batched, rule, plan, range(2))
    unroll(rule, theta_of(rule, torch.float32), batched, plan, particles, 40)
    assert particles.episodes == [0, 0] and particles.steps == [40, 40] and particles.horizons == [-1, -1]


@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_per_particle_theta_equals_each_particle_with_its_own(rule_name):
    rule, plan = rules.get(rule_name), plan_of(longest=4)
    thetas = [theta_of(rule, seed=s) for s in range(3)]
    thetas = [{n: v + 0.1 * s for n, v in theta.items()} for s, theta in enumerate(thetas)]
    batched = BatchedFamily(Quadratic(dim=4), dtype=torch.float64)
    particles = start_particles(batched, rule, plan, range(3))
    stacked = {n: torch.stack([theta[n] for theta in thetas]) for n in thetas[0]}
    together = unroll(rule, stacked, batched, plan, particles, 9, per_particle=True)
    for i, theta in enumerate(thetas):
        alone = start_particles(batched, rule, plan, [i])
        segment = unroll(rule, theta, batched, plan, alone, 9)
        torch.testing.assert_close(together.losses[:, i : i + 1], segment.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(particles.params[i], alone.params[0], rtol=1e-10, atol=1e-12)
        for name, value in alone.rule_state.items():
            got = particles.rule_state[name].unflatten(-1, (3, 4))[..., i, :]
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_chunk_size_does_not_change_the_numbers(rule_name):
    rule, plan = rules.get(rule_name), plan_of()
    theta = theta_of(rule)
    batched = BatchedFamily(FAMILIES["digits"], dtype=torch.float64)
    segments, ends = [], []
    for chunk_size in (10**6, 64, 7):
        particles = start_particles(batched, rule, plan, range(2))
        segments.append(unroll(rule, theta, batched, plan, particles, 9, chunk_size=chunk_size))
        ends.append(particles)
    for segment, particles in zip(segments[1:], ends[1:]):
        torch.testing.assert_close(segment.losses, segments[0].losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(particles.params, ends[0].params, rtol=1e-12, atol=1e-12)
        for name, value in particles.rule_state.items():
            torch.testing.assert_close(value, ends[0].rule_state[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule_name", list(rules.RULES))
@pytest.mark.parametrize("family_name", list(FAMILIES))
def test_saved_particles_continue_with_the_same_bits(family_name, rule_name):
    rule, plan = rules.get(rule_name), plan_of()
    theta = theta_of(rule, torch.float32)
    batched = BatchedFamily(FAMILIES[family_name])
    particles = start_particles(batched, rule, plan, range(3))
    unroll(rule, theta, batched, plan, particles, 12)
    buffer = io.BytesIO()
    torch.save(particles.state_dict(), buffer)
    want = unroll(rule, theta, batched, plan, particles, 12)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    kept = copy.deepcopy(state)
    for _ in range(2):  # the second time from the same state: the first must not have changed it
        fresh = BatchedFamily(copy.deepcopy(FAMILIES[family_name]))  # of which nothing is traced yet
        loaded = Particles.from_state_dict(state, fresh, "meta_train")
        got = unroll(rule, theta, fresh, plan, loaded, 12)
        assert torch.equal(got.losses, want.losses) and torch.equal(got.initial, want.initial)
        assert_same_bits(loaded, particles)
    assert state["episodes"] == kept["episodes"] and torch.equal(state["params"], kept["params"])


def test_a_snapshot_stays_as_it_was_taken():
    rule, plan = rules.get("adam"), plan_of()
    batched = BatchedFamily(Quadratic(dim=3))
    particles = start_particles(batched, rule, plan, range(3))
    state = particles.state_dict()
    kept = copy.deepcopy(state)
    unroll(rule, theta_of(rule, torch.float32), batched, plan, particles, 12)
    for name, value in kept.items():
        if name == "rule_state":
            assert all(torch.equal(state[name][n], v) for n, v in value.items())
        else:
            assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trapped(TaskFamily):
    """|x − c|², but in some tasks not a number outside of a ball around the start; no setting changes the draws.

    Attributes:
        trap: radius of the ball; 0 makes those tasks NaN at once, infinity makes them like the others.
        share: of the tasks that have it.
    """

    name: ClassVar[str] = "trapped"
    trap: float = math.inf
    share: float = 0.5
    scale: float = 1.0

    def sample_task(self, split, generator):
        center = torch.randn(3, generator=generator)
        start = torch.randn(3, generator=generator)
        trapped = torch.rand((), generator=generator) < self.share
        radius = torch.tensor(self.trap) if trapped else torch.tensor(math.inf)
        return {"center": center, "start": start, "radius": radius}

    def init_params(self, task, generator):
        return {"x": task["start"].clone()}

    def loss(self, params, task, batch):
        x = params["x"]
        outside = (x - task["start"]).square().sum() >= task["radius"] ** 2
        return self.scale * (x - task["center"]).square().sum() * torch.where(outside, math.nan, 1.0)


def is_trapped(seed, share=0.5):
    return draw_task(Trapped(trap=1.0, share=share), "meta_train", seed)[0]["radius"] == 1.0


@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_broken_particles_are_restarted_and_touch_no_other(rule_name):
    rule, plan = rules.get(rule_name), plan_of(longest=20, random_offsets=False)
    theta = theta_of(rule, torch.float32)
    ids = list(range(6))
    with_trap, without = BatchedFamily(Trapped(trap=1e-4)), BatchedFamily(Trapped())
    a, b = start_particles(with_trap, rule, plan, ids), start_particles(without, rule, plan, ids)
    bad = [i for i in ids if is_trapped(a.seeds[i])]
    good = [i for i in ids if i not in bad]
    assert bad and good
    for truncation in range(2):
        got = unroll(rule, theta, with_trap, plan, a, 5, record="gradients")
        want = unroll(rule, theta, without, plan, b, 5, record="gradients")
        assert torch.equal(got.losses[:, good], want.losses[:, good])
        assert torch.equal(got.inputs[:, good], want.inputs[:, good])
        assert torch.equal(got.outputs[:, good], want.outputs[:, good])
        assert_same_bits(a, b, good)
        if not truncation:
            assert got.valid.tolist() == [i in good for i in ids]
            assert got.losses[:, bad].isnan().any(0).all()
            # They are at the start of their next episode, whole again.
            assert [a.episodes[i] for i in bad] == [1] * len(bad) and [a.steps[i] for i in bad] == [0] * len(bad)
            assert [a.seeds[i] for i in bad] == [plan.draw(i, 1)[0] for i in bad]
            assert torch.isfinite(a.params).all() and torch.isfinite(a.grads).all() and torch.isfinite(a.losses).all()
            assert all(torch.isfinite(v).all() for v in a.rule_state.values())
            assert all((v.unflatten(-1, (6, 3))[..., bad, :] == 0).all() for v in a.rule_state.values())
    assert want.valid.all()


@pytest.mark.parametrize("settings", [{"order": 1}, {"order": 2}, {"order": 2, "recompute": True}], ids=str)
@pytest.mark.parametrize("rule_name", list(rules.RULES))
def test_meta_gradient_is_that_of_the_sound_particles_alone(rule_name, settings):
    rule, plan = rules.get(rule_name), plan_of(longest=20, random_offsets=False)
    theta = theta_of(rule)
    ids = list(range(6))
    good = [i for i in ids if not is_trapped(plan.draw(i, 0)[0])]

    def estimate(family, ids):
        batched = BatchedFamily(family, dtype=torch.float64)
        work = estimators.Workload(rule=rule, batched=batched, plan=plan, meta_loss=MetaLoss(), truncation=5)
        estimator = estimators.get("backprop", **settings)
        return estimator.estimate(work, theta, estimator.init(work, theta, ids))

    got, want = estimate(Trapped(trap=1e-4), ids), estimate(Trapped(), good)
    assert got.num_invalid == len(ids) - len(good) > 0 and want.num_invalid == 0
    assert got.meta_loss == pytest.approx(want.meta_loss, rel=1e-13)
    for name, value in want.grads.items():
        torch.testing.assert_close(got.grads[name], value, rtol=1e-8, atol=1e-12 * float(value.abs().max()))
    assert any(value.abs().max() > 0 for value in want.grads.values())


def test_everyone_broken_gives_a_zero_meta_gradient():
    rule, plan = rules.get("compact"), plan_of(longest=20, random_offsets=False)
    batched = BatchedFamily(Trapped(trap=1e-4, share=1.0), dtype=torch.float64)
    work = estimators.Workload(rule=rule, batched=batched, plan=plan, meta_loss=MetaLoss(), truncation=5)
    estimator = estimators.get("backprop")
    theta = theta_of(rule)
    got = estimator.estimate(work, theta, estimator.init(work, theta, range(3)))
    assert got.num_invalid == 3 and got.meta_loss == 0
    assert all((value == 0).all() for value in got.grads.values())


def test_broken_particles_may_be_left_alone():
    rule, plan = rules.get("adam"), plan_of(longest=0)
    batched = BatchedFamily(Trapped(trap=1e-4))
    particles = start_particles(batched, rule, plan, range(6))
    segment = unroll(rule, theta_of(rule, torch.float32), batched, plan, particles, 5, restart_invalid=False)
    assert not segment.valid.all() and particles.episodes == [0] * 6 and particles.steps == [5] * 6
    assert (particles.losses.isnan() == ~segment.valid).all()


def test_tasks_that_are_not_finite_at_the_start_are_passed_over():
    rule, plan = rules.get("adam"), plan_of(longest=8)
    batched = BatchedFamily(Trapped(trap=0.0))
    particles = start_particles(batched, rule, plan, range(8))
    for i in range(8):
        episodes = [e for e in range(20) if not is_trapped(plan.draw(i, e)[0])]
        assert particles.episodes[i] == episodes[0]
        assert (particles.seeds[i], particles.horizons[i]) == plan.draw(i, episodes[0])
    assert max(particles.episodes) > 0 and torch.isfinite(particles.grads).all()
    # So are they when a particle restarts.
    restart(batched, rule, plan, particles, [1, 6])
    for i in (1, 6):
        episodes = [e for e in range(40) if not is_trapped(plan.draw(i, e)[0])]
        assert particles.episodes[i] == episodes[1]
    assert torch.isfinite(particles.losses).all()


def test_only_broken_tasks_are_an_error():
    batched = BatchedFamily(Trapped(trap=0.0, share=1.0))
    text = (
        "trapped: the loss or its gradient is not finite at the initial parameters in 10 draws of a task in a row; "
        "check the family's loss, data and init_params"
    )
    with pytest.raises(ValueError, match=text):
        start_particles(batched, rules.get("adam"), plan_of(), range(2))


def test_a_gradient_whose_square_overflows_is_not_finite():
    """Averages of squares would never come back from infinity: 1e20 is finite in float32, 1e40 is not."""
    plan = plan_of(longest=0)
    with pytest.raises(ValueError, match="not finite at the initial parameters"):
        start_particles(BatchedFamily(Trapped(scale=1e20)), rules.get("adam"), plan, range(2))
    large = BatchedFamily(Trapped(scale=1e17))
    particles = start_particles(large, rules.get("adam"), plan, range(2))
    rule = rules.get("adam")
    segment = unroll(rule, theta_of(rule, torch.float32), large, plan, particles, 30)
    assert segment.valid.all() and all(torch.isfinite(v).all() for v in particles.rule_state.values())


def test_num_steps_must_be_positive():
    rule, plan = rules.get("adam"), plan_of()
    batched = BatchedFamily(Quadratic(dim=3))
    particles = start_particles(batched, rule, plan, [0])
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        unroll(rule, theta_of(rule, torch.float32), batched, plan, particles, 0)


def test_without_a_rule_there_is_no_state():
    particles = start_particles(BatchedFamily(Quadratic(dim=3)), None, plan_of(), [0, 4])
    assert particles.rule_state == {} and len(particles) == 2 and particles.ids == [0, 4]
