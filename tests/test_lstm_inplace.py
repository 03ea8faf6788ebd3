"""Steps of the LSTM rules in plain torch, written over the state, against the rules themselves."""

import pytest
import torch

from learned_opt import rules
from learned_opt.rules import UpdateRule, lstm_inplace, lstm_tape
from learned_opt.rules.inplace import keeper
from learned_opt.rules.lstm_inplace import LSTMSteps
from learned_opt.rules.lstm_kept import KeptSteps

VARIANTS = {
    "two layers": ("rnnprop", {"dense_units": 0}),
    "dense": ("rnnprop", {"hidden_size": 5, "dense_units": 3}),
    "log and sign": ("l2l", {"hidden_size": 4}),
    "dense, log and sign": ("lstm", {"inputs": "log_and_sign", "dense_units": 3, "output_tanh": False}),
}


@pytest.fixture(params=list(VARIANTS))
def rule(request):
    name, settings = VARIANTS[request.param]
    return rules.get(name, **settings)


@pytest.fixture
def narrow(monkeypatch):
    """Blocks of at most 100 coordinates, so that small numbers of them are cut into several parts."""
    monkeypatch.setattr(lstm_inplace, "fitting_chunk", lambda rule: 200)


def random_theta(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(v.shape, generator=generator).double() / 2 for n, v in rule.init_theta(generator).items()}


def three_steps(rule, thetas, per_set, count):
    """(Found, wanted) updates and state: all sets together, and each set's own by the rule's definition."""
    n, generator = per_set * len(thetas), torch.Generator().manual_seed(3)
    state = rule.init_state(n, dtype=torch.float64)
    if "step" in state and count == "shared":
        state["step"] = torch.zeros(1, dtype=torch.float64)
    alone = [rule.init_state(per_set, dtype=torch.float64) for _ in thetas]
    stacked = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    steps = LSTMSteps(rule, stacked, len(thetas)) if len(thetas) > 1 else LSTMSteps(rule, thetas[0])
    for _ in range(3):
        grads = torch.randn(n, generator=generator).double()
        grads[:1] = 0.0
        update = steps(grads, state)
        if "step" in state:
            state["step"] += 1
        for k, theta in enumerate(thetas):
            part = slice(k * per_set, (k + 1) * per_set)
            want, alone[k] = rule.update(theta, grads[part], torch.zeros(per_set).double(), alone[k])
            yield update[part], want
            yield from ((state[name][..., part], value) for name, value in alone[k].items() if name != "step")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("count", ["shared", "own"])
@pytest.mark.parametrize("n", [1, 99, 511, 512, 800, 2403])
def test_one_optimizer(rule, n, count):
    for found, want in three_steps(rule, [random_theta(rule, 0)], n, count):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("per_set", [1, 40, 100, 101, 900])
def test_several_side_by_side(rule, per_set):
    for found, want in three_steps(rule, [random_theta(rule, seed) for seed in range(11)], per_set, "own"):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-13)


def test_nothing_to_do(rule):
    steps = LSTMSteps(rule, random_theta(rule, 0))
    assert steps(torch.zeros(0).double(), rule.init_state(0, dtype=torch.float64)).shape == (0,)


@pytest.mark.usefixtures("narrow")
def test_parts_of_one_size_share_their_buffers(rule):
    parts = LSTMSteps(rule, random_theta(rule, 0))._cut(2403)
    assert [part.stop - part.start for part, _ in parts] == [600, 600, 600, 600, 3]
    assert len({id(step) for _, step in parts}) == 2


def test_its_memory_is_its_own(rule):
    """What a step returns does not change with the next one, nor does it depend on the size of the one before."""
    theta, generator = random_theta(rule, 0), torch.Generator().manual_seed(1)
    steps, grads = LSTMSteps(rule, theta), torch.randn(700, generator=generator).double()
    first = steps(grads, rule.init_state(700, dtype=torch.float64))
    kept = first.clone()
    steps(grads[:30], rule.init_state(30, dtype=torch.float64))
    again = steps(grads, rule.init_state(700, dtype=torch.float64))
    assert torch.equal(first, kept) and torch.equal(again, kept)


# --- steps that are kept for the way back ---


@pytest.fixture
def tapes(monkeypatch):
    """The thread's tapes, none of them from another test; blocks from 10 coordinates on, so that few make several."""
    monkeypatch.setattr(lstm_tape, "_LEAST", 10)
    monkeypatch.setattr(lstm_tape._kept, "tapes", {})
    return lstm_tape._kept.tapes


def gradients(n, seed=3, num_steps=4):
    grads = torch.randn(num_steps, n, generator=torch.Generator().manual_seed(seed)).double()
    grads[:, :1] = 0.0  # never moves
    grads[:2, -1:] = 0.0  # moves late
    return grads


def begun(rule, theta, n, count):
    """The state after two steps."""
    state = rule.init_state(n, dtype=torch.float64)
    for grad in gradients(n, seed=1, num_steps=2):
        _, state = rule.update(theta, grad, torch.zeros(n).double(), state)
    if "step" in state and count == "shared":
        state["step"] = state["step"][:1].clone()
    return state


@pytest.mark.parametrize("count", ["shared", "own"])
@pytest.mark.parametrize(("n", "num_blocks"), [(1, 1), (19, 1), (20, 2), (83, 1), (240, 8)])
def test_kept_steps(rule, tapes, n, num_blocks, count):
    """They are the rule's own, leave its state, and go back as autograd does; twice, in the same memory."""
    theta = random_theta(rule, 0)
    for seed in (3, 4):
        before, grads, loss_grads = begun(rule, theta, n, count), gradients(n, seed), gradients(n, seed=5 + seed)
        kept = KeptSteps(rule, theta, n, len(grads))
        assert kept._tape.num_blocks == num_blocks
        state, want = {name: value.clone() for name, value in before.items()}, before
        for step, grad in enumerate(grads):
            update, state = kept.step(grad, torch.zeros(n).double(), state, step > 0)
            want_update, want = rule.update(theta, grad, torch.zeros(n).double(), want)
            torch.testing.assert_close(update, want_update, rtol=1e-10, atol=1e-13)
        for name, value in want.items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-13)
        again = begun(rule, theta, n, count)
        assert all(torch.equal(before[name], value) for name, value in again.items())
        found = kept.backward(loss_grads)
        reference = UpdateRule.backward(rule, theta, grads, torch.zeros(n).double(), before, loss_grads)
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11 * max(1.0, float(value.abs().max())))
        assert tapes[torch.float64] is kept._tape


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("left_out", [(), (0, 3, 39)])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_kept_steps_go_back_one_by_one(rule, num_steps, left_out):
    """As autograd does, with cotangents of their own for every step; what is left out may be anything."""
    n, theta = 40, random_theta(rule, 0)
    before, grads, params = begun(rule, theta, n, "own"), gradients(n, num_steps=num_steps), torch.zeros(n).double()
    generator = torch.Generator().manual_seed(7)
    d_update = torch.randn(num_steps, n, generator=generator).double()
    d_end = {name: torch.randn(value.shape, generator=generator).double() for name, value in before.items()}
    columns = torch.zeros(n, dtype=torch.bool)
    columns[list(left_out)] = True
    bad = grads.clone()
    bad[:, columns] = torch.nan
    kept = KeptSteps(rule, theta, n, num_steps)
    state, plain, states = before, before, []
    for step in range(num_steps):
        _, state = kept.step(bad[step], params, state, False)
        states.append(plain)
        _, plain = rule.update(theta, grads[step], params, plain)
    kept.leave_out(columns)
    d_update[:, columns] = 0.0
    for value in d_end.values():
        value[..., columns] = 0.0
    d_state, want_state = dict(d_end), d_end
    want_theta = {name: torch.zeros_like(value) for name, value in theta.items()}
    for step in reversed(range(num_steps)):
        d_grads, d_state = kept.vjp(step, grads[step], states[step], d_update[step], d_state)
        part, want_grads, _, want_state = UpdateRule.vjp(
            rule, theta, grads[step], params, states[step], d_update[step], want_state
        )
        for name, value in part.items():
            want_theta[name] += value
        torch.testing.assert_close(d_grads, want_grads, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert d_state.keys() == want_state.keys()
    for name, value in want_state.items():
        torch.testing.assert_close(d_state[name], value, rtol=1e-9, atol=1e-11, equal_nan=True)
    found = kept.finish()
    assert found.keys() == theta.keys()
    for name, value in want_theta.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11 * max(1.0, float(value.abs().max())))


@pytest.mark.usefixtures("tapes")
def test_several_blocks_go_back_as_autograd_does(rule):
    """By a replay, and through one step."""
    n, theta = 240, random_theta(rule, 0)
    state, grads, loss_grads = begun(rule, theta, n, "own"), gradients(n), gradients(n, seed=5)
    params = torch.zeros(n).double()
    found = rule.backward(theta, grads, params, state, loss_grads)
    for name, value in UpdateRule.backward(rule, theta, grads, params, state, loss_grads).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11 * max(1.0, float(value.abs().max())))
    generator = torch.Generator().manual_seed(7)
    d_state = {name: torch.randn(value.shape, generator=generator).double() for name, value in state.items()}
    want = UpdateRule.vjp(rule, theta, grads[1], params, state, loss_grads[0], d_state)
    copied = {name: value.clone() for name, value in d_state.items()}
    for one, other in zip(rule.vjp(theta, grads[1], params, state, loss_grads[0], copied), want):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_a_lent_tape_is_nobody_elses(tapes):
    network, like = rules.get("rnnprop", dense_units=0).network, torch.zeros(0)
    first, second = (lstm_tape.lend(network, like, 5, 40) for _ in range(2))
    assert first.memory.data_ptr() != second.memory.data_ptr()
    lstm_tape.give_back(first)
    lstm_tape.give_back(second)
    assert len(tapes) == 1
    smaller = lstm_tape.lend(network, like, 5, 20)
    assert smaller.memory is second.memory and not tapes
    lstm_tape.give_back(smaller)
    larger = lstm_tape.lend(network, like, 5, 60)
    assert len(larger.memory) > len(smaller.memory) and not tapes
    assert all((joined[:, :, -1] == 1).all() for joined in (*smaller.joined, *larger.joined))


@pytest.mark.parametrize("num_steps", [1, 20])
def test_what_is_kept_is_within_its_budget(monkeypatch, rule, num_steps):
    monkeypatch.setattr(lstm_tape, "KEPT_NUMBERS", 2**22)
    theta = random_theta(rule, 0)
    most = rule.network.most_coordinates(num_steps)
    assert 0.95 * 2**22 < lstm_tape.Tape.numbers(rule.network, num_steps, 8, most // 8) <= 2**22 + 2**10
    found = keeper(rule, theta, most, num_steps)
    assert found is not None
    found.give_back()
    assert keeper(rule, theta, most + 1, num_steps) is None
    assert keeper(rules.get("adam"), {}, 1, num_steps) is None
