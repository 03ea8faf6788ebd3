"""Sharded parameters (DTensor): on one rank in this process, and on two where a rule is told of whole tensors.

Checkpoints of more ranks are in tests/integrations/.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch.distributed as dist
import torchrun
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


# Every rank holds parts of the parameters, some of them empty, and compares with the whole. A second group has nothing
# on the second rank at all, and still the first one waits for it.
RANKS = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from learned_opt import LearnedOptimizer
from optimizer_cases import artifact_of

torch.set_num_threads(1)
dist.init_process_group("gloo")
line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator)


def strided(value):  # what sharding along two dimensions of a mesh at once makes; by hand, here along one
    part = value.tensor_split(2)[dist.get_rank()].clone()
    placements = [Replicate(), _StridedShard(0, split_factor=1)]
    return DTensor.from_local(part, grid, placements, run_check=False, shape=value.shape, stride=value.stride())


ways = {
    "rows": ((5, 4), lambda value: distribute_tensor(value, line, [Shard(0)])),
    "columns": ((3, 4), lambda value: distribute_tensor(value, line, [Shard(1)])),
    "empty on one rank": ((1, 6), lambda value: distribute_tensor(value, line, [Shard(0)])),
    "copied": ((7,), lambda value: distribute_tensor(value, line, [Replicate()])),
    "two dimensions": ((4, 3), lambda value: distribute_tensor(value, grid, [Replicate(), Shard(0)])),
    "strided": ((6, 2), strided),
    "plain": ((3,), lambda value: value),
    "large": ((300, 401), lambda value: distribute_tensor(value, line, [Shard(0)])),
    "single": ((1,), lambda value: distribute_tensor(value, line, [Shard(0)])),
}
values = {name: draw(*shape) for name, (shape, _) in ways.items()}
values["single"] = values["single"].double()
whole = {name: nn.Parameter(value.clone()) for name, value in values.items()}
parts = {name: nn.Parameter(ways[name][1](value)) for name, value in values.items()}
assert (parts["single"].to_local().numel() == 0) == (dist.get_rank() == 1)


def optimizer_of(params):
    first = [param for name, param in params.items() if name not in ("single", "strided")]
    groups = [{"params": first}, {"params": [params["single"], params["strided"]], "lr": 0.5}]
    return LearnedOptimizer(groups, artifact_of(sys.argv[1], **json.loads(sys.argv[3])), chunk_size=int(sys.argv[2]))


optimizers = optimizer_of(whole), optimizer_of(parts)
for step in range(4):
    for name, param in whole.items():
        param.grad = (draw(*param.shape) + 0.2 * step).to(param.dtype)
        parts[name].grad = ways[name][1](param.grad)
    for optimizer in optimizers:
        optimizer.step()
for name, param in whole.items():
    pairs = [(parts[name], param)]
    pairs += [(v, optimizers[0].state[param][key]) for key, v in optimizers[1].state[parts[name]].items()]
    for mine, want in pairs:
        mine = mine.full_tensor() if isinstance(mine, DTensor) and name != "strided" else mine
        if name == "strided" and isinstance(mine, DTensor):
            mine, want = mine.to_local(), want.tensor_split(2)[dist.get_rank()]
        torch.testing.assert_close(mine.detach(), want.detach(), rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("name", "native", "chunk_size", "settings"),
    [
        ("paced", "1", 50000, {}),
        ("turned", "1", 50000, {}),
        ("turned", "1", 50000, {"basis_vectors": 64}),
        ("paced", "0", 5000, {"relative_eps": 0.3}),
        ("compact", "1", 777, {}),
    ],
)
def test_on_two_ranks_a_rule_is_told_of_the_whole_parameter(name, native, chunk_size, settings, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS, encoding="utf-8")
    command = torchrun.command(2, "ranks.py", name, str(chunk_size), json.dumps(settings))
    done = torchrun.run(command, tmp_path, LEARNED_OPT_NATIVE=native)
    assert done.returncode == 0, done.stderr[-3000:]
