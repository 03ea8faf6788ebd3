"""Different learned weights for different groups, their identity in saved state, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from optimizer_cases import RULE_NAMES, artifact_of, assert_same, assert_same_state, copies, loss_of, model_of, train
from torch import nn

from learned_opt import Artifact, LearnedOptimizer, artifact, rules, save_artifact
from learned_opt.blocks import Block
from learned_opt.coordinates import default_chunk_size
from learned_opt.rules.inplace import update_

COMPACT, RNNPROP = artifact_of("compact"), artifact_of("rnnprop")


def matrices_and_biases(model):
    params = list(model.parameters())
    return [p for p in params if p.dim() > 1], [p for p in params if p.dim() == 1]


# Groups by rule.


def test_groups_with_their_own_weights(tmp_path):
    path = tmp_path / "net.safetensors"
    save_artifact(path, RNNPROP.rule, RNNPROP.theta)
    model, reference = model_of(), model_of()
    matrices, biases = matrices_and_biases(model)
    together = LearnedOptimizer(
        [{"params": matrices, "weights": path}, {"params": biases, "weights": "adam", "lr": 2.0}], COMPACT
    )
    matrices, biases = matrices_and_biases(reference)
    apart = [LearnedOptimizer(matrices, RNNPROP), torch.optim.Adam(biases, lr=2e-3)]
    for step in range(4):
        for net in (model, reference):
            net.zero_grad()
            loss_of(net, step).backward()
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_same(model.parameters(), reference.parameters(), exact=False)
    names = [group["weights"].partition("@")[0] for group in together.param_groups]
    assert names == ["net", "adam"]


def test_group_weights_survive_saving_copying_and_adding():
    model, twin = model_of(), model_of()

    def build(net):
        matrices, biases = matrices_and_biases(net)
        optimizer = LearnedOptimizer(matrices, RNNPROP)
        optimizer.add_param_group({"params": biases, "weights": COMPACT})
        return optimizer

    optimizer, other = build(model), build(twin)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    third, third_optimizer = copy.deepcopy((model, optimizer))
    for net, each in ((model, optimizer), (twin, other), (third, third_optimizer)):
        train(net, each, 3, start=3)
        assert_same(model.parameters(), net.parameters())
        assert_same_state(optimizer.state_dict(), each.state_dict())


def test_group_written_over_with_a_path_still_works(tmp_path):
    # ZeroRedundancyOptimizer copies the groups as the user wrote them over those of the optimizer inside.
    path = tmp_path / "net.safetensors"
    save_artifact(path, RNNPROP.rule, RNNPROP.theta)
    model, reference = model_of(), model_of()
    optimizer = LearnedOptimizer(model.parameters(), RNNPROP)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["weights"] = str(path)
    train(model, optimizer, 1, start=1)
    train(reference, LearnedOptimizer(reference.parameters(), RNNPROP), 2)
    assert_same(model.parameters(), reference.parameters())


# Identity.


def test_name_and_hash_travel_in_the_state():
    optimizer = LearnedOptimizer(model_of().parameters(), COMPACT)
    assert optimizer.state_dict()["param_groups"][0]["weights"] == f"compact@{COMPACT.hash[:16]}"


def assert_refused(optimizer, model, load, message):
    before, state = copies(model.parameters()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        load()
    assert_same(before, model.parameters())
    assert_same_state(state, optimizer.state_dict())


def test_state_of_other_weights_is_refused():
    model, other = model_of(), model_of()
    theirs = LearnedOptimizer(other.parameters(), artifact_of("compact", seed=1), lr=0.5)
    train(other, theirs, 1)
    optimizer = LearnedOptimizer(model.parameters(), COMPACT)
    train(model, optimizer, 1)
    assert_refused(
        optimizer,
        model,
        lambda: optimizer.load_state_dict(theirs.state_dict()),
        r"saved under the learned weights compact@\w{16}, but the optimizer runs compact@\w{16}; build it",
    )


def test_state_of_the_same_weights_under_another_name_is_taken():
    model = model_of()
    renamed = Artifact.of(COMPACT.rule, COMPACT.theta, name="renamed")
    theirs = LearnedOptimizer(model.parameters(), renamed)
    train(model, theirs, 1)
    optimizer = LearnedOptimizer(model.parameters(), COMPACT)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["weights"] == COMPACT.identity
    train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("cell.0.2"), "the state of parameter 0 has no 'cell.0.2': it was saved by another optimizer"),
        (lambda s: s.update(exp_avg=torch.zeros(4, 3)), "has 'exp_avg', which these weights do not keep"),
        (
            lambda s: s.update(m=torch.zeros(3, 4)),
            r"'m' of parameter 0 must be .* \(4, 3\); got \(3, 4\): it belongs to",
        ),
        (lambda s: s.update(m=3.0), r"'m' of parameter 0 must be a tensor .*; got 3.0"),
    ],
)
def test_state_of_another_model_or_optimizer_is_refused(change, message):
    model = model_of()
    optimizer = LearnedOptimizer(model.parameters(), COMPACT)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    change(saved["state"][0])
    assert_refused(optimizer, model, lambda: optimizer.load_state_dict(saved), message)


def test_state_of_adam_is_refused():
    model = model_of()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, 1)
    optimizer = LearnedOptimizer(model.parameters(), COMPACT)
    assert_refused(
        optimizer, model, lambda: optimizer.load_state_dict(adam.state_dict()), "parameter 0 has no 'hidden.0.0'"
    )


@pytest.mark.parametrize(
    "groups", [lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}], lambda m: m[0].parameters()]
)
def test_state_of_other_groups_is_refused(groups):
    model = model_of()
    optimizer = LearnedOptimizer(model.parameters(), COMPACT)
    train(model, optimizer, 1)
    other = LearnedOptimizer(groups(model), COMPACT)
    assert_refused(optimizer, model, lambda: optimizer.load_state_dict(other.state_dict()), "parameter group")


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number, at least 0; got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number, at least 0; got nan"),
        ({"lr": "fast"}, "lr must be a finite number, at least 0; got 'fast'"),
        ({"lr": torch.tensor([1.0, 2.0])}, r"a tensor lr must have one element; got shape \(2,\)"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number, at least 0; got -0.1"),
        ({"maximize": 1}, "maximize must be True or False; got 1"),
        ({"state_dtype": torch.int8}, "state_dtype must be None or one of torch.bfloat16, .*; got torch.int8"),
        ({"chunk_size": 0}, "chunk_size must be None or a number of coordinates, at least 1; got 0"),
        ({"chunk_size": True}, "chunk_size must be None or a number of coordinates, at least 1; got True"),
        ({"chunk_size": 2.0}, "chunk_size must be None or a number of coordinates, at least 1; got 2.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(model_of().parameters(), COMPACT, **arguments)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_groups_are_checked_too(key):
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(1))], COMPACT)
    with pytest.raises(ValueError, match=f"{key} must be a finite number, at least 0; got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], key: -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (
            torch.ones(2, dtype=torch.complex64),
            "is torch.complex64; parameters must be one of .*; pass torch.view_as_real",
        ),
        (torch.ones(2, dtype=torch.int64), "is torch.int64; parameters must be one of torch.float16, torch.bfloat16"),
        (torch.ones(2, 2).to_sparse(), "has layout torch.sparse_coo; parameters must be dense"),
    ],
)
def test_parameters_that_cannot_be_trained(param, message):
    good = nn.Parameter(torch.ones(1))
    optimizer = LearnedOptimizer([good], COMPACT)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_torch_checks_the_rest():
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError):
        LearnedOptimizer(param, COMPACT)
    with pytest.raises(ValueError, match="empty parameter list"):
        LearnedOptimizer([], COMPACT)
    with pytest.raises(ValueError, match="more than one parameter group"):
        LearnedOptimizer([{"params": [param]}, {"params": [param]}], COMPACT)
    with pytest.raises(ValueError, match="non-leaf"):
        LearnedOptimizer([param * 2], COMPACT)


def test_default_weights_are_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match="the weights 'compact' are neither a file nor a shipped optimizer"):
        LearnedOptimizer(model_of().parameters())
    save_artifact(tmp_path / "compact.safetensors", COMPACT.rule, COMPACT.theta)
    assert LearnedOptimizer(model_of().parameters()).param_groups[0]["weights"] == COMPACT.identity


# Chunks, blocks, threads: none of them shows in the numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.usefixtures("kernels")
def test_in_place_step_is_the_pure_one(name, dtype):
    made = artifact_of(name)
    theta = {n: v.to(dtype) for n, v in made.theta.items()}
    generator = torch.Generator().manual_seed(0)
    state = made.rule.init_state(9, dtype=dtype)
    mine = {n: v.clone() for n, v in state.items()}
    scratch: dict[str, torch.Tensor] = {}
    for step in range(5):
        grads = torch.randn(9, generator=generator).to(dtype) * 10.0 ** (step - 2)
        grads[3] = 0.0
        params = torch.randn(9, generator=generator).to(dtype)
        want, state = made.rule.update(theta, grads, params, state)
        got = update_(made.rule, theta, grads, params, mine, scratch)
        if "step" in mine:
            mine["step"] += 1
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
        torch.testing.assert_close(got, want, **tolerance)
        torch.testing.assert_close(mine, state, **tolerance)
        assert got[3] == 0


@pytest.mark.parametrize("name", RULE_NAMES)
def test_threads_change_nothing(name):
    params = []
    num_threads = torch.get_num_threads()
    for threads in (1, 3):
        param = nn.Parameter(torch.linspace(-1, 1, 100))
        optimizer = LearnedOptimizer([param], artifact_of(name), chunk_size=7)
        torch.set_num_threads(threads)
        try:
            for step in range(3):
                param.grad = torch.linspace(1, -2, 100) * (step + 1)
                optimizer.step()
        finally:
            torch.set_num_threads(num_threads)
        params.append(param)
    assert_same(params[:1], params[1:], exact=False, rtol=1e-6)


def test_state_shares_a_block_while_training_and_is_separate_when_saved():
    model = model_of()
    optimizer = LearnedOptimizer(model.parameters(), COMPACT)
    train(model, optimizer, 2)

    def num_storages():
        rows = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        return len({row.untyped_storage().data_ptr() for row in rows}), len(rows)

    assert num_storages() == (1, 4 * 18)
    saved = optimizer.state_dict()
    assert num_storages() == (72, 72)
    # A pickled view would carry its whole block: 72 times the state's 26 · 18 · 4 bytes.
    assert len(pickle.dumps(saved)) < 72 * 26 * 18 * 4 / 2
    train(model, optimizer, 1, start=2)
    assert num_storages() == (1, 72)


def test_state_that_somebody_replaces_or_changes_is_used():
    models = [model_of() for _ in range(3)]
    optimizers = [LearnedOptimizer(m.parameters(), COMPACT) for m in models]
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 2)
    for param in models[0].parameters():
        optimizers[0].state[param]["m"] = optimizers[0].state[param]["m"] * 2  # a new tensor
    for param in models[1].parameters():
        optimizers[1].state[param]["m"].mul_(2)  # in place
    for param in models[2].parameters():
        optimizers[2].state[param]["m"].data = optimizers[2].state[param]["m"].data * 2  # as offloading does
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 2, start=2)
    reference = model_of()
    train(reference, LearnedOptimizer(reference.parameters(), COMPACT), 4)
    assert_same(models[0].parameters(), models[1].parameters())
    assert_same(models[0].parameters(), models[2].parameters())
    assert not torch.equal(models[0][0].weight, reference[0].weight)


def test_blocks_follow_which_parameters_have_gradients():
    model, reference = model_of(), model_of()
    together = LearnedOptimizer(model.parameters(), COMPACT)
    apart = [LearnedOptimizer([p], COMPACT) for p in reference.parameters()]
    for step in range(6):
        for net in (model, reference):
            net.zero_grad()
            loss_of(net, step).backward()
            list(net.parameters())[step % 4].grad = None
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_same(model.parameters(), reference.parameters(), exact=False)


def test_block_packs_what_it_is_given():
    params = [torch.zeros(2, 2), torch.zeros(3)]
    states = [{"a": torch.arange(4.0).view(2, 2), "b": torch.ones(2, 2)}, {"a": torch.arange(3.0), "b": torch.zeros(3)}]
    block = Block(params, states, ["a", "b"])
    assert block.rows.tolist() == [[0, 1, 2, 3, 0, 1, 2], [1, 1, 1, 1, 0, 0, 0]]
    assert block.holds(params, states, ["a", "b"]) and not block.holds(params[::-1], states[::-1], ["a", "b"])


def test_block_knows_state_that_was_replaced():
    params = [torch.zeros(2, 2), torch.zeros(3)]
    states = [{key: torch.ones_like(param) for key in "ab"} for param in params]
    block = Block(params, states, ["a", "b"])
    assert not block.holds(params, states, ["a"])
    view = states[1]["b"]
    states[1]["b"] = view.clone()
    assert not block.holds(params, states, ["a", "b"])
    states[1]["b"] = view
    assert block.holds(params, states, ["a", "b"])
    view.data = torch.ones(3)
    assert not block.holds(params, states, ["a", "b"])
    states[1].pop("b")
    assert not block.holds(params, states, ["a", "b"])


def test_default_chunk_size_shrinks_with_the_rule():
    sizes = [default_chunk_size(rules.get(name).rows_per_coordinate) for name in ("adam", "compact", "rnnprop")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= 65536 and sizes[-1] >= 1024
