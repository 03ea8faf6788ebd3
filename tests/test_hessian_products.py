"""Hessian products of a batched family against `torch.autograd.functional.hvp` and finite differences, task by task."""

import dataclasses

import pytest
import torch

from learned_opt.batched import BatchedFamily, OneByOneWarning
from learned_opt.task import draw_batches
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic


@dataclasses.dataclass(frozen=True)
class Branching(ImageMLP):
    """The same loss, computed along a branch that `vmap` cannot take."""

    def loss(self, params, task, batch):
        loss = super().loss(params, task, batch)
        return loss if loss.item() > -1 else -loss


FAMILIES = {
    "quadratic": Quadratic(dim=5),
    "digits": ImageMLP(hidden=(3, 4), activation="tanh", batch_size=8, init_scale=0.5),
    "one_by_one": Branching(hidden=(3,), activation="tanh", batch_size=8, init_scale=0.5),
}


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.filterwarnings("ignore::learned_opt.batched.OneByOneWarning")
def test_equal_hvp_and_finite_differences(name):
    family, seeds = FAMILIES[name], [0, 3, 6]
    batched = BatchedFamily(family, dtype=torch.float64)
    tasks, params = batched.start("meta_train", seeds)
    batch = {n: v[0] for n, v in batched.batches(tasks, seeds, [4, 4, 4], 1).items()}
    shared = {n: v.double() if v.is_floating_point() else v for n, v in family.shared_data().items()}
    vectors = torch.randn(params.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_of(i):
        task = {**{n: v[i] for n, v in tasks.items()}, **shared}
        drawn = draw_batches(family, {n: v[i] for n, v in tasks.items()}, seeds[i], 4, 1)
        return lambda flat: family.loss(batched.unflatten(flat), task, {n: v[0] for n, v in drawn.items()})

    want = torch.stack([torch.autograd.functional.hvp(loss_of(i), params[i], vectors[i])[1] for i in range(3)])
    got = batched.hessian_products(params, tasks, batch, vectors)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert want.abs().max() > 0 and not got.requires_grad
    step = 1e-5
    ahead, behind = (batched.losses_and_grads(params + s * vectors, tasks, batch)[1] for s in (step, -step))
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(got, slope, rtol=1e-5, atol=1e-6 * float(slope.abs().max()))
    for _ in range(10):  # traced by now, where it can be
        again = batched.hessian_products(params, tasks, batch, vectors)
    torch.testing.assert_close(again, got, rtol=1e-12, atol=1e-14)


def test_one_by_one_is_announced():
    batched = BatchedFamily(FAMILIES["one_by_one"], dtype=torch.float64)
    tasks, params = batched.start("meta_train", [0, 3])
    batch = {n: v[0] for n, v in batched.batches(tasks, [0, 3], [1, 1], 1).items()}
    with pytest.warns(OneByOneWarning, match="cannot be batched by torch.func.vmap"):
        batched.hessian_products(params, tasks, batch, torch.ones_like(params))
