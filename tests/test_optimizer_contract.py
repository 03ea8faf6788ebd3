"""What every trainer expects of a torch.optim optimizer, for every update rule."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from optimizer_cases import (
    LSTM_NAMES,
    RULE_NAMES,
    artifact_of,
    assert_same,
    assert_same_state,
    copies,
    loss_of,
    model_of,
    train,
)
from rule_cases import bases_by_hand, step_by_hand, update_by_hand
from torch import nn
from torch.optim import lr_scheduler

from learned_opt import LearnedOptimizer, rules
from learned_opt.batched import BatchedFamily
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.rules.kernels import build
from learned_opt.unroll import inner_steps, learned_move
from tasks.quadratic import Quadratic

ARTIFACTS = {name: artifact_of(name) for name in RULE_NAMES}


@pytest.fixture(params=RULE_NAMES)
def make(request):
    """Builds a LearnedOptimizer of each rule in turn."""
    return lambda params, **kwargs: LearnedOptimizer(params, ARTIFACTS[request.param], **kwargs)


def grads_of(model, step=0):
    model.zero_grad()
    loss_of(model, step).backward()


# What it computes.


@pytest.mark.parametrize("chunk_size", [2, 5, 1000, None])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_applies_the_pure_rule(name, chunk_size):
    artifact = ARTIFACTS[name]
    model = model_of(dtype=torch.float64)
    params = list(model.parameters())
    optimizer = LearnedOptimizer(params, artifact, chunk_size=chunk_size)
    theta = {n: v.double() for n, v in artifact.theta.items()}
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    state = artifact.rule.init_state(flat.numel(), dtype=torch.float64)
    shapes = [tuple(p.shape) for p in params]
    bases = bases_by_hand(artifact.rule, shapes)
    for step in range(7):
        grads_of(model, step)
        grads = torch.cat([p.grad.reshape(-1) for p in params])
        update, state = step_by_hand(artifact.rule, theta, grads, flat, state, shapes, bases)
        flat = flat + update
        optimizer.step()
    assert_same([torch.cat([p.reshape(-1) for p in params])], [flat], exact=False, rtol=1e-12, atol=1e-14)
    for key, got in optimizer.state[params[0]].items():
        block, *index = key.split(".")
        if block in state:
            want = state[block][tuple(map(int, index))][: params[0].numel()] if index else state[block][:12]
            want = want[0] if key == "step" else want.view_as(params[0])
            assert_same([got.double()], [want.double()], exact=False, rtol=1e-12, atol=1e-14)


SHAPES = [(3,), (300, 400), (5000,), (1,), (17000,)]


def steps_of(name, *, dtype=torch.float32, guard=False, **kwargs):
    """Parameters and state after some steps on tensors of very different sizes; a few gradients are zero."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = LearnedOptimizer(params, ARTIFACTS[name], guard=guard, **kwargs)
    for _ in range(4):
        for k, param in enumerate(params):
            sizes = torch.logspace(-4, 2, param.numel()).view(param.shape)
            grad = torch.randn(param.shape, generator=generator) * sizes + sizes * (k % 2)
            param.grad = torch.where(grad.abs() < 1e-5, 0.0, grad).to(dtype)
        optimizer.step(**({"loss": 1.0} if guard else {}))
    return params, optimizer.state


@pytest.mark.skipif(build._compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["paced", "compact"])
def test_chunk_size_changes_no_bit(name, dtype, state_dtype):
    want, want_state = steps_of(name, dtype=dtype, state_dtype=state_dtype)
    for settings in ({"chunk_size": 777}, {"chunk_size": 30000}, {"chunk_size": 10**6}, {"guard": True}):
        got, got_state = steps_of(name, dtype=dtype, state_dtype=state_dtype, **settings)
        if not settings.get("guard"):
            assert_same(got, want)
        for mine, other in zip(got, want):
            keys = [key for key in want_state[other] if key != "step"]
            assert_same([got_state[mine][key] for key in keys], [want_state[other][key] for key in keys])


@pytest.mark.parametrize("chunk_size", [None, 777, 10**6])
@pytest.mark.usefixtures("kernels")
def test_a_rule_is_told_of_every_parameter_by_itself(chunk_size):
    """In float32, large parameters and small ones that share a chunk, against one tensor at a time in float64."""
    artifact, generator = ARTIFACTS["paced"], torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    sizes, n = [p.numel() for p in params], sum(p.numel() for p in params)
    optimizer = LearnedOptimizer(params, artifact, chunk_size=chunk_size)
    theta = {name: value.double() for name, value in artifact.theta.items()}
    flat, state = torch.zeros(n).double(), artifact.rule.init_state(n, dtype=torch.float64)
    for _ in range(4):
        grads = torch.randn(n, generator=generator) * torch.logspace(-4, 2, n) + 0.01
        for param, grad in zip(params, grads.split(sizes)):
            param.grad = grad.view(param.shape)
        optimizer.step()
        update, state = update_by_hand(artifact.rule, theta, grads.double(), flat, state, sizes)
        flat = flat + update
    got = torch.cat([param.detach().reshape(-1) for param in params]).double()
    torch.testing.assert_close(got, flat, rtol=1e-4, atol=1e-6)
    grown = [optimizer.state[param]["log_size"].double().reshape(-1) for param in params]
    torch.testing.assert_close(torch.cat(grown), state["log_size"], rtol=1e-4, atol=1e-6)
    assert len({round(float(part[0]), 4) for part in grown}) == len(SHAPES)  # each has a pace of its own


@pytest.mark.usefixtures("kernels")
def test_a_gradient_that_is_not_finite_is_kept_from_the_other_coordinates():
    """What a rule is told of a tensor leaves out what is not a number, also under the guard, which then skips."""
    params = [nn.Parameter(torch.ones(40)) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    optimizers = [LearnedOptimizer([param], ARTIFACTS["paced"]) for param in params]
    for step in range(3):
        for param, optimizer in zip(params, optimizers):
            param.grad = torch.randn(40, generator=generator.manual_seed(step))
            param.grad[7] = 0.0
            if step == 1 and param is params[0]:
                param.grad[7] = math.nan
            optimizer.step()
    sound = torch.arange(40) != 7
    assert_same([params[0][sound]], [params[1][sound]])
    assert params[0][7].isnan() and params[0].detach().isnan().sum() == 1


@pytest.mark.parametrize("name", RULE_NAMES)
def test_runs_what_meta_training_ran(name):
    artifact = ARTIFACTS[name]
    batched = BatchedFamily(Quadratic(dim=4), dtype=torch.float64)
    plan = EpisodePlan(split="meta_test", run_seed=1)
    particles = start_particles(batched, artifact.rule, plan, [0])
    weights = {n: v[0] for n, v in particles.tasks.items()}
    param = nn.Parameter(particles.params[0].clone())
    theta = {n: v.double() for n, v in artifact.theta.items()}
    meta = [
        losses[0] for losses, _, _ in inner_steps(batched, particles, 12, learned_move(artifact.rule, theta, particles))
    ]
    optimizer = LearnedOptimizer([param], artifact)

    def loss():
        return (weights["w"] @ param - weights["y"]).square().sum()

    for want in meta:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        assert loss().item() == pytest.approx(want.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("kwargs", "adam_kwargs"),
    [
        ({}, {"lr": 1e-3}),
        ({"lr": 20.0}, {"lr": 2e-2}),
        ({"maximize": True}, {"lr": 1e-3, "maximize": True}),
        ({"weight_decay": 0.01}, {"lr": 1e-3, "weight_decay": 10.0}),
    ],
)
def test_adam_rule_is_torch_adam(kwargs, adam_kwargs):
    ours, theirs = model_of(dtype=torch.float64), model_of(dtype=torch.float64)
    train(ours, LearnedOptimizer(ours.parameters(), "adam", **kwargs), 40)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **{"weight_decay": 0.0, **adam_kwargs}), 40)
    # theta is stored in float32: the learning rate and the betas are those of torch to 1e-7.
    assert_same(ours.parameters(), theirs.parameters(), exact=False, rtol=1e-6, atol=1e-8)


def test_sgd_rule_is_torch_sgd():
    ours, theirs = model_of(), model_of()
    train(ours, LearnedOptimizer(ours.parameters(), ARTIFACTS["sgd"]), 20)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=1e-2), 20)
    assert_same(ours.parameters(), theirs.parameters(), exact=False)


def test_descends_and_ascends(make):
    for maximize in (False, True):
        model = model_of()
        optimizer = make(model.parameters(), maximize=maximize)
        before = loss_of(model).item()
        for _ in range(30):
            grads_of(model)
            optimizer.step()
        assert (loss_of(model).item() > before) == maximize


def test_maximize_is_the_negative_loss(make):
    up, down = model_of(), model_of()
    climbing, descending = make(up.parameters(), maximize=True), make(down.parameters())
    for step in range(4):
        grads_of(up, step)
        climbing.step()
        down.zero_grad()
        (-loss_of(down, step)).backward()
        descending.step()
    assert_same(up.parameters(), down.parameters())


def test_lr_multiplies_the_update(make):
    moves = []
    for lr in (1.0, 0.5, torch.tensor(0.25)):
        model = model_of(dtype=torch.float64)
        before = copies(model.parameters())
        train(model, make(model.parameters(), lr=lr), 1)
        moves.append([(p.detach() - b) / float(lr) for p, b in zip(model.parameters(), before)])
    for other in moves[1:]:
        assert_same(moves[0], other, exact=False, rtol=1e-9, atol=1e-14)


def test_weight_decay_is_decoupled(make):
    plain, decayed = model_of(dtype=torch.float64), model_of(dtype=torch.float64)
    before = copies(plain.parameters())
    train(plain, make(plain.parameters(), lr=0.5), 1)
    train(decayed, make(decayed.parameters(), lr=0.5, weight_decay=0.1), 1)
    want = [p.detach() - 0.05 * b for p, b in zip(plain.parameters(), before)]
    assert_same(decayed.parameters(), want, exact=False, rtol=1e-12, atol=1e-14)


# Which parameters it moves.


def test_zero_gradients_move_nothing(make):
    model = model_of()
    before = copies(model.parameters())
    optimizer = make(model.parameters())
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same(before, model.parameters())


def test_lr_zero_freezes_parameters_and_memory(make):
    frozen, reference = model_of(), model_of()
    with_pause, without = make(frozen.parameters(), weight_decay=0.1), make(reference.parameters(), weight_decay=0.1)
    train(frozen, with_pause, 2)
    train(reference, without, 2)
    before = copy.deepcopy(with_pause.state_dict()["state"])
    with_pause.param_groups[0]["lr"] = 0.0
    train(frozen, with_pause, 2, start=9)
    with_pause.param_groups[0]["lr"] = 1.0
    assert before.keys() == with_pause.state_dict()["state"].keys()
    train(frozen, with_pause, 2, start=2)
    train(reference, without, 2, start=2)
    assert_same(frozen.parameters(), reference.parameters())
    assert_same_state(with_pause.state_dict(), without.state_dict())


def test_missing_gradients_are_skipped(make):
    model = model_of()
    params = list(model.parameters())
    optimizer = make(params)
    before = copies(params)
    optimizer.step()
    assert_same(before, params)
    grads_of(model)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(before[1], params[1]) and not torch.equal(before[0], params[0])
    assert params[1] not in optimizer.state


def test_frozen_layer_thaws(make):
    model = model_of()
    optimizer = make(model.parameters())
    model[2].requires_grad_(False)
    before = copies(model.parameters())
    train(model, optimizer, 2)
    assert torch.equal(before[2], model[2].weight)
    model[2].requires_grad_(True)
    train(model, optimizer, 2, start=2)
    assert not torch.equal(before[2], model[2].weight)
    assert float(optimizer.state[model[2].weight]["step"]) == 2 and float(optimizer.state[model[0].weight]["step"]) == 4


def test_coordinates_with_different_step_counts_share_a_chunk(make):
    model, reference = model_of(dtype=torch.float64), model_of(dtype=torch.float64)
    together = make(model.parameters())
    apart = [make([param]) for param in reference.parameters()]
    for step in range(5):
        for net in (model, reference):
            grads_of(net, step)
            if step < 2:
                net[0].weight.grad = None
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_same(model.parameters(), reference.parameters(), exact=False, rtol=1e-12, atol=1e-14)


def test_tied_parameters_move_once(make):
    left, right = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    right.weight = left.weight
    tied = nn.Sequential(left, right)
    optimizer = make(tied.parameters())
    tied(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert float(optimizer.state[left.weight]["step"]) == 1 and len(optimizer.state) == 1


def test_gradients_and_flags_are_left_alone(make):
    model = model_of()
    optimizer = make(model.parameters(), maximize=True)
    grads_of(model)
    params = list(model.parameters())
    objects, grads, pointers = (
        [p.grad for p in params],
        [p.grad.clone() for p in params],
        [p.data_ptr() for p in params],
    )
    versions = [p._version for p in params]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(params, objects)) and pointers == [p.data_ptr() for p in params]
    assert_same(grads, objects)
    assert all(p.is_leaf and p.requires_grad and p._version > v for p, v in zip(params, versions))
    assert not any(v.requires_grad for state in optimizer.state.values() for v in state.values())


def test_global_random_state_is_not_read(make):
    model = model_of()
    before = torch.get_rng_state()
    train_rng = loss_of(model)
    optimizer = make(model.parameters())
    train_rng.backward()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


# Shapes, dtypes, layouts.


@pytest.mark.parametrize("chunk_size", [4, 4096])
def test_any_shape(make, chunk_size):
    shapes = [(), (0,), (1,), (3, 0), (5,), (2, 3, 2)]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    before = copies(params)
    optimizer = make(params, chunk_size=chunk_size)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    for param, old in zip(params, before):
        assert torch.isfinite(param).all() and (param.numel() == 0 or not torch.equal(param, old))
        assert all(value.shape in (param.shape, ()) for value in optimizer.state[param].values())


def test_memory_layout_does_not_matter(make):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, generator=generator)
    plain, turned, strided = (
        nn.Parameter(t) for t in (values.clone(), values.t().contiguous().t(), torch.zeros(4, 6)[:, ::2])
    )
    with torch.no_grad():
        strided.copy_(values)
    optimizers = [make([param]) for param in (plain, turned, strided)]
    for _ in range(3):
        grad = torch.randn(4, 3, generator=generator)
        for param, optimizer in zip((plain, turned, strided), optimizers):
            param.grad = grad.t().contiguous().t() if param is turned else grad.clone()
            optimizer.step()
    assert_same([plain, plain], [turned, strided])


def test_expanded_gradient(make):
    ours, reference = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    ours.grad, reference.grad = torch.ones(()).expand(3, 2), torch.ones(3, 2)
    make([ours]).step()
    make([reference]).step()
    assert_same([ours], [reference])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_are_rounded_once(make, dtype):
    """State and arithmetic are float32: the result is that of float32 parameters that are rounded after every step."""
    low, high = nn.Parameter(torch.ones(5, dtype=dtype)), nn.Parameter(torch.ones(5))
    optimizers = make([low], weight_decay=0.01), make([high], weight_decay=0.01)
    for step in range(5):
        low.grad = torch.full((5,), 0.5 + step).to(dtype)
        high.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            high.copy_(high.to(dtype).float())
        assert low.dtype == dtype
        assert_same([low.float()], [high])
    assert all(value.dtype == torch.float32 for value in optimizers[0].state[low].values())


def test_mixed_dtypes_in_one_group(make):
    params = [
        nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    ]
    optimizer = make(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        assert (param < 0).all()
    assert_same([params[3].double()], [params[1]], exact=False, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e18])
@pytest.mark.parametrize("name", [n for n in RULE_NAMES if n != "sgd"])
def test_extreme_gradients_stay_finite(name, scale):
    param = nn.Parameter(torch.ones(4))
    optimizer = LearnedOptimizer([param], ARTIFACTS[name])
    for sign in (1, 1, -1):
        param.grad = torch.full((4,), sign * scale)
        optimizer.step()
    assert torch.isfinite(param).all()
    assert all(torch.isfinite(value).all() for value in optimizer.state[param].values())


def test_sparse_gradients_equal_dense_ones(make):
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    nets = [nn.Embedding(6, 3, sparse=sparse, _weight=weight.clone()) for sparse in (True, False)]
    optimizers = [make(net.parameters()) for net in nets]
    for rows in ([1, 1, 4], [2], [1, 5]):
        for net, optimizer in zip(nets, optimizers):
            optimizer.zero_grad()
            net(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
    assert nets[0].weight.grad.is_sparse
    assert_same(nets[0].parameters(), nets[1].parameters())
    assert torch.equal(nets[0].weight[[0, 3]], weight[[0, 3]])


# The closure, modes, hooks.


def test_closure(make):
    model = model_of()
    optimizer = make(model.parameters())
    before, seen = copies(model.parameters()), []

    def closure():
        seen.append((torch.is_grad_enabled(), all(torch.equal(a, b) for a, b in zip(before, model.parameters()))))
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        assert torch.is_tensor(optimizer.step(closure)) and seen == [(True, True)]
        assert torch.is_tensor(optimizer.step(closure=closure))
        assert optimizer.step() is None and not torch.is_grad_enabled()


def test_closure_that_raises_changes_nothing(make):
    model = model_of()
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    before, state = copies(model.parameters()), copy.deepcopy(optimizer.state_dict())

    def closure():
        raise KeyError("no data")

    with pytest.raises(KeyError, match="no data"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_same(before, model.parameters())
    assert_same_state(state, optimizer.state_dict())


def test_autocast_and_default_dtype_change_nothing(make):
    nets = [model_of() for _ in range(3)]
    optimizers = [make(net.parameters()) for net in nets]
    for step in range(3):
        for index, (net, optimizer) in enumerate(zip(nets, optimizers)):
            grads_of(net, step)
            torch.set_default_dtype(torch.float64 if index == 2 else torch.float32)
            try:
                with torch.autocast("cpu", torch.bfloat16, enabled=index == 1):
                    optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)
    assert_same(nets[0].parameters(), nets[1].parameters())
    assert_same(nets[0].parameters(), nets[2].parameters())


def test_grad_scaler_skips_overflow(make):
    model, reference = model_of(), model_of()
    scaled, plain = make(model.parameters()), make(reference.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        scaled.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(scaled)
        scaler.update()
    train(reference, plain, 3)
    assert_same(model.parameters(), reference.parameters())
    before = copies(model.parameters())
    scaled.zero_grad()
    scaler.scale(loss_of(model)).backward()
    model[0].weight.grad[0] = float("inf")
    scaler.step(scaled)
    assert_same(before, model.parameters())


def test_step_hooks_fire_once_and_in_order(make):
    model = model_of()
    optimizer = make(model.parameters())
    log = []
    optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    optimizer.register_step_post_hook(lambda *_: log.append("after"))
    train(model, optimizer, 1)
    assert log == ["before", "after"]


def test_step_in_backward(make):
    model, reference = model_of(), model_of()
    for param in model.parameters():
        optimizer = make([param])
        param.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    loss_of(model).backward()
    train(reference, make(reference.parameters()), 1)
    assert_same(model.parameters(), reference.parameters(), exact=False)


def test_no_train_or_eval_methods(make):
    optimizer = make(model_of().parameters())
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


@pytest.mark.parametrize(
    "build",
    [
        lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=4),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=10, cycle_momentum=False),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
    ],
    ids=["linear", "cosine", "one_cycle", "plateau"],
)
def test_schedulers_give_the_same_lr_as_for_adam(make, build):
    model, other = model_of(), model_of()
    ours, theirs = make(model.parameters()), torch.optim.Adam(other.parameters(), lr=1.0)
    scheduler, reference = build(ours), build(theirs)
    lrs = []
    for step in range(6):
        train(model, ours, 1, start=step)
        theirs.step()
        for each in (scheduler, reference):
            each.step(*([1.0] if isinstance(each, lr_scheduler.ReduceLROnPlateau) else []))
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        lrs.append(ours.param_groups[0]["lr"])
    assert len(set(lrs)) > 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by dynamo, on first use
@pytest.mark.parametrize(
    ("name", "lr"), [("compact", 1.0), ("l2l", 0.5), ("adam", 0.5), ("paced", 0.5), ("turned", 0.5)]
)
def test_compiles_without_a_graph_break(name, lr):
    lr = torch.tensor(lr) if lr != 1 else lr

    def make(params, **kwargs):
        return LearnedOptimizer(params, ARTIFACTS[name], **kwargs)

    torch._dynamo.reset()
    model, reference = model_of(), model_of()
    compiled, eager = (
        make(model.parameters(), lr=lr, weight_decay=0.01),
        make(reference.parameters(), lr=lr, weight_decay=0.01),
    )
    step = torch.compile(lambda: compiled.step(), backend="eager", fullgraph=True)
    for index in range(3):
        grads_of(model, index)
        step()
    train(reference, eager, 3)
    assert_same(model.parameters(), reference.parameters(), exact=False)
    if isinstance(lr, torch.Tensor):
        lr.zero_()
        before, state = copies(model.parameters()), copy.deepcopy(compiled.state_dict())
        step()
        assert_same(before, model.parameters())
        assert_same_state(state, compiled.state_dict())
    torch._dynamo.reset()


# Groups.


def test_two_groups_equal_two_optimizers(make):
    model, reference = model_of(), model_of()
    together = make(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    )
    apart = make(reference[0].parameters(), lr=0.5), make(reference[2].parameters(), weight_decay=0.1)
    for step in range(3):
        for net in (model, reference):
            grads_of(net, step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_same(model.parameters(), reference.parameters())


def test_group_added_in_the_middle(make):
    model, reference = model_of(), model_of()
    optimizer, apart = make(model[0].parameters()), make(reference[0].parameters())
    train(model, optimizer, 2)
    train(reference, apart, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    late = make(reference[2].parameters(), lr=0.1)
    for step in range(2, 4):
        for net in (model, reference):
            grads_of(net, step)
        for each in (optimizer, apart, late):
            each.step()
    assert_same(model.parameters(), reference.parameters(), exact=False)


def test_group_values_are_plain_and_rebuild_the_optimizer(make):
    model = model_of()
    optimizer = make(model.parameters(), lr=0.5)
    assert all(isinstance(v, (int, float, str, bool)) for k, v in optimizer.param_groups[0].items() if k != "params")
    again = type(optimizer)(model.parameters(), **optimizer.defaults)
    assert again.param_groups[0] == optimizer.param_groups[0]


# State.


def test_state_is_lazy_and_of_the_parameters_shape(make):
    model = model_of()
    optimizer = make(model.named_parameters())
    assert optimizer.state_dict()["state"] == {}
    new = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = new  # as accelerate does for FSDP2
    for param in new:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.state) == set(new)
    for param, state in optimizer.state.items():
        assert all(isinstance(v, torch.Tensor) and v.shape in (param.shape, ()) for v in state.values())


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resume_to_the_bit(make, dtype, state_dtype):
    model = model_of(dtype=dtype)
    optimizer = make(model.parameters(), state_dtype=state_dtype)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = model_of(seed=1, dtype=dtype)
    again.load_state_dict(saved["model"])
    resumed = make(again.parameters(), state_dtype=state_dtype)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(optimizer.state_dict(), resumed.state_dict())
    train(model, optimizer, 4, start=4)
    train(again, resumed, 4, start=4)
    assert_same(model.parameters(), again.parameters())
    assert_same_state(optimizer.state_dict(), resumed.state_dict())


def test_loading_copies(make):
    model, other = model_of(), model_of()
    optimizer, sharing = make(model.parameters()), make(other.parameters())
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    sharing.load_state_dict(saved)
    train(other, sharing, 2)
    assert_same_state(kept, optimizer.state_dict())


def test_loading_restores_hyperparameters_and_forgives_missing_ones(make):
    model = model_of()
    optimizer = make(model.parameters(), lr=0.3, weight_decay=0.2)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["maximize"]
    saved["state"][0]["step"] = saved["state"][0]["step"].item()
    other = make(model.parameters())
    other.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), other.state_dict())


def test_state_dict_hooks(make):
    model = model_of()
    optimizer = make(model.parameters())
    train(model, optimizer, 1)
    log = []
    optimizer.register_state_dict_pre_hook(lambda _: log.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda _, __: log.append("second"))

    def replace(_, saved):
        log.append("first")
        saved = copy.deepcopy(saved)
        saved["param_groups"][0]["lr"] = 0.125
        saved["state"][1]["step"] += 5
        return saved

    optimizer.register_load_state_dict_pre_hook(replace, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: log.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert log == ["save", "first", "second", 0.125]
    assert float(optimizer.state[model[0].bias]["step"]) == 6


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_train_alike(make, how):
    model = model_of()
    optimizer = make(model.parameters(), state_dtype=torch.bfloat16, chunk_size=3)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.9)  # wraps the instance's step
    train(model, optimizer, 2)
    scheduler.step()
    twin, twin_optimizer = how((model, optimizer))
    assert twin_optimizer.state_dtype == torch.bfloat16 and twin_optimizer.chunk_size == 3
    train(model, optimizer, 2, start=2)
    train(twin, twin_optimizer, 2, start=2)
    assert_same(model.parameters(), twin.parameters())
    assert_same_state(optimizer.state_dict(), twin_optimizer.state_dict())


def test_moving_average_of_parameters(make):
    model = model_of()
    optimizer = make(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    first = None
    for step in range(2):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
        first = first or copies(model.parameters())
    assert_same(average.module.parameters(), [(a + b) / 2 for a, b in zip(first, model.parameters())], exact=False)


def test_bfloat16_state_halves_memory_and_changes_little():
    for name in LSTM_NAMES:
        nets, num_bytes = [], []
        for state_dtype in (None, torch.bfloat16):
            model = model_of()
            optimizer = LearnedOptimizer(model.parameters(), ARTIFACTS[name], state_dtype=state_dtype)
            train(model, optimizer, 10)
            rows = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
            num_bytes.append(sum(v.numel() * v.element_size() for v in rows))
            nets.append(model)
        assert num_bytes[1] * 2 == num_bytes[0]
        # Ten steps move a coordinate by about 0.2; the rounding of bfloat16 is 2^-8 of that.
        assert_same(nets[0].parameters(), nets[1].parameters(), exact=False, rtol=0, atol=5e-3)


def test_bytes_of_state_a_parameter():
    want = {"compact": 4 * (16 + 2), "rnnprop": 4 * (80 + 2), "l2l": 4 * 80, "adam": 8}
    for name, num_bytes in want.items():
        param = nn.Parameter(torch.ones(100))
        optimizer = LearnedOptimizer([param], ARTIFACTS[name])
        param.grad = torch.ones(100)
        optimizer.step()
        rows = [v for k, v in optimizer.state[param].items() if k != "step"]
        assert sum(v.numel() * v.element_size() for v in rows) == 100 * num_bytes
        assert rules.get(name).rows_per_coordinate * 4 == num_bytes
