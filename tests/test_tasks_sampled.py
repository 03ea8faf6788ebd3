"""Sampled architectures: what a task draws for itself, and families of drawn shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.task import draw_batches, draw_task, task_seed
from tasks.activations import ACTIVATIONS
from train_optimizer import build_families

SEEDS = [task_seed("meta_train", i) for i in range(300)]


def test_a_task_is_an_mlp_with_its_own_activation_scale_and_batch_size():
    family = tasks.get("image_mlp_sampled", hidden=(6, 5), batch_size=12, least_batch_size=2)
    batched, seeds = BatchedFamily(family, dtype=torch.float64), SEEDS[:20]
    stacked, params = batched.start("meta_train", seeds)
    batch = {n: v[0] for n, v in batched.batches(stacked, seeds, [3] * 20, 1).items()}
    losses, grads = batched.losses_and_grads(params, stacked, batch)
    inputs, targets, _ = family.load()
    for i, seed in enumerate(seeds):
        task, start = draw_task(family, "meta_train", seed)
        leaves = {n: v.double().requires_grad_() for n, v in start.items()}
        rows = draw_batches(family, task, seed, 3, 1)["rows"][0][: int(task["batch_rows"])]
        x = inputs[rows].double()
        for layer in range(3):
            x = x @ leaves[f"weight{layer}"] + leaves[f"bias{layer}"]
            if layer < 2:
                x = list(ACTIVATIONS.values())[int(task["activation"])](x)
        loss = F.cross_entropy(x, targets[rows])
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-11, atol=0)
        grad = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(leaves.values()))])
        torch.testing.assert_close(grads[i], grad, rtol=1e-9, atol=1e-13)
    assert len(set(stacked["activation"].tolist())) > 3 and len(set(stacked["batch_rows"].tolist())) > 3


def test_draws_cover_their_ranges():
    family = tasks.get(
        "image_mlp_sampled", hidden=(40,), activations=("relu", "tanh"), init_scales=(0.25, 4.0), batch_size=16
    )
    drawn = [draw_task(family, "meta_train", seed) for seed in SEEDS]
    scales = torch.stack([task["init_scale"] for task, _ in drawn]).double()
    assert scales.min() >= 0.25 and scales.max() <= 4.0
    # Log-uniform: the logarithm has the mean 0 and the variance of a uniform number on (−ln 4, ln 4).
    assert float(scales.log().mean()) == pytest.approx(0, abs=4 * math.log(4) / math.sqrt(3 * 300))
    assert float(scales.log().var()) == pytest.approx(math.log(4) ** 2 / 3, rel=0.2)
    assert {int(task["batch_rows"]) for task, _ in drawn} == set(range(8, 17))
    share = sum(int(task["activation"]) for task, _ in drawn) / 300
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(300))
    for (_, params), scale in zip(drawn[:5], scales[:5]):
        assert float(params["weight0"].std()) == pytest.approx(float(scale) / 8, rel=0.1)


def test_families_of_drawn_depth_and_width():
    ranges = {"depth": (1, 3), "width": (4, 32)}
    families = tasks.sample_families("image_mlp_sampled", ranges, 30, 0, batch_size=10)
    assert len(families) == len(set(families.values())) == 30
    for label, family in families.items():
        assert "-".join(map(str, family.hidden)) == label
        assert family.batch_size == 10 and 1 <= len(family.hidden) <= 3
        assert all(4 <= width <= 32 for width in family.hidden)
    assert {len(family.hidden) for family in families.values()} == {1, 2, 3}
    assert tasks.sample_families("image_mlp_sampled", ranges, 30, 0, batch_size=10) == families
    assert list(tasks.sample_families("image_mlp_sampled", ranges, 30, 1)) != list(families)
    widths = [w for family in families.values() for w in family.hidden]
    assert sum(width < 12 for width in widths) > len(widths) / 3  # uniform widths would have a quarter there


def test_other_fields_and_other_families():
    ranges = {"depth": (1, 2), "width": (2, 4), "norm": ["none", "layer"], "activation": ["relu", "tanh"]}
    families = tasks.sample_families("image_conv", ranges, 12, 3, batch_size=4)
    assert {f.norm for f in families.values()} == {"none", "layer"}
    assert {f.activation for f in families.values()} == {"relu", "tanh"}
    label, family = next(iter(families.items()))
    assert label == f"{'-'.join(map(str, family.channels))} norm={family.norm} activation={family.activation}"
    assert list(tasks.sample_families("quadratic", {"dim": [2, 3]}, 2, 0).values()) in (
        [tasks.get("quadratic", dim=2), tasks.get("quadratic", dim=3)],
        [tasks.get("quadratic", dim=3), tasks.get("quadratic", dim=2)],
    )


def test_in_a_configuration_file():
    described = {
        "nets": {"name": "sinusoid", "num_shots": 5, "sample": {"num": 3, "depth": [1, 2], "width": [4, 8]}},
        "plain": {"name": "quadratic"},
    }
    families = build_families(described)
    drawn = tasks.sample_families("sinusoid", {"depth": [1, 2], "width": [4, 8]}, 3, 0, num_shots=5)
    assert families == {**{f"nets {label}": f for label, f in drawn.items()}, "plain": tasks.get("quadratic")}
    described["nets"]["sample"]["seed"] = 1
    assert build_families(described) != families
    with pytest.raises(ValueError, match=r"family 'nets': sample must be a mapping with num and ranges; got \{'depth'"):
        tasks.build({"nets": {"name": "sinusoid", "sample": {"depth": [1, 2]}}})
    with pytest.raises(ValueError, match=r"family 'a' needs a name, as in .*; got \{'dim': 3\}"):
        tasks.build({"a": {"dim": 3}})


@pytest.mark.parametrize(
    ("name", "ranges", "num", "seed", "config", "message"),
    [
        ("sinusoid", {"depth": (1, 2), "width": (2, 3)}, 0, 0, {}, "num must be at least 1; got 0"),
        ("sinusoid", {"depth": (1, 2), "width": (2, 3)}, 1, -1, {}, "seed must not be negative; got -1"),
        ("sinusoid", {"depth": (1, 2), "width": (2, 3)}, "3", 0, {}, "num must be an integer; got '3'"),
        ("sinusoid", {"depth": (1, 2), "width": (2, 3)}, 3, 0.5, {}, "seed must be an integer; got 0.5"),
        ("sinusoid", {"depth": 3, "width": (2, 3)}, 1, 0, {}, "depth must be two integers of at least 1, .*; got 3"),
        ("sinusoid", {"num_shots": 5}, 1, 0, {}, "num_shots must be a list of choices; got 5"),
        ("sinusoid", {}, 1, 0, {}, "ranges is empty; name at least one thing to draw"),
        ("sinusoid", {"depth": (1, 2)}, 1, 0, {}, "depth and width are drawn together; got only depth"),
        ("sinusoid", {"depth": (2, 1), "width": (2, 3)}, 1, 0, {}, r"depth must be two integers .*; got \(2, 1\)"),
        ("sinusoid", {"depth": (1, 1), "width": (0, 3)}, 1, 0, {}, r"width must be two integers .*; got \(0, 3\)"),
        ("sinusoid", {"depth": (1, 1), "width": (2, 3)}, 3, 0, {}, "num = 3 different draws; they gave 2. Widen them"),
        ("sinusoid", {"activation": "relu"}, 1, 0, {}, "activation must be a list of choices; got 'relu'"),
        ("sinusoid", {"num_shots": [1]}, 1, 0, {"num_shots": 2}, "num_shots is both given and drawn"),
        ("sinusoid", {"depth": (1, 1), "width": (2, 3)}, 1, 0, {"hidden": (3,)}, "hidden is both given and drawn"),
        ("quadratic", {"depth": (1, 1), "width": (2, 3)}, 1, 0, {}, "'quadratic' has no hidden or channels"),
        ("quadratic", {"dims": [2]}, 1, 0, {}, "'quadratic' has no field 'dims'; did you mean dim"),
        ("sinusoids", {"dims": [2]}, 1, 0, {}, "unknown task family 'sinusoids'; did you mean sinusoid"),
    ],
)
def test_ranges_that_are_none(name, ranges, num, seed, config, message):
    with pytest.raises(ValueError, match=message):
        tasks.sample_families(name, ranges, num, seed, **config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": ()}, r"hidden must name at least one layer, whose activation can be drawn; got \(\)"),
        ({"hidden": (0,)}, r"hidden widths must be at least 1; got \(0,\)"),
        ({"activations": ()}, r"activations must name at least one, and none twice; got \(\)"),
        ({"activations": ("relu", "relu")}, "activations must name at least one, and none twice"),
        ({"activations": ("step",)}, "activation must be one of .*; got 'step'"),
        ({"init_scales": (2.0, 1.0)}, r"init_scales must be two positive numbers, the least first; got \(2.0, 1.0\)"),
        ({"least_batch_size": 65}, r"least_batch_size must lie between 1 and batch_size \(64\); got 65"),
        ({"dataset": "mist"}, "dataset must be one of digits, mnist, fashion_mnist; got 'mist'"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("image_mlp_sampled", **fields)
