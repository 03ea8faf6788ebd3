"""Traced programs: the same bits as the function, with what does nothing left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

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


def test_leaves_out_products_with_ones_and_splits_into_one_part():
    def function(x, y):
        return torch.ones_like(x) * x.split_with_sizes([3])[0] + y * torch.ones_like(y)

    calls = lambda module: [str(n.target) for n in module.graph.nodes if n.op == "call_function"]  # noqa: E731
    x, y = torch.tensor([1.0, -0.0, math.nan]), torch.tensor([2.0])
    module = make_fx(function)(x, y)
    program._simplify(module)
    assert calls(module) == ["aten.add.Tensor"]
    assert torch.equal(module(x, y)[:2], torch.tensor([3.0, 2.0])) and module(x, y)[2].isnan()


def test_products_that_change_the_shape_and_splits_into_parts_stay():
    def function(x, y):
        first, second = x.split_with_sizes([1, 2])
        return torch.ones(2) * first + second * torch.tensor([1.0, 2.0]) * y

    x, y = torch.tensor([1.0, 3.0, 5.0]), torch.tensor(2.0)
    module = make_fx(function)(x, y)
    program._simplify(module)
    assert module(x, y).tolist() == [7.0, 21.0]


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


@pytest.fixture
def routes(monkeypatch):
    """What runs every function that is traced: TorchScript, or None for Python."""
    found, plain = [], program._interpreted

    def watched(module, flat):
        found.append(plain(module, flat))
        return found[-1]

    monkeypatch.setattr(program, "_interpreted", watched)
    return found


def is_script(route):
    return isinstance(route, torch.jit.ScriptModule)


def network(params, task, batch):
    hidden = torch.tanh(task["matrix"] * params["x"] + batch["noise"][:, None])
    scores = F.gelu(hidden @ params["x"].view(2, 2).repeat(2, 2)) @ task["matrix"].T
    rows = scores[torch.tensor([2, 0, 0])]
    return F.cross_entropy(rows, torch.tensor([1, 2, 0])) + rows.var() * task["target"].sigmoid().mean()


@pytest.mark.parametrize("function", [bowl, network])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchscript_computes_the_bits_of_the_list(function, dtype, routes):
    together = vmap(grad_and_value(function))

    def given(seed):
        return [{n: v.to(dtype) for n, v in values.items()} for values in arguments(seed)]

    traced = program.trace(together, tuple(given(0)))
    assert len(routes) == 1 and is_script(routes[0])
    for seed in range(8):
        (grads, losses), (want_grads, want_losses) = traced(*given(seed)), together(*given(seed))
        assert losses.dtype == dtype and torch.equal(losses, want_losses)
        assert torch.equal(grads["x"], want_grads["x"])


@pytest.mark.parametrize("name", ["native_layer_norm_backward", "convolution_backward"])
def test_what_torchscript_cannot_take_is_left_to_python(name, routes):
    def function(x, weight):
        if name == "convolution_backward":
            return grad(lambda w: F.conv2d(x.view(1, 1, 3, 4), w.view(1, 1, 2, 2)).pow(3).sum())(weight)
        return grad(lambda x: F.layer_norm(x, (4,), weight, None).pow(3).sum())(x)

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)
    traced = program.trace(function, (x, weight))
    assert name in make_fx(function)(x, weight).code
    assert routes == [None]
    assert torch.equal(traced(x + 1, weight), function(x + 1, weight))


def test_what_is_not_the_same_twice_is_left_to_python(routes):
    traced = program.trace(lambda x: x + torch.rand_like(x), (torch.zeros(3),))
    assert routes == [None] and not torch.equal(traced(torch.zeros(3)), traced(torch.zeros(3)))


def test_tensors_elsewhere_are_left_to_python(routes):
    traced = program.trace(lambda x: x * 2, (torch.ones(3, device="meta"),))
    assert routes == [None] and traced(torch.ones(3, device="meta")).shape == (3,)


def test_numbers_that_are_not_finite_are_no_reason_to_leave_it_to_python(routes):
    def function(x):
        return {"log": x.log(), "ratio": 1 / x, "whole": x.argmax(0), "some": x > 0}

    x = torch.tensor([-1.0, 0.0, 2.0])
    traced = program.trace(function, (x,))
    assert is_script(routes[0])
    for values in (x, x.flip(0)):
        got, want = traced(values), function(values)
        assert all(torch.equal(got[n].double().nan_to_num(7.0), v.double().nan_to_num(7.0)) for n, v in want.items())
        assert got.keys() == want.keys() and all(got[n].dtype == v.dtype for n, v in want.items())


def test_what_counts_as_the_same():
    nan, one = torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0])
    assert program._equal([nan, one], [nan.clone(), one.clone()])
    assert not program._equal([nan], [one]) and not program._equal([one], [one + 1e-7])
    assert not program._equal([torch.tensor([math.inf])], [torch.tensor([torch.finfo(torch.float32).max])])
    assert not program._equal([one], [one, one]) and not program._equal([one[:1]], [one[:1].expand(2)])


def test_another_traced_program_may_run_in_between():
    first = program.trace(vmap(grad_and_value(bowl)), arguments(0))
    second = program.trace(vmap(grad_and_value(network)), arguments(0))
    kept = first(*arguments(1))
    copied = kept[0]["x"].clone()
    second(*arguments(2))
    first(*arguments(2))
    assert torch.equal(kept[0]["x"], copied)  # results have memory of their own
