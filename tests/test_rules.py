"""One contract for every update rule, and each rule against what it claims to be.

Rules that are told of whole parameter tensors are told something made up here, and of their own tensors where that is
what a test is about.
"""

import math

import numpy as np
import pytest
import torch
from rule_cases import agreement_by_hand, in_dtype, loud, told, update_by_hand

from learned_opt import rules
from learned_opt.rules import UpdateRule, chunked_update, lstm_tape, slice_coordinates
from learned_opt.rules.context import Context, TensorLayout, context, joined
from learned_opt.rules.features import (
    agreement,
    agreement_terms,
    bounded_square,
    clip_factor,
    clip_terms,
    largest_root,
    largest_terms,
    log_and_sign,
    momenta,
    normalized,
)

RULES = list(rules.RULES)
VARIANTS = {name: (name, {}) for name in RULES} | {
    "three_layers": ("lstm", {"num_layers": 3, "hidden_size": 2}),
    "dense_log": ("lstm", {"inputs": "log_and_sign", "dense_units": 3, "output_tanh": False}),
    "no_momentum": ("lstm", {"beta": 0.0, "output_scale": 2.0}),
    "growing": ("mixture", {"growth": 0.1}),
    "resting": ("mixture", {"growth": 0.1, "relative_eps": 0.3}),
    "told_of_signal": ("mixture", {"growth": 0.1, "signal": True}),
    "hushed": ("mixture", {"growth": 0.1, "signal": True, "loudness": 0.5}),
    "leaking": ("mixture", {"growth": 0.1, "signal": True, "leak": 0.3}),
    "hushed_and_leaking": ("mixture", {"growth": 0.1, "leak": 0.2, "signal": True, "loudness": 0.5}),
    "clipping": ("mixture", {"growth": 0.1, "clip": 1.5}),
    "braking": ("mixture", {"growth": 0.1, "clip": 1.5, "brake": 0.5}),
    "all_of_them": (
        "mixture",
        {"growth": 0.1, "leak": 0.2, "signal": True, "loudness": 0.5, "clip": 1.5, "brake": 0.3, "most_braked": 0.1}
        | {"relative_eps": 0.2},
    ),
    "grows_fast": ("mixture", {"growth": 2.0, "hidden_size": 3, "square": 0.9}),
}
N, STEPS = 11, 6


def make(variant):
    name, settings = VARIANTS[variant]
    return rules.get(name, **settings)


def theta_of(rule, dtype=torch.float64, seed=0):
    """Theta away from its special initial values: zero biases and a quiet read-out hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    theta = {n: v.to(dtype) for n, v in rule.init_theta(generator).items()}
    noise = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(dtype) for n, v in theta.items()}
    return {n: v + 0.1 * noise[n] for n, v in theta.items()}


def grads_of(num_steps=STEPS, n=N, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 2, n, dtype=torch.float64)
    return (torch.randn(num_steps, n, generator=generator, dtype=torch.float64) * scale).to(dtype)


def context_of(rule, grads):
    """What `backward` takes beside gradients [steps, n]: made-up context of every step, or nothing."""
    return in_dtype(told(rule, grads.shape[1], len(grads)), grads.dtype)


def rows_of(rule, grads):
    """The same for `update`, step by step: [steps, num_context, n] of one argument, or of none."""
    context = context_of(rule, grads)
    return [()] * len(grads) if context is None else [(rows,) for rows in context.rows(grads.shape[1])]


def run(rule, theta, grads, state=None, params=None, rows=None):
    """(updates [steps, n], final state)."""
    n = grads.shape[1]
    state = rule.init_state(n, dtype=grads.dtype) if state is None else state
    params = torch.linspace(-1, 1, n, dtype=grads.dtype) if params is None else params
    updates = []
    for grad, more in zip(grads, rows_of(rule, grads) if rows is None else rows):
        update, state = rule.update(theta, grad, params, state, *more)
        params = params + update
        updates.append(update)
    return torch.stack(updates), state


@pytest.fixture(params=list(VARIANTS))
def rule(request):
    return make(request.param)


def test_pure(rule):
    theta, grads, params = theta_of(rule), grads_of(), torch.randn(N, dtype=torch.float64)
    _, state = run(rule, theta, grads)
    inputs = [*theta.values(), grads, params, *state.values()]
    copies = [x.clone() for x in inputs]
    rows = rows_of(rule, grads)
    inputs += rows[0]
    copies += [x.clone() for x in rows[0]]
    update, new_state = rule.update(theta, grads[0], params, state, *rows[0])
    again, again_state = rule.update(theta, grads[0], params, state, *rows[0])
    rule.backward(theta, grads, params, state, grads.flip(0), context_of(rule, grads))
    assert all(torch.equal(x, y) for x, y in zip(inputs, copies))
    assert torch.equal(update, again)
    assert all(torch.equal(v, again_state[n]) for n, v in new_state.items())
    storages = {x.untyped_storage().data_ptr() for x in inputs}
    assert update.untyped_storage().data_ptr() not in storages
    assert not any(v.untyped_storage().data_ptr() in storages for v in new_state.values())


def test_coordinatewise(rule):
    theta, grads = theta_of(rule), grads_of()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    params = torch.linspace(-1, 1, N, dtype=torch.float64)
    rows = rows_of(rule, grads)
    updates, state = run(rule, theta, grads, params=params)
    shuffled, shuffled_state = run(
        rule, theta, grads[:, order], params=params[order], rows=[tuple(x[:, order] for x in more) for more in rows]
    )
    torch.testing.assert_close(shuffled, updates[:, order], rtol=1e-12, atol=1e-14)
    for name, value in state.items():
        torch.testing.assert_close(shuffled_state[name], value[..., order], rtol=1e-12, atol=1e-14)
    # What happens elsewhere does not reach a coordinate.
    others = grads.clone()
    others[:, 3:] = 7.0
    alone, _ = run(rule, theta, others, params=params, rows=[tuple(x * (torch.arange(N) < 3) for x in r) for r in rows])
    torch.testing.assert_close(alone[:, :3], updates[:, :3], rtol=1e-12, atol=1e-14)
    assert updates.abs().min() > 0


@pytest.mark.parametrize("chunk_size", [1, 4, N])
def test_chunks_give_the_same_numbers(rule, chunk_size):
    theta, grads, params = theta_of(rule), grads_of(), torch.zeros(N, dtype=torch.float64)
    _, state = run(rule, theta, grads)
    say = in_dtype(told(rule, N), torch.float64)
    want, want_state = rule.update(theta, grads[0], params, state, *(() if say is None else (say.rows(N),)))
    got, got_state = chunked_update(rule, theta, grads[0], params, state, chunk_size=chunk_size, context=say)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert got_state.keys() == want_state.keys()
    for name, value in want_state.items():
        torch.testing.assert_close(got_state[name], value, rtol=1e-12, atol=1e-14)


def test_a_shared_step_count_gives_the_same_numbers(rule):
    theta, grads, params = theta_of(rule), grads_of(), torch.zeros(N, dtype=torch.float64)
    _, state = run(rule, theta, grads)
    if "step" not in state:
        pytest.skip("this rule does not count steps")
    shared = {**state, "step": state["step"][:1]}
    want, want_state = rule.update(theta, grads[0], params, state)
    for chunk_size in (4, N):
        got, got_state = chunked_update(rule, theta, grads[0], params, shared, chunk_size=chunk_size)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert got_state["step"].tolist() == [STEPS + 1]
        torch.testing.assert_close(got_state["m"], want_state["m"], rtol=1e-12, atol=0)


def test_coordinates_without_gradient_never_move(rule):
    theta, grads = theta_of(rule), grads_of()
    grads[:, [0, 4]] = 0.0
    updates, state = run(rule, theta, grads)
    assert (updates[:, [0, 4]] == 0).all() and updates[:, [1, 2, 3]].abs().min() > 0
    # They are as good as new: the first gradient moves them as the first gradient moves anything.
    assert all(torch.isfinite(v).all() for v in state.values())
    nothing, state = run(rule, theta, torch.zeros(STEPS, N, dtype=torch.float64))
    assert (nothing == 0).all() and all((v == 0).all() for n, v in state.items() if n == "log_size")
    # The meta-gradient of what never moves is zero, and finite: the root of zero has an infinite slope.
    back = rule.backward(
        theta,
        torch.zeros(3, N, dtype=torch.float64),
        torch.zeros(N),
        rule.init_state(N, dtype=torch.float64),
        grads[:3],
        context_of(rule, grads[:3]),
    )
    assert all((v == 0).all() for v in back.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("kernels")
def test_shapes_and_dtypes(rule, dtype):
    theta, grads = theta_of(rule, dtype), grads_of(dtype=dtype)
    state = rule.init_state(N, dtype=dtype)
    assert all(v.shape[-1] == N and v.dtype == dtype and (v == 0).all() for v in state.values())
    updates, new_state = run(rule, theta, grads)
    assert updates.shape == (STEPS, N) and updates.dtype == dtype
    assert new_state.keys() == state.keys()
    assert all(new_state[n].shape == v.shape and new_state[n].dtype == dtype for n, v in state.items())
    if "step" in new_state:
        assert (new_state["step"] == STEPS).all()
    back = rule.backward(theta, grads, torch.zeros(N, dtype=dtype), state, grads, context_of(rule, grads))
    assert back.keys() == theta.keys()
    assert all(back[n].shape == v.shape and back[n].dtype == dtype for n, v in theta.items())
    rows = sum(v.numel() // N for n, v in state.items() if n != "step")
    assert rule.rows_per_coordinate == rows


def test_fresh_theta(rule):
    a, b = (rule.init_theta(torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" and not v.requires_grad for v in a.values())
    assert all(torch.equal(v, b[n]) for n, v in a.items())
    assert all(torch.isfinite(v).all() for v in a.values())
    if rule.kind == "lstm":
        c = rule.init_theta(torch.Generator().manual_seed(4))
        assert not torch.equal(a["lstm.0.weight"], c["lstm.0.weight"])


def test_float32_is_close_to_float64(rule):
    theta, grads = theta_of(rule), grads_of(num_steps=20)
    exact, state = run(rule, theta, grads)
    rounded, rounded_state = run(rule, {n: v.float() for n, v in theta.items()}, grads.float())
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
    for name, value in state.items():
        close = dict(rtol=1e-3, atol=1e-5 * float(value.abs().max()))
        torch.testing.assert_close(rounded_state[name].double(), value, **close)


@pytest.mark.usefixtures("kernels")
def test_finite_for_gradients_of_any_size(rule):
    theta = {n: v.to(torch.float32) for n, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    sizes = torch.logspace(-30, 18, 49, dtype=torch.float64).float()
    generator = torch.Generator().manual_seed(1)
    steady = torch.randn(30, 49, generator=generator) * sizes
    jumping = torch.stack([steady[t].roll(7 * t) for t in range(30)])  # each coordinate sees every size
    falling = torch.stack([sizes.flip(0).roll(-t) for t in range(30)])
    for grads in (steady, -steady.abs(), jumping, falling):
        grads = grads.clamp(-1e18, 1e18)
        updates, state = run(rule, theta, grads)
        assert torch.isfinite(updates).all()
        assert all(torch.isfinite(v).all() for v in state.values())
        loss_grads = torch.randn(30, 49, generator=generator)
        back = rule.backward(theta, grads, torch.zeros(49), rule.init_state(49), loss_grads, context_of(rule, grads))
        assert all(torch.isfinite(v).all() for v in back.values())
        if rule.kind != "sgd" and "learning_rate" not in theta:
            bound = rule.settings().get("output_scale", rule.settings().get("lr", 1e-3))
            if rule.settings().get("output_tanh", rule.kind == "adam"):
                # tanh, and Adam's ratio, which a sudden jump takes to (1 − β₁)/√(1 − β₂) at most.
                assert updates.abs().max() <= bound * (1 if rule.kind == "lstm" else 3.2) * (1 + 1e-6)


def test_vmap_over_theta(rule):
    thetas = [theta_of(rule, seed=s) for s in range(3)]
    grads, params = grads_of(), torch.zeros(N, dtype=torch.float64)
    _, state = run(rule, thetas[0], grads)
    stacked = {n: torch.stack([theta[n] for theta in thetas]) for n in thetas[0]}
    rows = rows_of(rule, grads)[0]
    together = torch.func.vmap(rule.update, in_dims=(0, *[None] * (3 + len(rows))))
    updates, states = together(stacked, grads[0], params, state, *rows)
    for i, theta in enumerate(thetas):
        want, want_state = rule.update(theta, grads[0], params, state, *rows)
        torch.testing.assert_close(updates[i], want, rtol=1e-12, atol=1e-14)
        for name, value in want_state.items():
            torch.testing.assert_close(states[name][i], value, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(updates[0], updates[1])


def test_backward_equals_autograd(rule):
    theta, grads, loss_grads = theta_of(rule), grads_of(), grads_of(seed=5)
    grads[:, 2] = 0.0  # never moves
    grads[:3, 5] = 0.0  # moves late
    _, state = run(rule, theta, grads_of(seed=9))
    for begin in (rule.init_state(N, dtype=torch.float64), state):
        params = torch.linspace(-1, 1, N, dtype=torch.float64)
        say = context_of(rule, grads)
        got = rule.backward(theta, grads, params, begin, loss_grads, say)
        want = UpdateRule.backward(rule, theta, grads, params, begin, loss_grads, say)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11 * float(value.abs().max()))
            assert value.abs().max() > 0


def test_one_step_back_equals_autograd(rule):
    theta, layout = theta_of(rule), TensorLayout((4, N - 4))
    state, generator = rule.init_state(N, dtype=torch.float64), torch.Generator().manual_seed(4)
    for grad in grads_of():
        d_update = torch.randn(N, generator=generator, dtype=torch.float64)
        d_state = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in state.items()}
        want = UpdateRule.vjp(rule, theta, grad, torch.zeros_like(grad), state, d_update, d_state, layout)
        copied = {n: v.clone() for n, v in d_state.items()}
        got = rule.vjp(theta, grad, torch.zeros_like(grad), state, d_update, copied, layout)
        for one, other in zip(got, want):  # without memory, autograd has no derivative for the step count
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)
        state = rule.update(theta, grad, torch.zeros_like(grad), state)[1]


def test_memory_first_used_in_inference_mode_serves_outside_of_it():
    lstm_tape._kept.tapes.clear()
    rule = rules.get("compact")
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    theta = {name: value.double() for name, value in theta.items()}
    state, grads = rule.init_state(N, dtype=torch.float64), grads_of()
    arguments = (theta, grads, torch.zeros(N, dtype=torch.float64), state, grads)
    with torch.inference_mode():
        first = {name: value.clone() for name, value in rule.backward(*arguments).items()}
    second = rule.backward(*arguments)
    assert all(torch.equal(second[name], value) and value.abs().max() > 0 for name, value in first.items())


def test_backward_equals_finite_differences(rule):
    theta, grads, loss_grads = theta_of(rule), grads_of(), grads_of(seed=5)
    _, state = run(rule, theta, grads_of(seed=9))
    params = torch.linspace(-1, 1, N, dtype=torch.float64)

    def value(theta):
        updates, _ = run(rule, theta, grads, state, params)
        return float(((params + updates.cumsum(0)) * loss_grads).sum())

    got = rule.backward(theta, grads, params, state, loss_grads, context_of(rule, grads))
    generator = torch.Generator().manual_seed(7)
    for name, tensor in theta.items():
        for index in torch.randperm(tensor.numel(), generator=generator)[:4].tolist():
            shift = torch.zeros(tensor.numel(), dtype=torch.float64)
            shift[index] = 1e-6
            shift = shift.view(tensor.shape)
            slope = value({**theta, name: tensor + shift}) - value({**theta, name: tensor - shift})
            want, scale = slope / 2e-6, float(got[name].abs().max())
            assert float(got[name].reshape(-1)[index]) == pytest.approx(want, rel=1e-5, abs=1e-5 * scale + 1e-7)


def test_settings_rebuild_the_rule(rule):
    again = rules.get(rule.kind, **rule.settings())
    assert again.settings() == rule.settings() and type(again) is type(rule)
    plain = (str, int, float, bool)
    assert all(type(value) in plain for value in rule.settings().values())


# --- what each rule claims to be ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"lr": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-4}], ids=["plain", "other"])
def test_adam_is_torch_adam(dtype, tolerance, settings):
    rule = rules.get("adam", **settings)
    theta = {n: v.to(dtype) for n, v in rule.init_theta(torch.Generator()).items()}
    exact = {n: v.double() for n, v in theta.items()}
    betas = [1 - float(exact[f"log_one_minus_beta{i}"].exp()) for i in (1, 2)]
    config = rule.settings()
    assert float(exact["log_lr"].exp()) == pytest.approx(config["lr"], rel=1e-6)
    assert betas == pytest.approx([config["beta1"], config["beta2"]], rel=1e-6)
    grads = grads_of(num_steps=200)
    leaf = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=float(exact["log_lr"].exp()), betas=tuple(betas), eps=config["eps"])
    state, params = rule.init_state(N, dtype=dtype), torch.zeros(N, dtype=dtype)
    for grad in grads:
        leaf.grad = grad.clone()
        before = leaf.detach().clone()
        optimizer.step()
        update, state = rule.update(theta, grad.to(dtype), params, state)
        params = params + update
        size = float((leaf.detach() - before).abs().max())
        torch.testing.assert_close(update.double(), leaf.detach() - before, rtol=tolerance, atol=10 * tolerance * size)
    size = float(leaf.detach().abs().max())
    torch.testing.assert_close(params.double(), leaf.detach(), rtol=tolerance, atol=10 * tolerance * size)
    kept = optimizer.state[leaf]
    for name, want in (("m", kept["exp_avg"]), ("v", kept["exp_avg_sq"])):
        close = dict(rtol=10 * tolerance, atol=10 * tolerance * float(want.abs().max()))
        torch.testing.assert_close(state[name].double(), want, **close)
    assert (state["step"] == 200).all()


def numpy_features(config, grads):
    """[steps, 2, n], from the formulas of the two papers."""
    g = grads.numpy()
    out = []
    if config["inputs"] == "log_and_sign":
        p = config["log_range"]
        with np.errstate(divide="ignore"):
            large = np.abs(g) >= np.exp(-p)
            return np.stack(
                [np.where(large, np.log(np.abs(g)) / p, -1.0), np.where(large, np.sign(g), np.exp(p) * g)], 1
            )
    beta, eps = config["beta"], config["eps"]
    for t in range(1, len(g) + 1):
        # Averages as weighted sums over the past, not as recursions.
        weights = (1 - beta) * beta ** np.arange(t - 1, -1, -1, dtype=np.float64)[:, None]
        m = (weights * g[:t]).sum(0) / (1 - beta**t)
        v = (weights * g[:t] ** 2).sum(0) / (1 - beta**t)
        out.append(np.stack([g[t - 1], m]) / (np.sqrt(v) + eps))
    return np.stack(out)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if make(v).kind == "lstm"])
def test_lstm_is_torch_lstm_cell(variant):
    rule = make(variant)
    config, theta, grads = rule.settings(), theta_of(rule), grads_of()
    updates, state = run(rule, theta, grads)
    size, layers = config["hidden_size"], config["num_layers"]
    # Ours holds input, forget, output, candidate; torch holds input, forget, candidate, output.
    order = torch.cat([torch.arange(2 * size), torch.arange(3 * size, 4 * size), torch.arange(2 * size, 3 * size)])
    cells = []
    for layer in range(layers):
        weight, bias = theta[f"lstm.{layer}.weight"][order], theta[f"lstm.{layer}.bias"][order]
        width = weight.shape[1] - size
        cell = torch.nn.LSTMCell(width, size, dtype=torch.float64)
        with torch.no_grad():
            cell.weight_ih.copy_(weight[:, :width])
            cell.weight_hh.copy_(weight[:, width:])
            cell.bias_ih.copy_(bias)
            cell.bias_hh.zero_()
        cells.append(cell)
    hidden = [(torch.zeros(N, size, dtype=torch.float64),) * 2 for _ in range(layers)]
    for t, features in enumerate(torch.from_numpy(numpy_features(config, grads))):
        x = features.T
        if config["dense_units"]:
            x = x @ theta["dense.weight"].T + theta["dense.bias"]
            x = torch.where(x > 0, x, x.exp() - 1)
        with torch.no_grad():
            for layer, cell in enumerate(cells):
                hidden[layer] = cell(x, hidden[layer])
                x = hidden[layer][0]
        out = (x @ theta["output.weight"].T + theta["output.bias"])[:, 0]
        want = config["output_scale"] * (out.tanh() if config["output_tanh"] else out)
        torch.testing.assert_close(updates[t], want, rtol=1e-9, atol=1e-13)
    for layer in range(layers):
        torch.testing.assert_close(state["hidden"][layer], hidden[layer][0].T, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(state["cell"][layer], hidden[layer][1].T, rtol=1e-9, atol=1e-13)


def test_fresh_lstm_forgets_little_and_says_little():
    theta = rules.get("rnnprop").init_theta(torch.Generator().manual_seed(0))
    assert theta["lstm.0.bias"].tolist() == [0.0] * 20 + [1.0] * 20 + [0.0] * 40
    assert theta["lstm.0.weight"].abs().max() <= 20**-0.5
    assert theta["output.weight"].abs().max() <= 20**-0.5 / 10
    assert theta["lstm.1.weight"].std() == pytest.approx(20**-0.5 / 3**0.5, rel=0.05)  # of a uniform distribution


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
def test_normalized_equals_its_formula(beta):
    grads = grads_of(num_steps=12)
    state = {name: torch.zeros(N, dtype=torch.float64) for name in ("m", "v", "step")}
    want = numpy_features({"inputs": "normalized", "beta": beta, "eps": 1e-10}, grads)
    for t, grad in enumerate(grads):
        inputs, state, active = normalized(grad, state, beta, 1e-10)
        np.testing.assert_allclose(inputs.numpy(), want[t], rtol=1e-10)
        assert active.all()
    # At the first step both inputs are the sign of the gradient.
    np.testing.assert_allclose(want[0], np.sign(grads[:1].numpy()).repeat(2, 0), rtol=1e-6)


@pytest.mark.parametrize("p", [1.0, 10.0])
def test_log_and_sign_equals_its_formula(p):
    edge = math.exp(-p)
    grads = torch.tensor([0.0, edge, -edge, edge * 0.999, -edge / 2, 1.0, -1.0, 1e-30, 1e30], dtype=torch.float64)
    inputs, active = log_and_sign(grads, p)
    want = numpy_features({"inputs": "log_and_sign", "log_range": p}, grads[None])[0]
    np.testing.assert_allclose(inputs.numpy(), want, rtol=1e-12, atol=1e-15)
    assert active.tolist() == [False] + [True] * 8
    assert (inputs[0] >= -1 - 1e-12).all() and inputs[1].abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e8])
@pytest.mark.parametrize("name", ["compact", "rnnprop"])
def test_normalized_inputs_do_not_see_the_scale(name, scale):
    rule = rules.get(name)
    theta, grads = theta_of(rule), grads_of()
    updates, state = run(rule, theta, grads)
    scaled, scaled_state = run(rule, theta, grads * scale)
    # Up to ε = 1e-10 against the smallest gradient, some 1e-8.
    torch.testing.assert_close(scaled, updates, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(scaled[:, 4:], updates[:, 4:], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(scaled_state["v"], state["v"] * scale**2, rtol=1e-12, atol=0)


# --- what a rule is told of whole tensors ---


def numpy_agreement(config, grads):
    """[steps, 4 to 6] for gradients [steps, n] of one tensor: averages as weighted sums over the past, then cosines."""
    g, out = np.asarray(grads, dtype=np.float64), []

    def average(values, beta):
        weights = (1 - beta) * beta ** np.arange(len(values) - 1, -1, -1, dtype=np.float64)
        return (weights[:, None] * values).sum(0)

    for t in range(len(g)):
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            square, recent = (average(g[: t + 1] ** 2, config[name]) for name in ("square", "recent_square"))
            bound = config["square_ratio"] * recent
            root = np.sqrt(np.where((g[t] != 0) & (bound < square), bound, square))
            vectors = [g[t] / root] + [average(g[:t], config[name]) / root for name in ("fast", "medium", "slow")]
            least = recent / root**2  # of what is larger than its root, so much of the square is left
            vectors[2:] = (np.where(vector**2 > least, least / vector, vector) for vector in vectors[2:])
        sound = np.isfinite(np.stack(vectors)).all(0) & (root < np.inf)
        now, *averages = (vector[sound] for vector in vectors)
        first, second, third = averages
        pairs = [(now, first), (now, first + second), (now, first + second + third), (first, first + second + third)]
        norms = [np.linalg.norm(x) * np.linalg.norm(y) for x, y in pairs]
        c = np.array([x @ y / norm if norm else 0.0 for (x, y), norm in zip(pairs, norms)])
        if config["signal"]:
            unbiased = third / (1 - config["slow"] ** max(t, 1))
            c = np.append(c, np.linalg.norm(unbiased) / np.linalg.norm(now) if now.any() else 0.0)
        told = 10 * c / (1 + 10 * abs(c))
        if config["loudness"]:
            heard = now[now != 0]
            told = np.append(told, min(1.0, config["loudness"] * np.mean(heard**2)) if len(heard) else 0.0)
        out.append(told)
    return np.stack(out)


def told_in_a_run(rule, theta, grads, layout):
    """What the rule is told before every step, [steps, num_context, tensors]."""
    state, out = rule.init_state(grads.shape[1], dtype=grads.dtype), []
    for grad in grads:
        say = context(rule, grad, state, layout)
        _, state = rule.update(theta, grad, torch.zeros_like(grad), state, say.rows(len(grad)))
        out.append(say.values)
    return torch.stack(out)


@pytest.mark.parametrize("variant", ["paced", "grows_fast", "told_of_signal", "hushed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=str)
@pytest.mark.usefixtures("kernels")
def test_agreement_is_that_of_each_tensor_s_gradients(variant, dtype, tolerance):
    rule, sizes = make(variant), (1, 40, 3, 256)
    grads = grads_of(num_steps=12, n=2 * sum(sizes))
    grads[:, 7], grads[:5, 9] = 0.0, 0.0  # never seen, and seen late
    grads[6:] = grads[6:].abs()  # from here on they agree
    got = told_in_a_run(rule, theta_of(rule, dtype), grads.to(dtype), TensorLayout(sizes, 2))
    assert got.dtype == dtype and got.shape == (12, rule.num_context, 8)
    start = 0
    for k, size in enumerate(sizes * 2):
        want = numpy_agreement(rule.settings(), grads[:, start : start + size])
        np.testing.assert_allclose(got[:, :, k].double().numpy(), want, rtol=tolerance, atol=tolerance)
        start += size
    assert (got[0, :5] == 0).all() and got[1:].abs().min() > 0 and got[:, :5].abs().max() < 1
    assert got[1, :4, 0].double().tolist() == pytest.approx([10 / 11 * math.copysign(1, got[1, 0, 0])] * 3 + [10 / 11])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.usefixtures("kernels")
def test_one_bad_number_does_not_spoil_what_the_others_tell(dtype):
    rule = rules.get("paced")
    grads = grads_of(num_steps=5, n=20)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e200], dtype=torch.float64)
    grads[2, 3:7] = bad
    got = told_in_a_run(rule, theta_of(rule, dtype), grads.to(dtype), TensorLayout((20,)))[..., 0].double()
    assert got.isfinite().all()
    np.testing.assert_allclose(got.numpy(), numpy_agreement(rule.settings(), grads), rtol=1e-4, atol=1e-6)
    # A tensor of bad numbers alone tells nothing, and so does one that has seen no gradient.
    for values in (bad, torch.zeros(4, dtype=torch.float64)):
        state = {**rule.init_state(4, dtype=dtype), "m": torch.ones(3, 4, dtype=dtype)}
        assert (context(rule, values.to(dtype), state, TensorLayout((4,))).values == 0).all()


@pytest.mark.usefixtures("kernels")
def test_the_strength_of_the_signal():
    """Some √((1 − β)/(1 + β)) = 0.022 for noise alone, and one for a gradient that stays: x to 10x/(1 + 10x)."""
    rule, generator = rules.get("paced", signal=True), torch.Generator().manual_seed(0)
    noise = torch.randn(3000, 400, generator=generator, dtype=torch.float32)
    state = rule.init_state(400)
    for grad in noise:
        state["m"] = torch.stack([b * m + (1 - b) * grad for b, m in zip((0.9, 0.99, 0.999), state["m"])])
        state["v"] = torch.stack([b * v + (1 - b) * grad**2 for b, v in zip((0.99, 0.9), state["v"])])
        state["step"] += 1
    told = context(rule, noise[0], state, TensorLayout((400,))).values[4]
    assert float(told) == pytest.approx(0.183, abs=0.02)
    steady, theta = noise[:1].expand(30, -1), theta_of(rule, torch.float32)
    told = told_in_a_run(rule, theta, steady, TensorLayout((400,)))[:, 4, 0]
    assert told[0] == 0 and told[1:].tolist() == pytest.approx([10 / 11] * 29, rel=1e-4)


@pytest.mark.usefixtures("kernels")
def test_steps_grow_the_less_the_quieter_gradients_are():
    rule = rules.get("paced", signal=True, loudness=64.0)
    theta, state = rule.init_theta(torch.Generator().manual_seed(0)), rule.init_state(3)
    grads = torch.tensor([1.0, -2.0, 3.0])

    def grown(agreement, loudness):
        rows = torch.tensor([agreement] * 4 + [0.0, loudness])[:, None].expand(6, 3)
        after = rule.update(theta, grads, torch.zeros(3), state, rows)[1]
        return after["log_size"].tolist()

    loud = grown(0.8, 1.0)
    assert min(loud) > 0.05 and grown(0.8, 0.25) == pytest.approx([0.25 * one for one in loud])
    assert grown(0.8, 0.0) == [0.0] * 3
    assert max(grown(-0.8, 1.0)) < -0.02 and grown(-0.8, 0.1) == grown(-0.8, 1.0)  # they shrink as they do


@pytest.mark.usefixtures("kernels")
def test_clipped_gradients_count_for_what_they_are_clipped_to():
    """A tensor's gradient may be so many times the root of its recent average square; what is more is not heard."""
    plain, rule = rules.get("paced", recent_square=0.5), rules.get("paced", clip=3.0, recent_square=0.5)
    theta, layout = theta_of(rule), TensorLayout((3, 2))
    grads = torch.tensor([[1.0, -2.0, 2.0, 1.0, -1.0]] * 3 + [[100.0, 0.0, 0.0, 1.0, -1.0]]).double()
    factors = told_in_a_run(rule, theta, grads, layout)[:, -1]
    assert factors[:3].tolist() == [[1.0, 1.0]] * 3  # the first has no past, the others are what they were
    assert factors[3].tolist() == pytest.approx([9 / 100, 1.0])  # three times the three that it was long
    clipped = grads.clone()
    clipped[3, 0] = 9.0
    state, want = rule.init_state(5, dtype=torch.float64), plain.init_state(5, dtype=torch.float64)
    for grad, heard in zip(grads, clipped):
        before = context(rule, grad, state, layout).rows(5)
        update, state = rule.update(theta, grad, torch.zeros(5), state, before)
        expected, want = plain.update(theta, heard, torch.zeros(5), want, before[:-1])
        torch.testing.assert_close(update, expected, rtol=1e-12, atol=0)
    for name, value in want.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("kernels")
def test_gradients_may_grow_without_end_where_they_are_clipped():
    """After 100 steps of ones come steps of 1,000: with decay 0.8 and clip 4 what passes doubles, √(0.8 + 0.2 · 16)."""
    rule = rules.get("paced", clip=4.0, recent_square=0.8)
    grads = torch.cat([torch.ones(100, 2), torch.full((12, 2), 1000.0)])
    factors = told_in_a_run(rule, theta_of(rule, torch.float32), grads, TensorLayout((2,)))[:, -1, 0]
    want = [0.004 * 2**t for t in range(8)]
    assert factors[:100].tolist() == [1.0] * 100 and factors[100:108].tolist() == pytest.approx(want, rel=1e-4)
    assert factors[108:].tolist() == [1.0] * 4


def test_a_clipped_gradient_brakes():
    """Steps shrink by a power of what clips, at once, down to a bound; what is shrunk further stays, and others do."""
    rule = rules.get("paced", clip=4.0, brake=0.5, most_braked=2.0)
    theta = {name: torch.zeros_like(value) for name, value in rule.init_theta(torch.Generator()).items()}

    def sizes(factor, *start):
        state = {**rule.init_state(2), "log_size": torch.tensor(start)}
        rows = torch.zeros(rule.num_context, 2)
        rows[-1] = factor
        return rule.update(theta, torch.tensor([1.0, -2.0]), torch.zeros(2), state, rows)[1]["log_size"].tolist()

    assert sizes(1.0, 0.5, -3.0) == [0.5, -3.0]
    assert sizes(math.exp(-2), 0.5, -3.0) == pytest.approx([-0.5, -3.0])
    assert sizes(math.exp(-30), 2.0, -1.5) == [-2.0, -2.0]


def test_squares_that_clip():
    state = {"v": torch.tensor([[0.0] * 3, [0.5, math.inf, 1.0]]).double(), "step": torch.tensor([2.0]).double()}
    got = clip_terms(torch.tensor([3.0, 1.0, math.nan]).double(), state, 0.5)
    assert got.tolist() == [[9.0, 0.0, 0.0], [pytest.approx(0.5 / 0.75), 0.0, 0.0]]
    now, recent = torch.tensor([64.0, 15.9, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert clip_factor(now, recent, 4.0).tolist() == [0.5, 1.0, 1.0, 1.0]
    now.requires_grad_()
    clip_factor(now, recent, 4.0).sum().backward()
    assert now.grad is not None and now.grad.tolist() == pytest.approx([-0.5 * 0.5 / 64, 0.0, 0.0, 0.0])


def test_a_leak_lets_steps_return_where_nothing_speaks_for_either():
    """A constant rate r has the fixed point growth·r / (leak·(1 − ρ)²·(1 − r²)); none lets what has grown decay."""
    rule = rules.get("paced", growth=0.1, signal=True, leak=0.2)
    theta = {name: torch.zeros_like(value) for name, value in rule.init_theta(torch.Generator()).items()}
    grads = torch.tensor([1.0, -2.0, 3.0])

    def sizes(bias, start, num_steps, signal=0.5):
        theta["output.bias"][-1] = bias
        state = {**rule.init_state(3), "log_size": torch.full((3,), start)}
        rows = torch.tensor([0.0] * 4 + [signal])[:, None].expand(5, 3)
        for _ in range(num_steps):
            state = rule.update(theta, grads, torch.zeros(3), state, rows)[1]
        return state["log_size"].tolist()

    assert sizes(0.0, 2.0, 40) == pytest.approx([2 * 0.95**40] * 3)
    assert sizes(0.0, -8.0, 40) == pytest.approx([-8 * 0.95**40] * 3)
    assert sizes(0.0, -8.0, 40, signal=1.0) == [-8.0] * 3  # nothing leaks where the gradient is all signal
    rate = math.tanh(-0.2)
    assert sizes(-0.2, 1.0, 500) == pytest.approx([0.1 * rate / (0.05 * (1 - rate**2))] * 3, rel=1e-4)
    assert sizes(-9.0, 0.0, 200) == [-12.0] * 3  # a clear word is not forgotten


def test_agreement_of_sums():
    a, first, second, third = np.array([[2.0, 1.0, -1.0], [1.0, 3.0, 0.0], [0.0, -2.0, 2.0], [-4.0, 0.5, 1.0]])
    pairs = [(a, first), (a, first + second), (a, first + second + third), (first, first + second + third)]
    c = np.array([x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in pairs])
    one_by_one = [a @ a, first @ first, second @ second, third @ third, a @ first, a @ second, a @ third]
    sums = torch.tensor([*one_by_one, first @ second, first @ third, second @ third], dtype=torch.float64)
    np.testing.assert_allclose(agreement(sums).numpy(), 10 * c / (1 + 10 * abs(c)), rtol=1e-12)
    alone = torch.tensor([4.0, 9.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert agreement(alone).tolist() == pytest.approx([5 / 6] * 3 + [10 / 11])  # the cosine is a half
    tiny_and_huge = torch.tensor([4.0, 0.0, 1e-200, 1e200, 0.0, 1e-100, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert agreement(tiny_and_huge).tolist() == pytest.approx([0.0, 10 * 0.5 / 6, 0.0, 0.0])
    cancels = torch.tensor([4.0, 9.0, 9.0, 0.0, 3.0, -3.0, 0.0, -9.0, 0.0, 0.0], dtype=torch.float64)
    assert agreement(cancels).tolist() == pytest.approx([5 / 6, 0.0, 0.0, 0.0])  # the slower undoes the faster
    assert agreement(torch.zeros(10, 2)).equal(torch.zeros(4, 2))
    assert agreement(torch.zeros(12, 2), 64.0).equal(torch.zeros(6, 2))
    assert agreement(torch.zeros(12, 2)).equal(torch.zeros(5, 2))
    told = agreement(torch.cat([alone, torch.tensor([1.0, 80.0]).double()]), 16.0)
    assert told.tolist() == pytest.approx(
        [5 / 6] * 3 + [10 / 11, 5 / 6, 0.8]
    )  # half as long as the gradient; 16 · 4/80
    assert float(agreement(torch.cat([alone, torch.tensor([1.0, 20.0]).double()]), 16.0)[5]) == 1.0


def test_terms_of_agreement():
    state = {"m": torch.tensor([[1.0], [-2.0], [3.0]]).double(), "v": torch.tensor([[10.0], [0.0]]).double()}
    betas = (0.0, 0.0, 0.0, 0.75, 0.5)
    got = agreement_terms(torch.tensor([4.0]).double(), state, betas, 4.0)  # v = 0.75·10 + 0.25·16, w = 0.5·16
    third = 8 / 3  # 3 is beyond √w, and counts for w/3
    want = [16, 1, 4, third**2, 4, -8, 4 * third, -2, third, -2 * third]
    assert (got[:, 0] * 11.5).tolist() == pytest.approx(want)
    got = agreement_terms(torch.tensor([4.0]).double(), state, betas, 1.0)  # 11.5 is more than w allows
    assert (got[:, 0] * 8).tolist() == pytest.approx(want)
    betas = (0.0, 0.0, 0.5, 0.75, 0.5)
    for step, bias in ((0, 0.5), (1, 0.5), (3, 0.875)):
        old = {**state, "step": torch.tensor([step]).double()}
        got = agreement_terms(torch.tensor([4.0]).double(), old, betas, 1.0, signal=True)
        assert len(got) == 12 and got[11] == 1 and float(got[10, 0] * 8) == pytest.approx((third / bias) ** 2)


def test_what_normalizes_is_bounded_by_what_gradients_have_been_of_late():
    average, recent = torch.tensor([8.0, 8.0, 8.0, 8.0, math.nan]), torch.tensor([1.0, 4.0, 1.0, 0.0, math.nan])
    got = bounded_square(average, recent, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), 3.0)
    assert got[:4].tolist() == [3.0, 8.0, 8.0, 8.0] and got[4].isnan()


def test_gradients_that_shrink_soon_make_whole_steps_again():
    """A thousandth of what they were, they are soon divided by no more than eight times their size."""
    rule = rules.get("mixture")
    grads = torch.cat([torch.ones(300), torch.full((60,), 1e-3)])[:, None].double()
    state, rows = rule.init_state(1, dtype=torch.float64), []
    for grad in grads:
        directions, _, state, _ = momenta(grad, state, rule.config.betas, rule.config.square_ratio, rule.config.eps)
        rows.append(directions[:, 0])
    found = torch.stack(rows)
    assert found[299].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    recent = rule.config.recent_square ** torch.arange(1, 61, dtype=torch.float64) * (1 - 1e-6) + 1e-6
    torch.testing.assert_close(found[300:, 0], 1e-3 / (64 * recent).sqrt().clamp(max=1), rtol=0.3, atol=0)
    old = [beta**60 * (1 - beta**300) / (1 - beta**360) for beta in (0.99, 0.999)]  # the averages of the ones
    want = [float(recent[-1].sqrt()) / (8 * m) for m in old]
    assert found[359, 2:].tolist() == pytest.approx(want, rel=2e-3)  # what was averaged for long does not rule


@pytest.mark.usefixtures("kernels")
def test_a_relative_eps_is_of_how_large_the_gradients_of_the_tensor_have_been():
    """By hand, of two tensors, and in units: gradients a thousand times as large make the same updates."""
    share, beta, recent_beta = 0.1, 0.99, 0.8
    rule = rules.get("mixture", relative_eps=share, eps=1e-30, recent_square=recent_beta, growth=0.1)
    layout, sizes = TensorLayout((2, 3)), (slice(0, 2), slice(2, 5))
    series = torch.tensor([[0.0, 1.0, 2.0, *[0.9**t for t in range(60)], 0.0, 3.0]]).double()
    series = (series * torch.tensor([[1.0], [0.1], [1e-6], [0.0], [5.0]])).T.contiguous()
    v, recent, largest = (torch.zeros(5).double() for _ in range(3))
    states = {scale: rule.init_state(5, dtype=torch.float64) for scale in (1.0, 1e3)}
    for t, grads in enumerate(series, start=1):
        roots = [(largest[s].sum() / max(1, int((largest[s] > 0).sum()))).sqrt() for s in sizes]
        want = share * torch.cat([root.expand(s.stop - s.start) for root, s in zip(roots, sizes)])
        v, recent = beta * v + (1 - beta) * grads**2, recent_beta * recent + (1 - recent_beta) * grads**2
        average = v / (1 - beta**t)
        bound = 64 * recent / (1 - recent_beta**t)
        square = torch.where(grads == 0, average, torch.minimum(average, bound))
        largest = torch.maximum(largest, average)
        updates = []
        for scale, state in states.items():
            row = rule.context_rows(grads * scale, state, layout)
            torch.testing.assert_close(row[-1], want * scale)
            rows, _, active = rule.native_rows(grads * scale, state, layout)
            direction = rows[rule.native_shape.num_features]
            torch.testing.assert_close(direction, torch.where(v > 0, grads / (square.sqrt() + want), 0.0))
            update, after = rule.update(theta_of(rule), grads * scale, torch.zeros(5).double(), state, row)
            torch.testing.assert_close(after["v"][2], largest * scale**2)
            updates.append(update)
            states[scale] = after
        torch.testing.assert_close(*updates)


def test_the_largest_of_what_is_not_finite_is_left_out():
    largest = torch.tensor([4.0, math.inf, math.nan, 0.0, 16.0])
    total, count = largest_terms({"v": torch.stack([torch.ones(5), torch.ones(5), largest])}).sum(-1)
    assert float(largest_root(total, count)) == pytest.approx(10**0.5)
    assert float(largest_root(torch.tensor(0.0), torch.tensor(0.0))) == 0.0


@pytest.mark.usefixtures("kernels")
def test_what_gets_no_more_gradients_comes_to_rest():
    """A row of an embedding that is in no further batch: it moves on for as long as the fastest squares remember."""
    rule = rules.get("mixture")
    theta = {n: v.float() for n, v in theta_of(rule).items()}
    theta["output.weight"].zero_()
    theta["output.bias"].copy_(torch.tensor([0.0, 0.0, -1.0, -1.0, -1.0]))
    state, zeros, updates = rule.init_state(1), torch.zeros(1), []
    for step in range(400):
        grads = torch.full((1,), (1.0 + step % 3) * (step < 100))
        update, state = rule.update(theta, grads, zeros, state)
        updates.append(abs(float(update)))
    assert updates[99] > 0.02  # three directions of some 0.01
    assert sum(updates[100:]) < 30 * updates[99] and max(updates[300:]) < 1e-3 * updates[99]


def test_what_a_rule_is_told_by_default_is_nothing():
    rule, grads = rules.get("paced"), grads_of()
    theta, state, params = theta_of(rule), rule.init_state(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    state = {**state, "m": grads[:3], "v": grads[3:5] ** 2}
    silent, _ = rule.update(theta, grads[0], params, state)
    told_zeros, _ = rule.update(theta, grads[0], params, state, torch.zeros(4, N, dtype=torch.float64))
    told_more, _ = rule.update(theta, grads[0], params, state, torch.ones(4, N, dtype=torch.float64))
    assert torch.equal(silent, told_zeros) and (silent != told_more).all()
    assert rules.get("mixture").num_context == 0 and rule.num_context == 4


@pytest.mark.parametrize("variant", ["growing", "grows_fast"])
@pytest.mark.usefixtures("kernels")
def test_a_step_with_its_context_equals_finite_differences(variant):
    rule, sizes = make(variant), (3, 1, N - 4)
    generator = torch.Generator().manual_seed(8)
    theta, layout = loud(theta_of(rule), generator), TensorLayout(sizes)
    _, state = run(rule, theta, grads_of(seed=9))
    state = {n: v if n != "log_size" else v.clamp(-3, 3) for n, v in state.items()}
    grads, params = grads_of()[0], torch.zeros(N, dtype=torch.float64)
    draw = lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    d_update, d_state = draw(grads), {n: draw(v) for n, v in state.items()}

    def value(theta, grads, state):
        update, after = update_by_hand(rule, theta, grads, params, state, sizes)
        return float((update * d_update).sum() + sum((v * d_state[n]).sum() for n, v in after.items() if n != "step"))

    copied = {n: v.clone() for n, v in d_state.items()}
    d_theta, d_grads, d_params, d_before = rule.vjp(theta, grads, params, state, d_update, copied, layout)
    assert (d_params == 0).all() and d_before.keys() == state.keys()
    given = {**{("theta", n): v for n, v in theta.items()}, ("grads", ""): grads}
    given |= {("state", n): v for n, v in state.items() if n != "step"}
    found = {**{("theta", n): v for n, v in d_theta.items()}, ("grads", ""): d_grads}
    found |= {("state", n): v for n, v in d_before.items()}
    for (where, name), tensor in given.items():
        scale = float(found[where, name].abs().max())
        assert scale > 0
        for index in torch.randperm(tensor.numel(), generator=generator)[:6].tolist():
            least = {"": 1e-3, "m": 1e-3, "v": 1e-5}.get(name, 10.0)  # averages of squares may be 1e-8
            width = 1e-6 * max(least, float(tensor.reshape(-1)[index].abs()))
            ends = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved.view(-1)[index] += sign * width
                changed = {"theta": theta, "grads": grads, "state": state}
                changed[where] = moved if where == "grads" else {**changed[where], name: moved}
                ends.append(value(**changed))
            want = (ends[0] - ends[1]) / (2 * width)
            assert float(found[where, name].reshape(-1)[index]) == pytest.approx(want, rel=1e-4, abs=1e-5 * scale), name


@pytest.mark.usefixtures("kernels")
def test_back_through_a_tensor_that_has_seen_nothing_is_finite():
    rule = rules.get("paced")
    theta, n = {name: v.float() for name, v in theta_of(rule).items()}, 6
    state = {**rule.init_state(n), "m": torch.zeros(3, n), "v": torch.zeros(2, n)}
    grads = torch.tensor([0.0, 0.0, 0.0, 1.0, 1e-30, 0.0])  # the first tensor has seen none, the second is at its first
    d_state = {name: torch.ones_like(v) for name, v in state.items()}
    back = rule.vjp(theta, grads, torch.zeros(n), state, torch.ones(n), d_state, TensorLayout((3, 3)))
    for values in (back[0], {"grads": back[1]}, back[3]):
        assert all(v.isfinite().all() for v in values.values())


def test_a_layout_says_where_tensors_lie():
    layout = TensorLayout((2, 1, 3), repeats=2)
    index = layout.index(torch.device("cpu"))
    assert index.dtype == torch.int32 and index.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5]
    terms = torch.arange(24.0).view(2, 12)
    got = layout.sums(terms)
    assert got.dtype == torch.float64  # products of sums are taken of them
    assert got.tolist() == [[1, 2, 12, 13, 8, 30], [25, 14, 48, 37, 20, 66]]
    assert layout.sums(torch.full((12,), 1e38)).tolist() == pytest.approx([2e38, 1e38, 3e38] * 2)
    assert TensorLayout((4,)).sums(terms[:, :4]).tolist() == [[6], [54]]


def test_a_layout_first_used_in_inference_mode_serves_outside_of_it():
    rule, layout = rules.get("paced"), TensorLayout((5, N - 5))
    theta, grads = theta_of(rule), grads_of()
    _, state = run(rule, theta, grads)
    cotangents = {n: torch.ones_like(v) for n, v in state.items()}
    with torch.inference_mode():
        assert layout.index(grads.device).tolist() == [0] * 5 + [1] * (N - 5)
    back = rule.vjp(theta, grads[0], torch.zeros_like(grads[0]), state, grads[1], cotangents, layout)
    assert back[0]["output.skip"].abs().min() > 0


def test_context_is_read_by_coordinate():
    index = TensorLayout((2, 1, 3)).index(torch.device("cpu"))
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    say = Context(values, index)
    assert say.rows(6).tolist() == [[1, 1, 2, 3, 3, 3], [4, 4, 5, 6, 6, 6]]
    part = say.of(1, 4)
    assert part.rows(3).tolist() == [[1, 2, 3], [4, 5, 6]] and part.of(2, 3).rows(1).tolist() == [[3], [6]]
    steps = Context(torch.stack([values, -values]), index)
    assert steps.rows(6).shape == (2, 2, 6) and torch.equal(steps.of(1, 4).rows(3)[1], -part.rows(3))
    alone = Context(values[:, :1], None)
    assert alone.rows(3).tolist() == [[1] * 3, [4] * 3] and alone.of(5, 7).rows(2).tolist() == [[1] * 2, [4] * 2]
    assert joined(values, [2, 1, 3]).rows(6).tolist() == say.rows(6).tolist()
    assert joined(values[:, 1:2], [4]).rows(2).tolist() == [[2, 2], [5, 5]]


def test_rules_that_ask_nothing_of_tensors_say_so():
    rule = rules.get("compact")
    with pytest.raises(NotImplementedError):
        rule.context_terms(torch.zeros(1), rule.init_state(1))
    with pytest.raises(NotImplementedError):
        rule.context_of(torch.zeros(1, 1))
    assert rule.context_rows(torch.zeros(1), rule.init_state(1), TensorLayout((1,))) is None


def test_steps_of_a_fresh_paced_rule_grow_while_gradients_agree_and_shrink_where_they_turn():
    rule = rules.get("paced")
    theta = {n: v.double() for n, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    for signs, grows in ((torch.ones(8), True), (1 - 2.0 * (torch.arange(8) % 2), False)):
        state, before = rule.init_state(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for grad in signs[:, None].double() * torch.tensor([[0.5, -3.0, 1e-4]]).double():
            say = agreement_by_hand(rule, grad, state)
            c = rule.config
            own = momenta(grad, state, c.betas, c.square_ratio, c.eps)[1]
            hears = torch.cat([own, say[:, None].expand(4, 3)])
            rate = 0.1 * (theta["output.bias"][-1] + theta["output.skip"] @ hears).tanh()
            _, state = rule.update(theta, grad, before, state, say[:, None].expand(4, 3))
            torch.testing.assert_close(state["log_size"], before + rate, rtol=1e-12, atol=0)
            before = state["log_size"]
        assert (before > 0.2).all() if grows else (before < -0.2).all()


def test_what_has_grown_multiplies_the_step_and_stays_within_its_bound():
    paced, plain = rules.get("mixture", growth=5.0), rules.get("mixture")
    theta, grads = theta_of(paced), grads_of(num_steps=4)
    silent = {
        "lstm.0.weight": torch.cat([theta["lstm.0.weight"][:, :10], theta["lstm.0.weight"][:, 14:]], 1),
        "lstm.0.bias": theta["lstm.0.bias"],
        "output.weight": theta["output.weight"][:-1],
        "output.bias": theta["output.bias"][:-1],
    }
    theta["output.bias"][-1] = 30.0  # as fast as it goes
    nothing = [(torch.zeros(4, N, dtype=torch.float64),)] * 4
    grown, state = run(paced, theta, grads, rows=nothing)
    want, _ = run(plain, silent, grads)
    for t, log_size in enumerate([5.0, 10.0, 12.0, 12.0]):
        torch.testing.assert_close(grown[t], want[t] * math.exp(log_size), rtol=1e-9, atol=0)
    assert (state["log_size"] == 12).all()
    theta["output.bias"][-1] = -30.0
    for _ in range(2):
        _, state = run(paced, theta, grads, state=state, rows=nothing)
    assert (state["log_size"] == -12).all()


@pytest.mark.parametrize("variant", ["mixture", "paced", "grows_fast"])
def test_updates_turn_with_the_sign_of_the_gradients(variant):
    rule = make(variant)
    theta, grads = theta_of(rule), grads_of()
    updates, state = run(rule, theta, grads)
    turned, turned_state = run(rule, theta, -grads)
    torch.testing.assert_close(turned, -updates, rtol=1e-12, atol=0)
    assert all(torch.equal(turned_state[n], -v if n == "m" else v) for n, v in state.items())
    if rule.num_context:
        a, b = (told_in_a_run(rule, theta, g, TensorLayout((N,))) for g in (grads, -grads))
        assert torch.equal(a, b)


# --- names and settings ---


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("compct", {}, "unknown update rule 'compct'; did you mean compact?"),
        ("Adam", {}, "unknown update rule 'Adam'; did you mean adam"),
        ("lstmm", {}, "unknown update rule 'lstmm'; did you mean lstm?"),
        ("velo4", {}, "unknown update rule 'velo4'; choose from adam, compact, gated, l2l, lstm"),
        ("compact", {"hidden": 4}, "rule 'compact' has no setting 'hidden'; it has inputs, beta, eps"),
        ("compact", {"inputs": "raw"}, "inputs must be one of normalized, log_and_sign; got 'raw'"),
        ("compact", {"beta": 1.0}, r"beta must lie in \[0, 1\); got 1.0"),
        ("compact", {"beta": -0.1}, r"beta must lie in \[0, 1\); got -0.1"),
        ("compact", {"beta": math.nan}, r"beta must lie in \[0, 1\); got nan"),
        ("compact", {"eps": 0.0}, "eps must be positive; got 0.0"),
        ("l2l", {"log_range": -1.0}, "log_range must be positive; got -1.0"),
        ("compact", {"output_scale": 0.0}, "output_scale must be positive; got 0.0"),
        ("compact", {"output_scale": math.nan}, "output_scale must be positive; got nan"),
        ("compact", {"dense_units": -1}, "dense_units must be at least 0; got -1"),
        ("compact", {"num_layers": 0}, "num_layers must be at least 1; got 0"),
        ("compact", {"hidden_size": 0}, "hidden_size must be at least 1; got 0"),
        ("paced", {"leak": 0.1}, "leak needs signal, which says where; got 0.1 without; set signal"),
        ("paced", {"leak": 1.0}, r"leak must lie in \[0, 1\); got 1.0"),
        ("paced", {"leak": -0.1}, r"leak must lie in \[0, 1\); got -0.1"),
        ("mixture", {"signal": True}, "signal needs growth: .*; give a growth above 0"),
        ("paced", {"signal": True, "loudness": -1.0}, "loudness must be finite and not negative; got -1.0"),
        ("paced", {"loudness": 64.0}, "loudness needs signal: it is told beside it; got 64.0 without; set signal"),
        ("paced", {"clip": 1.0}, "clip must be finite and over 1, or 0 for none; got 1.0"),
        ("paced", {"clip": -4.0}, "clip must be finite and over 1, or 0 for none; got -4.0"),
        ("paced", {"clip": math.inf}, "clip must be finite and over 1, or 0 for none; got inf"),
        ("mixture", {"clip": 4.0}, "clip needs growth: .*; give a growth above 0"),
        ("paced", {"brake": 0.25}, "brake needs clip, which says when; got 0.25 without; give a clip over 1"),
        ("paced", {"clip": 4.0, "brake": -0.1}, "brake must be finite and not negative; got -0.1"),
        ("paced", {"clip": 4.0, "brake": math.inf}, "brake must be finite and not negative; got inf"),
        ("paced", {"clip": 4.0, "most_braked": 0.0}, r"most_braked must lie in \(0, 12\]; got 0.0"),
        ("paced", {"most_braked": 13.0}, r"most_braked must lie in \(0, 12\]; got 13.0"),
        ("mixture", {"relative_eps": 1.0}, r"relative_eps must lie in \[0, 1\); got 1.0"),
        ("mixture", {"relative_eps": -0.5}, r"relative_eps must lie in \[0, 1\); got -0.5"),
        ("mixture", {"relative_eps": 0.5}, "relative_eps needs growth: .* got 0.5 without; give a growth above 0"),
        ("paced", {"growth": -0.1}, "growth must be finite and not negative; got -0.1"),
        ("mixture", {"square_ratio": 0.5}, "square_ratio must be finite and at least 1; got 0.5"),
        ("mixture", {"square_ratio": math.inf}, "square_ratio must be finite and at least 1; got inf"),
        ("paced", {"most_grown": 0.0}, r"most_grown must lie in \(0, 12\]; got 0.0"),
        ("paced", {"most_grown": 12.5}, r"most_grown must lie in \(0, 12\]; got 12.5"),
        ("mixture", {"growth": math.inf}, "growth must be finite and not negative; got inf"),
        ("mixture", {"growth": math.nan}, "growth must be finite and not negative; got nan"),
        ("adam", {"lr": 0.0}, "lr must be positive; got 0.0"),
        ("adam", {"lr": math.nan}, "lr must be positive; got nan"),
        ("adam", {"beta1": 1.0}, "beta1 must lie strictly between 0 and 1; got 1.0"),
        ("adam", {"beta2": 0.0}, "beta2 must lie strictly between 0 and 1; got 0.0"),
        ("adam", {"eps": -1e-8}, "eps must be non-negative; got -1e-08"),
        ("sgd", {"lr": math.inf}, "lr of rule 'sgd' must be finite; got inf"),
        ("sgd", {"lr": -1.0}, "lr must be positive; got -1.0"),
        # What a YAML file can hold by mistake.
        ("adam", {"lr": "fast"}, "lr of rule 'adam' must be a number; got 'fast'"),
        ("compact", {"hidden_size": 8.5}, "hidden_size of rule 'compact' must be an integer; got 8.5"),
        ("compact", {"hidden_size": "8"}, "hidden_size of rule 'compact' must be an integer; got '8'"),
        ("compact", {"output_tanh": "yes"}, "output_tanh of rule 'compact' must be true or false; got 'yes'"),
        ("compact", {"num_layers": True}, "num_layers of rule 'compact' must be an integer; got True"),
        ("compact", {"inputs": 3}, "inputs of rule 'compact' must be a string; got 3"),
        ("compact", {"eps": None}, "eps of rule 'compact' must be a number; got None"),
    ],
)
def test_bad_settings(name, settings, text):
    with pytest.raises(ValueError, match=text):
        rules.get(name, **settings)


def test_settings_override_the_named_ones():
    assert rules.get("rnnprop").settings()["dense_units"] == 20
    got = rules.get("rnnprop", hidden_size=4, output_scale=1).settings()
    assert (got["hidden_size"], got["dense_units"], got["output_scale"]) == (4, 20, 1)
    assert rules.get("lstm").settings() == rules.get("compact").settings()


def test_slice_coordinates_passes_shared_counts_whole():
    tensors = {"a": torch.arange(12.0).view(2, 6), "step": torch.tensor([4.0])}
    got = slice_coordinates(tensors, 2, 5)
    assert got["a"].tolist() == [[2, 3, 4], [8, 9, 10]] and got["step"].tolist() == [4]
