"""Steps of the LSTM rules in plain torch, written over the state, against the rules themselves."""

import pytest
import torch

from learned_opt import rules
from learned_opt.rules import lstm_inplace
from learned_opt.rules.lstm_inplace import LSTMSteps

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
