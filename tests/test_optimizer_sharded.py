"""Sharded parameters (DTensor), on one rank in this process; more ranks are in tests/integrations/."""

from __future__ import annotations

import copy

import pytest
import torch.distributed as dist
from optimizer_cases import RULE_NAMES, artifact_of, assert_same, assert_same_state, copies, loss_of, model_of, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from learned_opt import LearnedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.distributed's own


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh, seed=0):
    model = model_of(seed)
    fully_shard(model, mesh=mesh)
    return model


def whole(params):
    return [param.full_tensor() for param in params]


@pytest.mark.parametrize("name", RULE_NAMES)
def test_sharded_parameters_train_alike(name, mesh):
    model, reference = sharded(mesh), model_of()
    optimizer = LearnedOptimizer(model.parameters(), artifact_of(name))
    train(model, optimizer, 3)
    train(reference, LearnedOptimizer(reference.parameters(), artifact_of(name)), 3)
    assert_same(whole(model.parameters()), reference.parameters(), exact=False)
    for param, state in optimizer.state.items():
        assert all(isinstance(v, DTensor) and v.placements == param.placements for k, v in state.items() if k != "step")


@pytest.mark.parametrize("options", [StateDictOptions(), StateDictOptions(full_state_dict=True)])
def test_resume_of_sharded_parameters(mesh, options):
    model, again = sharded(mesh), sharded(mesh, seed=1)
    optimizer, resumed = (LearnedOptimizer(m.parameters(), artifact_of("compact")) for m in (model, again))
    train(model, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    set_optimizer_state_dict(again, resumed, saved, options=options)
    train(model, optimizer, 3, start=3)
    train(again, resumed, 3, start=3)
    assert_same(whole(model.parameters()), whole(again.parameters()))


def test_dummy_step_of_a_checkpoint_leaves_no_trace(mesh):
    model, reference = sharded(mesh), sharded(mesh)
    optimizer, undisturbed = (LearnedOptimizer(m.parameters(), artifact_of("rnnprop")) for m in (model, reference))
    before = copies(whole(model.parameters()))
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    assert_same(before, whole(model.parameters()))
    train(model, optimizer, 2)
    train(reference, undisturbed, 2)
    assert_same(whole(model.parameters()), whole(reference.parameters()))


def test_plain_state_for_sharded_parameters_is_refused(mesh):
    model, plain = sharded(mesh), model_of()
    optimizer, other = (LearnedOptimizer(m.parameters(), artifact_of("compact")) for m in (model, plain))
    train(model, optimizer, 1)
    train(plain, other, 1)
    with pytest.raises(
        ValueError, match=r"parameter 0 and its state must both be sharded \(DTensor\) or both be plain"
    ):
        optimizer.load_state_dict(other.state_dict())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="set_optimizer_state_dict"):
        other.load_state_dict(optimizer.state_dict())
    assert_same_state(before, other.state_dict())


def test_guard_refuses_sharded_parameters(mesh):
    model = sharded(mesh)
    optimizer = LearnedOptimizer(model.parameters(), artifact_of("compact"), guard=True)
    loss_of(model).backward()
    before = copies(whole(model.parameters()))
    with pytest.raises(ValueError, match=r"the guard does not support sharded parameters \(DTensor\)"):
        optimizer.step()
    assert_same(before, whole(model.parameters()))
    assert not optimizer.state
