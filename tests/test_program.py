"""Traced programs: the same bits as the function, with what does nothing left out."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from learned_opt import program


def bowl(params, task, batch):
    residual = task["matrix"] @ params["x"] - task["target"] + batch["noise"]
    return residual.pow(2).sum() + torch.logsumexp(params["x"], 0)


def arguments(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"x": draw(5, 4)}, {"matrix": draw(5, 3, 4), "target": draw(5, 3)}, {"noise": draw(5, 3)}


def test_same_bits_on_other_values_and_nested_results():
    function = vmap(grad_and_value(bowl))
    traced = program.trace(function, arguments(0))
    for seed in (0, 1):
        (grads, losses), (want_grads, want_losses) = traced(*arguments(seed)), function(*arguments(seed))
        assert torch.equal(losses, want_losses) and torch.equal(grads["x"], want_grads["x"])


def test_leaves_out_what_does_nothing():
    def function(x):
        ones = torch.ones_like(x)
        return (x.view(3, 4).expand(3, 4).pow(1.0) * (ones / 4)).sum()

    calls = lambda module: [n for n in module.graph.nodes if n.op == "call_function"]  # noqa: E731
    x = torch.arange(12.0).view(3, 4)
    plain = make_fx(function)(x)
    module = make_fx(function)(x)
    program._simplify(module)
    assert len(calls(plain)) >= 5
    assert [str(n.target) for n in calls(module)] == ["aten.mul.Tensor", "aten.sum.default"]
    assert torch.equal(module(x), function(x)) and float(module(x)) == pytest.approx(66 / 4)


def test_a_view_with_other_strides_stays():
    def function(x):
        return x.t().reshape(12) * 2

    x = torch.arange(12.0).view(3, 4)
    traced = program.trace(function, (x,))
    assert torch.equal(traced(x), x.t().reshape(12) * 2)


def test_zeros_that_are_written_into_are_fresh_each_time():
    def function(x):
        return x.new_zeros(4).index_put((torch.tensor([1]),), x[:1], accumulate=True)

    traced = program.trace(function, (torch.ones(2),))
    for value in (3.0, 5.0):
        assert traced(torch.full((2,), value)).tolist() == [0.0, value, 0.0, 0.0]
