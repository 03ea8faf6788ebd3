"""The bases that matrices are taken in: against NumPy, eigenvalue decompositions, and one another's routes."""

import copy

import numpy as np
import pytest
import torch
from estimator_reference import MatrixAndVector, theta_of
from optimizer_cases import artifact_of, assert_same, loss_of, model_of, train
from rule_cases import BasesByHand, step_by_hand
from torch import nn

from learned_opt import Artifact, LearnedOptimizer, estimators, parameter_basis, rules
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.rules.basis import Basis, Turn, observe, refresh, turn_of, without_noise
from learned_opt.truncation import HorizonSchedule
from learned_opt.turning import Turner
from learned_opt.unroll import inner_steps, learned_move, unroll

BASIS = Basis(longest=6, decay=0.9, every=2)
VECTORS = pytest.mark.parametrize("settings", [{}, {"basis_vectors": 6}], ids=["matrices", "vectors, too"])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), None),
        ((5,), None),
        ((1, 5), None),
        ((5, 1), None),
        ((0, 3), None),
        ((3, 0), None),
        ((7, 8), None),
        ((3, 4), (3, 4, True, True)),
        ((3, 7), (3, 7, True, False)),
        ((7, 6), (7, 6, False, True)),
        ((4, 2, 3, 1), (4, 6, True, True)),
    ],
)
def test_which_sides_of_a_tensor_are_turned(shape, expected):
    sides = BASIS.sides(shape)
    assert (sides and (sides.rows, sides.columns, sides.left, sides.right)) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), None),
        ((1,), None),
        ((1, 1), None),
        ((0,), None),
        ((0, 3), None),
        ((2,), (2, 1, True, False)),
        ((4,), (4, 1, True, False)),
        ((5,), None),
        ((1, 4), (4, 1, True, False)),
        ((4, 1, 1), (4, 1, True, False)),
        ((5, 1), None),
        ((5, 6), (5, 6, True, True)),
        ((7, 8), None),
    ],
)
def test_which_vectors_are_turned(shape, expected):
    sides = Basis(longest=6, decay=0.9, every=2, vectors=4).sides(shape)
    assert (sides and (sides.rows, sides.columns, sides.left, sides.right)) == expected


def test_vectors_become_the_eigenvectors_of_the_average():
    sides = BASIS.sides((4, 5))
    spread = random(4, 5) * torch.tensor([8.0, 4.0, 2.0, 1.0])[:, None]
    mixing = torch.linalg.qr(random(4, 4, seed=1)).Q
    state = sides.init(dtype=torch.float64, device="cpu")
    state |= observe(BASIS, sides, state, mixing @ spread)
    for step in range(200):
        state |= refresh(sides, state, step == 0)
    for side, gram in (("left", spread @ spread.T), ("right", spread.T @ spread)):
        vectors, average = state[f"{side}.vectors"], state[f"{side}.average"]
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors)).double(), atol=1e-12, rtol=0)
        found = (vectors.T @ average @ vectors) / 0.1  # what the first gradient weighs
        want = np.sort(np.linalg.eigvalsh(gram.numpy()))[::-1]
        np.testing.assert_allclose(found.diagonal(), want, rtol=1e-6, atol=1e-8)
        assert (found - found.diagonal().diag()).abs().max() < 1e-3 * want[0]


def test_a_column_keeps_its_sign_and_its_place():
    sides = BASIS.sides((5, 5))
    state = sides.init(dtype=torch.float64, device="cpu")
    for step in range(60):
        state |= observe(BASIS, sides, state, random(5, 5, seed=step % 3))
        before = turn_of(state)
        state |= refresh(sides, state, step == 0)
        if step > 30:
            overlap = turn_of(state).since(before).left.diagonal()
            assert (overlap > 0.9).all()


def test_turning_there_and_back():
    state = {f"{side}.vectors": torch.linalg.qr(random(3, n, n, seed=n)).Q for side, n in (("left", 4), ("right", 5))}
    turn, matrices = turn_of(state), random(3, 4, 5)
    torch.testing.assert_close(turn.back(turn.into(matrices)), matrices)
    want = np.einsum("pij,pik,pkl->pjl", state["left.vectors"], matrices, state["right.vectors"])
    np.testing.assert_allclose(turn.into(matrices), want)
    other = Turn(torch.linalg.qr(random(3, 4, 4, seed=9)).Q, None)
    one_side = Turn(turn.left, None)
    torch.testing.assert_close(one_side.since(other).into(other.into(matrices)), one_side.into(matrices))
    assert one_side.of(torch.tensor([2, 0])).left.equal(turn.left[[2, 0]])


def test_rounding_is_no_gradient():
    matrix = random(3, 3, dtype=torch.float32)
    matrix[0, 1], matrix[2, 2] = 1e-8, float("nan")
    cleaned = without_noise(torch.stack([matrix, matrix.nan_to_num() * 1e-30]))
    assert cleaned[1, 0, 1] == 0 and cleaned[1, 0, 0] == matrix[0, 0] * 1e-30 and cleaned[0, 2, 2].isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_count_zero_in_averages(bad):
    sides = BASIS.sides((3, 4))
    state = sides.init(2, dtype=torch.float32, device="cpu")
    state |= observe(BASIS, sides, state, random(2, 3, 4, dtype=torch.float32))
    broken = random(2, 3, 4, seed=1, dtype=torch.float32)
    whole = broken.clone()
    broken[1, 2, 2], whole[1, 2, 2] = bad, 0
    found, want = (observe(BASIS, sides, state, matrices) for matrices in (broken, whole))
    for side, square in (("left", whole @ whole.mT), ("right", whole.mT @ whole)):
        name = f"{side}.average"
        assert found[name].equal(want[name])
        torch.testing.assert_close(found[name], 0.9 * state[name] + 0.1 * square)
    copied = {name: value[0].clone() for name, value in state.items()}
    observe(BASIS, sides, copied, broken[0], overwrite=True)
    torch.testing.assert_close(copied["left.average"], found["left.average"][0])


def test_without_any_gradient_the_basis_is_the_coordinates():
    sides = BASIS.sides((3, 4))
    state = sides.init(2, dtype=torch.float64, device="cpu")
    state |= refresh(sides, state, True)
    assert all(v.equal(torch.eye(v.shape[-1]).double().expand_as(v)) for n, v in state.items() if "vectors" in n)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": 1}, "basis must be 0, for none, or the length of a matrix's side, at least 2; got 1"),
        ({"basis": -4}, "basis must be 0, for none, or the length of a matrix's side, at least 2; got -4"),
        ({"basis_decay": 1.0}, r"basis_decay must lie in \[0, 1\); got 1.0"),
        ({"basis_every": 0}, "basis_every must be at least 1; got 0"),
        ({"basis_vectors": 1}, "basis_vectors must be 0, for none, or the length of a vector, at least 2; got 1"),
        ({"basis_vectors": -2}, "basis_vectors must be 0, for none, or the length of a vector, at least 2; got -2"),
        ({"basis_vectors": 9, "basis": 0}, "basis_vectors needs basis; got 9 without; give a basis of at least 2"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        rules.get("turned", **settings)


# Meta-training.


def particles_of(rule, num=4, longest=7):
    batched = BatchedFamily(MatrixAndVector(), dtype=torch.float64)
    plan = EpisodePlan(split="meta_train", run_seed=5, horizons=HorizonSchedule(longest=longest))
    return batched, plan, start_particles(batched, rule, plan, range(num))


@VECTORS
def test_a_run_of_one_particle_by_hand(settings):
    rule = rules.get("turned", **settings)
    theta = theta_of(rule)
    batched, _, particles = particles_of(rule, num=1)
    bases = BasesByHand(rule, batched.shapes)
    flat, grads, state = particles.params[0], particles.grads[0], dict(particles.rule_state)
    for _ in inner_steps(batched, particles, 23, learned_move(rule, theta, particles)):
        update, state = step_by_hand(rule, theta, grads, flat, state, batched.shapes, bases)
        flat = flat + update
        torch.testing.assert_close(particles.params[0], flat, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(particles.rule_state["m"], state["m"], rtol=1e-7, atol=1e-10)
        grads = particles.grads[0]
    vectors = particles.basis["0.left.vectors"][0]
    assert (vectors.abs() < 0.999).all()  # it has turned


@VECTORS
def test_particles_have_bases_of_their_own_that_restart_with_them(settings):
    """Together, with restarts at different steps, or one by one: the same bases and the same losses."""
    rule = rules.get("turned", **settings)
    theta = theta_of(rule)
    batched, plan, together = particles_of(rule)
    segment = unroll(rule, theta, batched, plan, together, 17)
    assert len(set(together.steps)) > 1
    for column in range(4):
        alone = start_particles(batched, rule, plan, [column])
        mine = unroll(rule, theta, batched, plan, alone, 17)
        torch.testing.assert_close(mine.losses[:, 0], segment.losses[:, column], rtol=1e-9, atol=0)
        for name, value in alone.basis.items():
            torch.testing.assert_close(value[0], together.basis[name][column], rtol=1e-7, atol=1e-9)


def test_the_state_of_other_particles_is_not_touched_when_some_are_due():
    rule = rules.get("turned")
    _, _, particles = particles_of(rule)
    particles.steps = [1, 5, 0, 7]
    particles.rule_state["m"].normal_(generator=torch.Generator().manual_seed(0))
    before = particles.rule_state["m"].clone().view(3, 4, -1)
    Turner(rule, particles).begin(particles.grads, overwrite=True)
    after = particles.rule_state["m"].view(3, 4, -1)
    assert after[:, [0, 2, 3]].equal(before[:, [0, 2, 3]]) and not after[:, 1].equal(before[:, 1])
    assert after[:, 1, 6:].equal(before[:, 1, 6:])  # the vector


def test_vectors_are_optimized_as_without_a_basis():
    batched = BatchedFamily(MatrixAndVector(), dtype=torch.float64)
    plan = EpisodePlan(split="meta_train", run_seed=5)
    rule = rules.get("turned", basis=2)  # the matrix has a side of 3 that is left alone
    assert rule.basis.sides((2, 3)).right is False
    model = nn.ParameterList([torch.ones(5), torch.ones(7, 9)])
    finals = []
    for name in ("paced", "turned"):
        params = [nn.Parameter(p.detach().clone()) for p in model]
        weights = Artifact.of(rules.get(name, **({"basis": 6} if name == "turned" else {})), theta32(), name=name)
        optimizer = LearnedOptimizer(params, weights)
        for step in range(8):
            for k, param in enumerate(params):
                param.grad = random(*param.shape, seed=10 * step + k, dtype=torch.float32)
            optimizer.step()
        finals.append(params)
    assert_same(*finals)
    assert len(start_particles(batched, rule, plan, range(2)).basis) == 2


def theta32():
    return rules.get("turned").init_theta(torch.Generator().manual_seed(0))


def work_of(rule, **settings):
    batched, plan, _ = particles_of(rule)
    return estimators.Workload(
        rule=rule, batched=batched, plan=plan, meta_loss=MetaLoss(), truncation=settings.get("truncation", 5)
    )


def test_second_order_is_refused_where_there_are_matrices():
    rule = rules.get("turned")
    with pytest.raises(ValueError, match="order=2 cannot differentiate through the bases that rule 'mixture' takes"):
        estimators.get("backprop", order=2).init(work_of(rule), theta_of(rule), range(2))


def test_imitation_is_refused():
    rule = rules.get("turned")
    with pytest.raises(ValueError, match="imitation compares updates coordinate by coordinate, and rule 'mixture'"):
        estimators.get("imitation").init(work_of(rule), theta_of(rule), range(4))
    rule = rules.get("compact")
    with pytest.raises(ValueError, match="coordinate by coordinate, and teacher 'mixture' .* a teacher without"):
        estimators.get("imitation", teacher="turned").init(work_of(rule), theta_of(rule), range(4))


@pytest.mark.parametrize("settings", [{"recompute": True}, {"chunk_size": 3}], ids=str)
def test_however_it_is_computed_the_first_order_is_one(settings):
    rule = rules.get("turned")
    theta, found = theta_of(rule), []
    for more in ({}, settings):
        estimator, work = estimators.get("backprop", **more), work_of(rule)
        state = estimator.init(work, theta, range(3))
        found.append([estimator.estimate(work, theta, state).grads for _ in range(4)])
    for want, got in zip(*found):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
    assert any(value.abs().max() > 0 for value in found[0][-1].values())


# The optimizer.


def test_packing_is_undone():
    sides = BASIS.sides((3, 5))
    basis = {name: random(*shape, seed=k) for k, (name, shape) in enumerate(sides.shapes.items())}
    num_rows = len(parameter_basis.keys_of(rules.get("turned"), torch.zeros(3, 5)))
    assert num_rows == 5  # 2 · 9 + 2 · 25 = 68 numbers, 15 a row
    rows = parameter_basis.packed(sides, basis, num_rows)
    assert rows.shape == (5, 15) and (rows.flatten()[68:] == 0).all()
    for name, value in parameter_basis.unpacked(sides, rows).items():
        assert value.equal(basis[name])


@VECTORS
def test_what_meta_training_ran_is_what_the_optimizer_runs(settings):
    artifact = artifact_of("turned", **settings)
    theta = {n: v.double() for n, v in artifact.theta.items()}
    batched, _, particles = particles_of(artifact.rule, num=1)
    task = {n: v[0] for n, v in particles.tasks.items()}
    params = {n: nn.Parameter(v[0].clone()) for n, v in batched.unflatten(particles.params).items()}
    optimizer = LearnedOptimizer(params.values(), artifact)
    batches = batched.batches(particles.tasks, particles.seeds, [0], 18)
    for k, _ in enumerate(inner_steps(batched, particles, 17, learned_move(artifact.rule, theta, particles))):
        optimizer.zero_grad()
        batched.family.loss(params, task, {n: v[k][0] for n, v in batches.items()}).backward()
        optimizer.step()
        flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
        torch.testing.assert_close(flat, particles.params[0], rtol=1e-8, atol=1e-10)
    kept = parameter_basis.unpacked(
        artifact.rule.basis.sides((2, 3)),
        torch.stack([v for key, v in optimizer.state[params["matrix"]].items() if key.startswith("basis.")]).flatten(1),
    )
    for name, value in kept.items():
        torch.testing.assert_close(value, particles.basis[f"0.{name}"][0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "num_bytes", "settings"),
    [
        ((10, 10), 48, {}),
        ((64, 20), 64, {}),
        ((7,), 32, {}),
        ((200, 300), 32, {}),
        ((7,), 32 + 7 * 8, {"basis_vectors": 7}),
        ((8,), 32, {"basis_vectors": 7}),
    ],
)
def test_bytes_of_state_a_parameter(shape, num_bytes, settings):
    param = nn.Parameter(torch.ones(shape))
    optimizer = LearnedOptimizer([param], artifact_of("turned", **settings))
    param.grad = torch.ones(shape)
    optimizer.step()
    rows = [v for k, v in optimizer.state[param].items() if k != "step"]
    assert sum(v.numel() * v.element_size() for v in rows) == param.numel() * num_bytes
    assert all(row.shape == param.shape for row in rows)


def test_convolutions_are_matrices():
    """A kernel [4, 2, 3, 1] trains as the matrix [4, 6] of the same numbers does."""
    found = []
    for shape in ((4, 2, 3, 1), (4, 6)):
        param = nn.Parameter(random(24).view(shape).clone())
        optimizer = LearnedOptimizer([param], artifact_of("turned"))
        for step in range(7):
            param.grad = random(24, seed=step).view(shape)
            optimizer.step()
        found.append(param.detach().reshape(-1))
    assert found[0].equal(found[1])


def test_a_vector_is_a_matrix_of_one_column():
    """With its basis a vector [6], a row [1, 6] and a column [6, 1] train alike, and not as they do without."""
    found = {}
    for shape, longest in (((6,), 6), ((1, 6), 6), ((6, 1), 6), ((6,), 0)):
        param = nn.Parameter(random(6).view(shape).clone())
        optimizer = LearnedOptimizer([param], artifact_of("turned", basis_vectors=longest))
        for step in range(7):
            param.grad = random(6, seed=step).view(shape)
            optimizer.step()
        found[shape, longest] = param.detach().reshape(-1)
    with_basis = [found[shape, 6] for shape in ((6,), (1, 6), (6, 1))]
    assert with_basis[0].equal(with_basis[1]) and with_basis[0].equal(with_basis[2])
    assert (with_basis[0] - found[(6,), 0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_is_kept_in_full_precision(dtype):
    model = model_of().to(dtype)
    optimizer = LearnedOptimizer(model.parameters(), artifact_of("turned"), state_dtype=torch.bfloat16)
    train(model, optimizer, 3)
    state = optimizer.state[model[0].weight]
    assert state["basis.0"].dtype == torch.float32 and state["m.0"].dtype == torch.bfloat16


@VECTORS
def test_the_guard_changes_nothing_where_it_has_nothing_to_do(settings):
    models = [model_of() for _ in range(2)]
    for model, guard in zip(models, (False, True)):
        optimizer = LearnedOptimizer(model.parameters(), artifact_of("turned", **settings), guard=guard)
        for step in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step(**({"loss": loss} if guard else {}))
    assert optimizer.watch.num_clipped == 0
    assert_same(models[0].parameters(), models[1].parameters(), exact=False, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_leaves_the_bases_alone():
    model = model_of()
    optimizer = LearnedOptimizer(model.parameters(), artifact_of("turned"), guard=True)
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step(loss=1.0)
    after = optimizer.state_dict()["state"]
    for index, state in before.items():
        assert all(after[index][key].equal(v) for key, v in state.items() if key.startswith(("basis", "m.")))


@VECTORS
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by dynamo, on first use
def test_a_compiled_step_is_the_same_step(settings):
    torch._dynamo.reset()
    models = [model_of(dtype=torch.float64) for _ in range(2)]
    plain, traced = (
        LearnedOptimizer(model.parameters(), artifact_of("turned", **settings), lr=torch.tensor(0.5))
        for model in models
    )
    step = torch.compile(lambda: traced.step(), backend="eager", fullgraph=True)
    train(models[0], plain, 12)
    for k in range(12):
        traced.zero_grad()
        loss_of(models[1], k).backward()
        step()
    assert_same(models[0].parameters(), models[1].parameters(), exact=False, rtol=1e-8, atol=1e-10)
    for mine, want in zip(traced.state.values(), plain.state.values()):
        assert_same(mine.values(), want.values(), exact=False, rtol=1e-7, atol=1e-9)
    torch._dynamo.reset()
