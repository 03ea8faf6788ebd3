"""The batched program against plain autograd one task at a time, and its traced form against itself, bit for bit."""

import copy
import dataclasses
import gc
import math
import weakref
from typing import ClassVar

import pytest
import torch

from learned_opt import batched as batched_module
from learned_opt.batched import BatchedFamily, OneByOneWarning
from learned_opt.task import TaskFamily, draw_batches, draw_task
from tasks.activations import ACTIVATIONS
from tasks.image_mlp import ImageMLP
from tasks.quadratic import CONVENTIONS, Quadratic

FAMILIES = {f"digits_{a}": ImageMLP(hidden=(3, 4), activation=a, batch_size=8, init_scale=0.5) for a in ACTIVATIONS}
FAMILIES |= {f"quadratic_{c}": Quadratic(dim=5, convention=c) for c in CONVENTIONS}
SEEDS = [3, 9, 21]
CALLS_BEFORE_TRACE = batched_module._CALLS_BEFORE_TRACE


def start(family, dtype=torch.float64, seeds=SEEDS, step=2):
    batched = BatchedFamily(copy.deepcopy(family), dtype=dtype)  # of the copy nothing is traced yet
    tasks, params = batched.start("meta_train", seeds)
    batches = batched.batches(tasks, seeds, [step] * len(seeds), 1)
    return batched, tasks, params, {name: value[0] for name, value in batches.items()}


def one_by_one(family, seed, step):
    """Loss and flat gradient of one task, with nothing of the code under test but the naming of tasks."""

    def double(tensors):
        return {n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}

    task, params = draw_task(family, "meta_train", seed)
    batch = {n: v[0] for n, v in draw_batches(family, task, seed, step, 1).items()}
    leaves = {n: v.requires_grad_() for n, v in double(params).items()}
    loss = family.loss(leaves, {**double(task), **double(family.shared_data())}, double(batch))
    loss.backward()
    return loss.detach(), torch.cat([v.grad.reshape(-1) for v in leaves.values()])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_equals_plain_autograd_one_task_at_a_time(name):
    batched, tasks, params, batch = start(FAMILIES[name])
    losses, grads = batched.losses_and_grads(params, tasks, batch)
    assert losses.shape == (3,) and grads.shape == (3, batched.num_parameters)
    assert not losses.requires_grad and not grads.requires_grad
    for i, seed in enumerate(SEEDS):
        loss, grad = one_by_one(FAMILIES[name], seed, 2)
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[i], grad, rtol=1e-10, atol=1e-13)
        assert grad.abs().max() > 0
    torch.testing.assert_close(batched.losses(params, tasks, batch), losses, rtol=1e-13, atol=0)


# A resumed run starts untraced where the uninterrupted one is traced by then: any difference would break its promise.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_traced_equals_untraced_bit_for_bit(name, dtype):
    batched, tasks, params, batch = start(FAMILIES[name], dtype)
    untraced, losses_untraced = batched.losses_and_grads(params, tasks, batch), batched.losses(params, tasks, batch)
    for _ in range(CALLS_BEFORE_TRACE + 2):
        batched.losses_and_grads(params, tasks, batch)
        batched.losses(params, tasks, batch)
    assert len(batched._traced) == 2
    assert all(callable(program) for program in batched._traced.values())
    fresh = BatchedFamily(copy.deepcopy(FAMILIES[name]), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for step in (2, 7, 40):
        batch = {n: v[0] for n, v in batched.batches(tasks, SEEDS, [step] * 3, 1).items()}
        moved = params + torch.randn(params.shape, generator=generator, dtype=dtype) * 0.3
        for got, want in zip(
            batched.losses_and_grads(moved, tasks, batch), fresh.losses_and_grads(moved, tasks, batch)
        ):
            assert torch.equal(got, want)
        assert torch.equal(batched.losses(moved, tasks, batch), fresh.losses(moved, tasks, batch))
    assert all(isinstance(calls, int) for calls in fresh._traced.values())
    batch = {n: v[0] for n, v in batched.batches(tasks, SEEDS, [2] * 3, 1).items()}
    for got, want in zip(batched.losses_and_grads(params, tasks, batch), untraced):
        assert torch.equal(got, want)
    assert torch.equal(batched.losses(params, tasks, batch), losses_untraced)


def test_each_shape_is_traced_for_itself():
    family = Quadratic(dim=3)
    batched = BatchedFamily(family, dtype=torch.float64)
    for num in (1, 2, 5):
        seeds = list(range(0, 3 * num, 3))
        tasks, params = batched.start("meta_train", seeds)
        for _ in range(CALLS_BEFORE_TRACE + 2):
            losses, grads = batched.losses_and_grads(params, tasks, {})
        residual = torch.einsum("pij,pj->pi", tasks["w"], params) - tasks["y"]
        torch.testing.assert_close(losses, residual.square().sum(1), rtol=1e-13, atol=0)
        want = 2 * torch.einsum("pij,pi->pj", tasks["w"], residual)
        torch.testing.assert_close(grads, want, rtol=1e-12, atol=1e-13)
    assert len(batched._traced) == 3


def test_traces_are_the_family_s_and_go_with_it():
    family = Quadratic(dim=3)
    batched, tasks, params, _ = start(family)
    family = batched.family  # the copy
    for _ in range(CALLS_BEFORE_TRACE + 1):
        batched.losses_and_grads(params, tasks, {})
    (program,) = batched._traced.values()
    assert callable(program)
    again = BatchedFamily(family, dtype=torch.float64)
    assert list(again._traced.values()) == [program]
    moved = params + 1
    residual = torch.einsum("pij,pj->pi", tasks["w"], moved) - tasks["y"]
    torch.testing.assert_close(again.losses_and_grads(moved, tasks, {})[0], residual.square().sum(1))
    assert BatchedFamily(family, dtype=torch.float32)._traced == {}
    assert BatchedFamily(copy.deepcopy(family), dtype=torch.float64)._traced == {}
    gone = weakref.ref(family)
    del batched, again, family
    gc.collect()
    assert gone() is None


def test_tracing_leaves_new_constants_variable():
    """What a traced program was traced with must not be baked into it."""
    batched, tasks, params, _ = start(Quadratic(dim=3))
    for _ in range(CALLS_BEFORE_TRACE + 1):
        batched.losses_and_grads(params, tasks, {})
    doubled = {"w": tasks["w"] * 2, "y": tasks["y"] * 2}
    torch.testing.assert_close(
        batched.losses_and_grads(params, doubled, {})[1], 4 * batched.losses_and_grads(params, tasks, {})[1]
    )


def test_differentiable_keeps_the_graph_to_the_parameters():
    batched, tasks, params, _ = start(Quadratic(dim=4))
    leaf = params.clone().requires_grad_()
    losses, grads = batched.losses_and_grads(leaf, tasks, {}, differentiable=True)
    direction = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    (product,) = torch.autograd.grad((grads * direction).sum(), leaf, retain_graph=True)
    hessian = 2 * torch.einsum("pki,pkj->pij", tasks["w"], tasks["w"])
    torch.testing.assert_close(product, torch.einsum("pij,pj->pi", hessian, direction), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(slope, grads.detach(), rtol=1e-12, atol=0)


def test_dtype_moves_numbers_and_leaves_integers():
    family = ImageMLP(hidden=(3,), batch_size=4)
    for dtype in (torch.float32, torch.float64):
        batched, tasks, params, batch = start(family, dtype)
        assert params.dtype == dtype
        assert batched._shared["inputs"].dtype == dtype
        assert batched._shared["targets"].dtype == torch.int64
        assert batch["rows"].dtype == torch.int64
        losses, grads = batched.losses_and_grads(params, tasks, batch)
        assert losses.dtype == grads.dtype == dtype


def test_float_targets_move_with_the_dtype():
    batched, tasks, params, _ = start(Regression())
    assert batched._shared["targets"].dtype == torch.float64
    batch = {n: v[0] for n, v in batched.batches(tasks, SEEDS, [0] * 3, 1).items()}
    losses, _ = batched.losses_and_grads(params, tasks, batch)
    want = [one_by_one(Regression(), seed, 0)[0] for seed in SEEDS]
    torch.testing.assert_close(losses, torch.stack(want), rtol=1e-13, atol=0)


def test_unflatten_round_trip():
    family = ImageMLP(hidden=(3, 5), batch_size=4)
    batched = BatchedFamily(family)
    assert batched.names == ["weight0", "bias0", "weight1", "bias1", "weight2", "bias2"]
    assert batched.shapes == [(64, 3), (3,), (3, 5), (5,), (5, 10), (10,)]
    assert batched.num_parameters == 64 * 3 + 3 + 3 * 5 + 5 + 5 * 10 + 10
    flat = torch.arange(2.0 * 4 * batched.num_parameters).view(2, 4, -1)
    named = batched.unflatten(flat)
    assert named["weight1"].shape == (2, 4, 3, 5)
    assert torch.equal(torch.cat([v.reshape(2, 4, -1) for v in named.values()], -1), flat)
    assert batched.unflatten(flat[0, 0])["bias2"].tolist() == flat[0, 0, -10:].tolist()


def test_start_holds_the_named_tasks_in_order():
    batched, tasks, params, _ = start(Quadratic(dim=3))
    for i, seed in enumerate(SEEDS):
        task, drawn = draw_task(Quadratic(dim=3), "meta_train", seed)
        assert torch.equal(tasks["w"][i], task["w"].double())
        assert torch.equal(params[i], drawn["theta"].double())


def test_batches_are_each_particles_own():
    family = ImageMLP(hidden=(3,), batch_size=4)
    batched = BatchedFamily(family)
    tasks, _ = batched.start("meta_train", SEEDS)
    rows = batched.batches(tasks, SEEDS, [0, 5, 31], 3)["rows"]
    assert rows.shape == (3, 3, 4)
    for i, (seed, step) in enumerate(zip(SEEDS, [0, 5, 31])):
        task, _ = draw_task(family, "meta_train", seed)
        assert torch.equal(rows[:, i], draw_batches(family, task, seed, step, 3)["rows"])
    quadratic, tasks, _, _ = start(Quadratic(dim=3))
    assert quadratic.batches(tasks, SEEDS, [0, 1, 2], 4) == {}


def test_eval_metrics_equal_one_by_one():
    family = ImageMLP(hidden=(3,), batch_size=4)
    batched, tasks, params, _ = start(family)
    got = batched.eval_metrics(params, tasks)
    shared = {n: v.double() if v.is_floating_point() else v for n, v in family.shared_data().items()}
    for i in range(3):
        task = {**{n: v[i] for n, v in tasks.items()}, **shared}
        want = family.eval_metrics(batched.unflatten(params[i]), task)
        for name, value in want.items():
            torch.testing.assert_close(got[name][i], value, rtol=1e-12, atol=0)
    assert set(got) == {"test_loss", "test_accuracy"}
    assert start(Quadratic(dim=3))[0].eval_metrics(torch.zeros(3, 3, dtype=torch.float64), {}) == {}


def test_state_bytes():
    assert BatchedFamily(Quadratic(dim=3)).state_bytes(5, 18) == 5 * 3 * 20 * 4
    assert BatchedFamily(Quadratic(dim=3), dtype=torch.float64).state_bytes(5, 18) == 5 * 3 * 20 * 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(TaskFamily):
    """Shared float targets; `odd` spoils one method in the way it names."""

    name: ClassVar[str] = "regression"
    odd: str = ""

    def sample_task(self, split, generator):
        other = torch.rand((), generator=generator) < 0.5
        if self.odd == "constant shapes":
            return {"shift": torch.zeros(1 + int(other))}
        if self.odd == "constant names":
            return {"a" if other else "b": torch.zeros(1)}
        if self.odd == "clash":
            return {"targets": torch.zeros(1)}
        return {}

    def init_params(self, task, generator):
        if self.odd == "no parameters":
            return {}
        if self.odd == "integer parameters":
            return {"x": torch.zeros(3, dtype=torch.int64)}
        if self.odd == "not a tensor":
            return {"x": 1.0}
        other = torch.rand((), generator=generator) < 0.5
        if self.odd == "parameter shapes" and other:
            return {"x": torch.zeros(4)}
        if self.odd == "parameter names" and other:
            return {"y": torch.zeros(3)}
        return {"x": torch.randn(3, generator=generator)}

    def shared_data(self):
        return {"targets": torch.linspace(0, 1, 5), "rows": torch.arange(5)}

    def sample_batches(self, task, num_steps, generator):
        return {"row": torch.randint(5, (num_steps, 1), generator=generator)}

    def loss(self, params, task, batch):
        errors = (params["x"] - task["targets"][batch["row"]]).square()
        if self.odd == "vector loss":
            return errors
        if self.odd == "float loss":
            return float(errors.sum())
        return errors.sum()


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ("no parameters", "regression: init_params returned no parameters; a task needs at least one tensor"),
        (
            "integer parameters",
            "regression: parameter 'x' must be a floating-point tensor; got torch.int64",
        ),
        ("not a tensor", "regression: parameter 'x' must be a floating-point tensor; got float"),
        (
            "vector loss",
            r"regression: loss must return a scalar tensor; got shape \(3,\). Reduce it, e.g. with .mean\(\)",
        ),
        ("float loss", "regression: loss must return a scalar tensor; got float"),
        ("clash", "regression: sample_task and shared_data both return 'targets'; rename one of them"),
    ],
)
def test_unfit_families_are_refused_when_made(odd, text):
    with pytest.raises(ValueError, match=text):
        BatchedFamily(Regression(odd=odd))


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        ("parameter shapes", "regression: all tasks of a family must have parameters of one shape; expected .*'x'"),
        ("parameter names", "regression: all tasks of a family must have parameters of one shape; expected .*'y'"),
        ("constant shapes", "regression: all tasks of a family must have constants of one shape; expected .*'shift'"),
        ("constant names", "regression: all tasks of a family must have constants of one shape; expected .*'[ab]'"),
    ],
)
def test_tasks_of_different_shape_are_refused(odd, text):
    batched = BatchedFamily(Regression(odd=odd))
    with pytest.raises(ValueError, match=text):
        batched.start("meta_train", list(range(0, 30, 3)))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="family must be a TaskFamily; got str"):
        BatchedFamily("quadratic")
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type; got torch\.int32"):
        BatchedFamily(Quadratic(), dtype=torch.int32)
    with pytest.raises(ValueError, match="split must be one of"):
        BatchedFamily(Quadratic()).start("train", [0])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "quantum"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here: .*; use cpu"):
        BatchedFamily(Quadratic(), device=device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branching(TaskFamily):
    """A loss of two pieces, chosen by a Python branch; `odd` moves the branch or spoils the loss otherwise."""

    name: ClassVar[str] = "branching"
    odd: str = "loss"

    def sample_task(self, split, generator):
        return {"center": torch.randn(3, generator=generator)}

    def init_params(self, task, generator):
        return {"x": torch.randn(3, generator=generator)}

    def sample_batches(self, task, num_steps, generator):
        return {"shift": torch.randn(num_steps, 3, generator=generator)}

    def loss(self, params, task, batch):
        z = params["x"] - task["center"] - batch["shift"]
        if self.odd == "metrics":
            return z.square().sum()
        if self.odd == "random":
            return z.square().sum() + torch.rand(())
        if self.odd == "random branch" and z.sum() > -math.inf:
            return z.square().sum() + torch.rand(())
        if self.odd == "broken" and z.numel() == 3:
            return z.square().sum() + torch.zeros(2) @ torch.zeros(3)
        return z.square().sum() if z.sum() > 0 else 3 * z.square().sum() + z.sum()

    def eval_metrics(self, params, task):
        return {"sign": torch.tensor(1.0 if float(params["x"].sum()) > 0 else -1.0)}


def test_a_loss_that_branches_runs_one_by_one_with_one_warning():
    family, seeds = Branching(), list(range(0, 36, 3))
    batched, tasks, params, batch = start(family, seeds=seeds)
    text = (
        r"branching: loss cannot be batched by torch.func.vmap \(.*data-dependent control flow.*\). Its particles run "
        r"one by one, so 12 of them take 12 times as long as one. .* by torch.where"
    )
    with pytest.warns(OneByOneWarning, match=text) as caught:
        losses, grads = batched.losses_and_grads(params, tasks, batch)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for _ in range(CALLS_BEFORE_TRACE + 2):  # later calls must not warn again, nor freeze one branch into a program
        assert torch.equal(batched.losses(params, tasks, batch), losses)
        for got, want in zip(batched.losses_and_grads(params, tasks, batch), (losses, grads)):
            assert torch.equal(got, want)
    assert batched._traced == {}
    pieces = set()
    for i, seed in enumerate(seeds):
        loss, grad = one_by_one(family, seed, 2)
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[i], grad, rtol=1e-12, atol=1e-14)
        z = params[i] - tasks["center"][i] - batch["shift"][i]
        pieces.add(bool(z.sum() > 0))
        torch.testing.assert_close(grads[i], 2 * z if z.sum() > 0 else 6 * z + 1, rtol=1e-12, atol=1e-14)
    assert pieces == {True, False}
    assert torch.equal(batched.eval_metrics(params, tasks)["sign"], params.sum(1).sign().float())
    moved = -params  # the branches are taken anew at every call
    assert not torch.equal(batched.losses(moved, tasks, batch), losses)


def test_a_loss_that_branches_is_not_traced_for_a_second_one_either():
    family = Branching()
    for _ in range(2):
        batched = BatchedFamily(family, dtype=torch.float64)
        tasks, params = batched.start("meta_train", SEEDS)
        batch = {name: value[0] for name, value in batched.batches(tasks, SEEDS, [2] * 3, 1).items()}
        with pytest.warns(OneByOneWarning):
            losses = batched.losses(params, tasks, batch)
        for _ in range(CALLS_BEFORE_TRACE + 1):
            assert torch.equal(batched.losses(params, tasks, batch), losses)
        assert batched._traced == {}
        torch.testing.assert_close(losses[0], one_by_one(family, SEEDS[0], 2)[0], rtol=1e-12, atol=0)


def test_one_by_one_keeps_the_graph_to_the_parameters():
    batched, tasks, params, batch = start(Branching())
    leaf = params.clone().requires_grad_()
    with pytest.warns(OneByOneWarning):
        losses, grads = batched.losses_and_grads(leaf, tasks, batch, differentiable=True)
    (curvature,) = torch.autograd.grad(grads.sum(), leaf, retain_graph=True)
    z = params - tasks["center"] - batch["shift"]
    want = torch.where(z.sum(1, keepdim=True) > 0, 2.0, 6.0).expand(3, 3).double()
    torch.testing.assert_close(curvature, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), leaf)[0], grads.detach(), rtol=1e-12, atol=0)


def test_metrics_that_branch_leave_the_loss_batched():
    batched, tasks, params, batch = start(Branching(odd="metrics"))
    with pytest.warns(OneByOneWarning, match="branching: eval_metrics cannot be batched"):
        signs = batched.eval_metrics(params, tasks)["sign"]
    assert torch.equal(signs, params.sum(1).sign().float())
    for _ in range(CALLS_BEFORE_TRACE + 1):
        batched.losses(params, tasks, batch)
    assert any(callable(program) for program in batched._traced.values())


@pytest.mark.parametrize(
    ("odd", "error", "text"),
    [
        ("random", RuntimeError, "randomness"),
        ("random branch", ValueError, "branching: loss draws random numbers from torch's global generator; draw them"),
        ("broken", RuntimeError, "inconsistent tensor size|same size"),
    ],
)
def test_what_one_by_one_is_no_answer_to(odd, error, text):
    batched = BatchedFamily(Branching()) if odd == "broken" else BatchedFamily(Branching(odd=odd))
    batched.family = Branching(odd=odd)
    tasks, params = batched.start("meta_train", SEEDS)
    batch = {name: value[0] for name, value in batched.batches(tasks, SEEDS, [0] * 3, 1).items()}
    with pytest.raises(error, match=text):
        batched.losses(params, tasks, batch)
