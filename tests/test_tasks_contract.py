"""The contract of a task family, held to every registered family and to families on modules of one's own."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

import tasks
from learned_opt import rules
from learned_opt.batched import BatchedFamily
from learned_opt.particles import EpisodePlan, start_particles
from learned_opt.task import SPLITS, TaskFamily, draw_batches, draw_task, task_seed
from learned_opt.unroll import unroll
from tasks.augment import Augmentation
from tests.task_cases import CASES, LABELS, OWN, SHARED_ROWS, make

DOCS = Path(__file__).parent.parent / "docs" / "tasks.md"


@cache
def family_of(label: str) -> TaskFamily:
    return make(label)


@cache
def batched_of(label: str) -> BatchedFamily:
    return BatchedFamily(family_of(label), dtype=torch.float64)


def seeds_of(split: str, count: int) -> list[int]:
    return [task_seed(split, 7, i) for i in range(count)]


def double(tensors):
    return {n: v.double() if v.is_floating_point() else v for n, v in tensors.items()}


def one_task(label: str, split: str, seed: int, step: int = 0):
    """(params, task with shared data, batch) in float64, made without `BatchedFamily`."""
    family = family_of(label)
    task, params = draw_task(family, split, seed)
    batch = {n: v[0] for n, v in draw_batches(family, task, seed, step, 1).items()}
    return double(params), double({**task, **family.shared_data()}), double(batch)


def test_every_registered_family_has_a_case():
    assert {case["name"] for case in CASES.values()} == set(tasks.FAMILIES)
    # The case of the family's own name is the one that every rule runs on.
    assert all(CASES[name]["name"] == name for name in tasks.FAMILIES)
    assert all(family.name == name for name, family in tasks.FAMILIES.items())


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the first table after this heading of docs/tasks.md, below its head."""
    text = DOCS.read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| ---")) + 1
    last = next(i for i in range(first, len(lines) + 1) if i == len(lines) or not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[first:last]]


def names_in(heading: str) -> list[str]:
    return [row[0].strip("| `") for row in table_rows(heading)]


def test_the_tables_of_the_docs_hold_every_family_and_nothing_else():
    wrappers = [name for name, family in tasks.FAMILIES.items() if issubclass(family, Augmentation)]
    problems = [name for name in tasks.FAMILIES if name not in wrappers]
    assert names_in("# Task families") == [*problems, "module"]
    assert sorted(names_in("## Augmentations")) == sorted(wrappers)


def test_the_docs_say_how_fast_every_family_is():
    assert set(names_in("## Speed")) == {*tasks.FAMILIES, "module"}


def test_the_docs_say_of_every_family_how_its_splits_differ():
    words = {row[0].strip("`"): row[2].strip(" |") for row in table_rows("# Task families")}
    for label in LABELS:
        family = family_of(label)
        if isinstance(family, Augmentation) or label == "module-sampled":
            continue
        shares = bool(family.shared_data())
        assert (words[family.name] != "seeds") == shares, label


@pytest.mark.parametrize("name", [*sorted(tasks.FAMILIES), "module"])
def test_documented(name):
    family = tasks.FAMILIES.get(name, tasks.ModuleFamily)
    doc = inspect.getdoc(family)
    assert doc is not None
    bases = [base for base in family.__mro__ if issubclass(base, TaskFamily) and base is not TaskFamily]
    if not issubclass(family, Augmentation) and name != "module":  # theirs is that of what they hold
        said = " ".join(inspect.getdoc(base) or "" for base in bases)
        assert "optimum" in said or "Reference:" in said
    if dataclasses.is_dataclass(family):
        inherited = "".join(inspect.getdoc(base) or "" for base in family.__mro__)
        for field in dataclasses.fields(family):
            assert f"{field.name}:" in inherited or f"{field.name}, " in inherited or f", {field.name}" in inherited


@pytest.mark.parametrize("label", LABELS)
def test_batched_equals_one_by_one(label):
    batched, family = batched_of(label), family_of(label)
    seeds = seeds_of("meta_train", 2)  # as many as the rules run on below: what is traced here is run there
    stacked, params = batched.start("meta_train", seeds)
    steps = [3, 40]
    batches = batched.batches(stacked, seeds, steps, 1)
    batch = {n: v[0] for n, v in batches.items()}
    for _ in range(10):  # the later calls run the traced program
        losses, grads = batched.losses_and_grads(params, stacked, batch)
    metrics = batched.eval_metrics(params, stacked)
    for i, (seed, step) in enumerate(zip(seeds, steps)):
        single, task, single_batch = one_task(label, "meta_train", seed, step)
        leaves = {n: v.clone().requires_grad_() for n, v in single.items()}
        loss = family.loss(leaves, task, single_batch)
        want = torch.autograd.grad(loss, list(leaves.values()))
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-9, atol=1e-12)
        flat = torch.cat([g.reshape(-1) for g in want])
        torch.testing.assert_close(grads[i], flat, rtol=1e-8, atol=1e-10 * float(flat.abs().max()))
        single_metrics = family.eval_metrics(single, task)
        assert set(single_metrics) == set(metrics)
        for name, value in single_metrics.items():
            torch.testing.assert_close(metrics[name][i], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label", LABELS)
def test_the_loss_that_judges_is_of_the_family_or_its_loss(label):
    batched, family = batched_of(label), family_of(label)
    assert batched.judged_apart == ("query" in str(CASES.get(label, {}).get("judge", label)))
    seeds = seeds_of("meta_train", 2)
    stacked, params = batched.start("meta_train", seeds)
    batch = {n: v[0] for n, v in batched.batches(stacked, seeds, [0, 0], 1).items()}
    losses, grads = batched.judge(params, stacked, batch)
    for i, seed in enumerate(seeds):
        single, task, single_batch = one_task(label, "meta_train", seed)
        leaves = {n: v.clone().requires_grad_() for n, v in single.items()}
        loss = family.query_loss(leaves, task, single_batch)
        assert (loss is not None) == batched.judged_apart
        loss = family.loss(leaves, task, single_batch) if loss is None else loss
        want = torch.autograd.grad(loss, list(leaves.values()))
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-9, atol=1e-12)
        flat = torch.cat([g.reshape(-1) for g in want])
        torch.testing.assert_close(grads[i], flat, rtol=1e-8, atol=1e-10 * float(flat.abs().max()))


@pytest.mark.parametrize("label", LABELS)
def test_gradient_equals_central_differences(label):
    family = family_of(label)
    params, task, batch = one_task(label, "meta_train", seeds_of("meta_train", 1)[0])
    generator = torch.Generator().manual_seed(1)
    # Beside the initial parameters: where biases are 0 and pixels too, a ReLU sits on its kink.
    params = {n: v + 0.01 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
    # Gradient noise is in the gradient and not in the loss; tests/test_tasks_augment.py looks at it.
    batch = {n: torch.zeros_like(v) if n.startswith("gradient_noise") else v for n, v in batch.items()}
    leaves = {n: v.clone().requires_grad_() for n, v in params.items()}
    grads = torch.autograd.grad(family.loss(leaves, task, batch), list(leaves.values()))
    grads = dict(zip(params, grads))
    scale = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
    assert scale > 0
    for _ in range(6):
        direction = {n: torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in params.items()}
        # Relative to each parameter's size where that is small, so that the step suits every parametrization.
        size = max(1e-3, min(1.0, float(torch.cat([v.reshape(-1) for v in params.values()]).abs().mean())))
        h = 1e-6 * size
        there = family.loss({n: v + h * direction[n] for n, v in params.items()}, task, batch)
        back = family.loss({n: v - h * direction[n] for n, v in params.items()}, task, batch)
        slope = sum(float((grads[n] * direction[n]).sum()) for n in params)
        assert float(there - back) / (2 * h) == pytest.approx(slope, rel=1e-4, abs=1e-5 * float(scale))


@pytest.mark.parametrize("label", LABELS)
def test_same_seed_same_task_and_no_global_randomness(label):
    family, seed = family_of(label), seeds_of("meta_validation", 1)[0]

    def draw():
        task, params = draw_task(family, "meta_validation", seed)
        return [task, params, draw_batches(family, task, seed, 0, 5)]

    torch.manual_seed(1)
    first = draw()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = draw()
    for a, b in zip(first, second):
        assert list(a) == list(b)
        assert all(torch.equal(a[n], b[n]) for n in a)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("label", LABELS)
def test_another_seed_is_another_task(label):
    family = family_of(label)
    drawn = []
    for seed in seeds_of("meta_train", 2):
        task, params = draw_task(family, "meta_train", seed)
        drawn.append({**task, **params, **{f"batch {n}": v for n, v in draw_batches(family, task, seed, 0, 1).items()}})
    assert any(not torch.equal(drawn[0][n], drawn[1][n]) for n in drawn[0])


@pytest.mark.parametrize("label", LABELS)
def test_splits_share_nothing(label):
    family = family_of(label)
    seeds = {split: seeds_of(split, 12) for split in SPLITS}
    assert len({s for group in seeds.values() for s in group}) == 36
    assert all(s % 3 == i for i, split in enumerate(SPLITS) for s in seeds[split])
    rows: dict[str, set[int]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in seeds[split]:
            task, _ = draw_task(family, split, seed)
            batches = draw_batches(family, task, seed, 0, 32)
            if "rows" not in batches or "inputs" in task:
                return  # the constants are drawn from the seed alone
            rows[split] |= set(batches["rows"].flatten().tolist())
    a, b, c = (rows[split] for split in SPLITS)
    assert not a & b and not a & c and not b & c


def test_rows_are_looked_at_wherever_they_are_shared():
    assert [x for x in LABELS if family_of(x).shared_data().get("inputs") is not None] == SHARED_ROWS


@pytest.mark.parametrize("label", SHARED_ROWS)
def test_metrics_read_none_of_the_rows_that_tasks_train_on(label):
    family = family_of(label)
    shared = family.shared_data()
    trained: list[torch.Tensor] = []
    held_out = {}
    for split in SPLITS:
        for seed in seeds_of(split, 12):
            task, params = draw_task(family, split, seed)
            trained.append(draw_batches(family, task, seed, 0, 32)["rows"].flatten())
            held_out[split] = (task, params)
    poisoned = shared["inputs"].clone()
    poisoned[torch.cat(trained)] = float("nan")
    for task, params in held_out.values():
        for value in family.eval_metrics(params, {**task, **shared, "inputs": poisoned}).values():
            assert torch.isfinite(value)
            assert value.dim() == 0


@pytest.mark.parametrize("label", LABELS)
def test_finite_at_initialization(label):
    batched = batched_of(label)
    for split in SPLITS:
        seeds = seeds_of(split, 8)
        stacked, params = batched.start(split, seeds)
        batch = {n: v[0] for n, v in batched.batches(stacked, seeds, [0] * 8, 1).items()}
        losses, grads = batched.losses_and_grads(params, stacked, batch)
        assert torch.isfinite(losses).all() and torch.isfinite(grads).all()
        assert all(torch.isfinite(v).all() for v in batched.eval_metrics(params, stacked).values())


@pytest.mark.parametrize("label", list(CASES))
def test_rebuilt_from_name_and_config_alone(label):
    family = family_of(label)
    text = json.dumps({"name": family.name, **family.config()})
    rebuilt = tasks.get(**json.loads(text))
    assert rebuilt == family
    assert hash(rebuilt) == hash(family)
    assert rebuilt.describe() == family.describe()
    assert tasks.get(family.name, **family.config()) == family


@pytest.mark.parametrize("label", list(OWN))
def test_config_of_an_own_module_is_plain(label):
    config = family_of(label).config()
    assert json.loads(json.dumps(config)) == config
    assert make(label).config() == config


@pytest.mark.parametrize("label", LABELS)
def test_batches_do_not_depend_on_the_truncation(label):
    family, seed = family_of(label), seeds_of("meta_train", 1)[0]
    task, _ = draw_task(family, "meta_train", seed)
    whole = draw_batches(family, task, seed, 0, 40)
    parts = [draw_batches(family, task, seed, 0, 13), draw_batches(family, task, seed, 13, 27)]
    for name, value in whole.items():
        assert len(value) == 40
        assert torch.equal(value, torch.cat([part[name] for part in parts]))


# Every rule on every family; on the families' variants the default one.
EVERY_RULE = [*tasks.FAMILIES, "module-grouped"]
RUNS = [(label, rule) for label in LABELS for rule in (rules.RULES if label in EVERY_RULE else ["compact"])]


@pytest.mark.parametrize(("label", "rule_name"), RUNS)
def test_every_rule_runs_20_inner_steps(label, rule_name):
    batched, rule = batched_of(label), rules.get(rule_name)
    theta = {n: v.double() for n, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    plan = EpisodePlan(split="meta_train", run_seed=0, horizons=None)
    particles = start_particles(batched, rule, plan, [0, 1])
    segment = unroll(rule, theta, batched, plan, particles, 20)
    assert torch.isfinite(segment.losses).all()
    assert segment.valid.all()
    assert particles.steps == [20, 20]


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match=r"unknown task family 'rosenbrok'; did you mean rosenbrock\?"):
        tasks.get("rosenbrok")
    with pytest.raises(ValueError, match=r"unknown task family 'zzz'; choose from .*image_mlp"):
        tasks.get("zzz")
    with pytest.raises(ValueError, match=r"task family 'image_mlp' has no field 'hiden'; did you mean hidden\?"):
        tasks.get("image_mlp", hiden=(3,))
    with pytest.raises(ValueError, match="task family 'quadratic' has no field 'zzz'; choose from dim, convention"):
        tasks.get("quadratic", zzz=3)
    with pytest.raises(ValueError, match=r"made in Python, not by name: tasks.ModuleFamily\(module, loss, data\)"):
        tasks.get("module")


def test_short_and_capital_names_suggest_families_too():
    mlps = "char_mlp or image_mlp or image_mlp_sampled"
    for name, near in {"mlp": mlps, "RNN": "char_rnn", "Quadratic": "quadratic"}.items():
        with pytest.raises(ValueError, match=rf"unknown task family '{name}'; did you mean {near}( or \w+)*\?"):
            tasks.get(name)
    with pytest.raises(
        ValueError, match=r"'wine' is a data set and no task family; .* tasks.get\('tabular', dataset='w"
    ):
        tasks.get("wine")
    with pytest.raises(ValueError, match=r"'mnist' is a data set .* tasks.get\('image_mlp', dataset='mnist'\)"):
        tasks.get("mnist")
    with pytest.raises(ValueError, match="unknown task family 3; choose from ackley"):
        tasks.get(3)
    with pytest.raises(
        ValueError, match=r"families must be a mapping of labels to names and fields; got \['quadratic'\]"
    ):
        tasks.build(["quadratic"])
    with pytest.raises(ValueError, match="family 'a' needs a name, as in .*; got 'quadratic'"):
        tasks.build({"a": "quadratic"})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("image_mlp", {"batch_size": "64"}, "batch_size of task family 'image_mlp' must be an integer; got '64'"),
        ("image_mlp", {"batch_size": 6.5}, "batch_size of task family 'image_mlp' must be an integer; got 6.5"),
        ("image_mlp", {"batch_size": True}, "must be an integer; got True"),
        ("image_mlp", {"hidden": 32}, "hidden of task family 'image_mlp' must be a list of integers; got 32"),
        ("image_mlp", {"hidden": "32"}, "must be a list of integers; got '32'"),
        ("image_mlp", {"hidden": [3.5]}, r"must be a list of integers; got \[3.5\]"),
        ("image_mlp", {"init_scale": "1e-3"}, "init_scale of task family 'image_mlp' must be a number; got '1e-3'"),
        ("image_mlp", {"init_scale": math.inf}, "init_scale of task family 'image_mlp' must be finite; got inf"),
        ("image_mlp", {"activation": ["relu"]}, r"must be a string; got \['relu'\]"),
        ("image_mlp", {"activation": None}, "must be a string; got None"),
        ("image_mlp_sampled", {"init_scales": 2.0}, "init_scales of .* must be a list of numbers; got 2.0"),
        ("image_mlp_sampled", {"activations": "relu"}, "must be a list of strings; got 'relu'"),
        ("image_autoencoder", {"variational": "yes"}, "must be true or false; got 'yes'"),
        ("char_rnn", {"text_file": Path("x")}, r"text_file of task family 'char_rnn' must be a string; got .*Path"),
        ("convex_mixing", {"family": {"name": "quadratic", "dim": "3"}}, "dim of task family 'quadratic' must be an"),
    ],
)
def test_values_of_another_type(name, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name, **fields)


def test_integers_are_numbers_and_lists_are_tuples():
    family = tasks.get("image_mlp", hidden=[3], init_scale=1, label_noise=0)
    assert family == tasks.get("image_mlp", hidden=(3,), init_scale=1.0, label_noise=0.0)


@pytest.mark.parametrize("name", sorted(tasks.FAMILIES))
def test_every_field_is_of_a_type_that_is_checked(name):
    checked = {"int", "float", "str", "bool", "tuple[int, ...]", "tuple[str, ...]", "tuple[float, float]"}
    for field in dataclasses.fields(tasks.FAMILIES[name]):
        assert field.type in checked or field.name == "family"


BAD_FIELDS = {
    "image_mlp": [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"label_noise": 1.5}, r"label_noise must lie in \[0, 1\]; got 1.5"),
        ({"dataset": "mist"}, "dataset must be one of digits, mnist, fashion_mnist; got 'mist'"),
        ({"data_dir": "x"}, "dataset 'digits' ships with scikit-learn and takes no data_dir; got 'x'"),
        ({"hidden": (0,)}, r"hidden widths must be at least 1; got \(0,\)"),
        ({"activation": "step"}, "activation must be one of .*relu.*; got 'step'"),
        ({"init": "zeros"}, "init must be one of normal, fan_in; got 'zeros'"),
        ({"init_scale": 0.0}, "init_scale must be positive; got 0.0"),
        ({"norm": "batch"}, "norm must be one of none, layer; got 'batch'"),
        ({"norm": "layer", "hidden": ()}, "norm must be none without hidden layers, .*; got 'layer'"),
    ],
    "sinusoid": [({"judge": "both"}, "judge must be one of support, query; got 'both'")],
    "quadratic": [
        ({"dim": 0}, "dim must be at least 1; got 0"),
        ({"convention": "odd"}, "convention must be one of normal, zero_start, uniform; got 'odd'"),
    ],
}


@pytest.mark.parametrize(
    ("name", "fields", "message"), [(n, *bad) for n, all_bad in BAD_FIELDS.items() for bad in all_bad]
)
def test_values_out_of_range(name, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name, **fields)


def test_quadratic_reference_optimum():
    """The docstring's reference: W is square, so solving Wθ = y brings the loss to 0."""
    family = tasks.get("quadratic", dim=5)
    task, _ = draw_task(family, "meta_test", task_seed("meta_test", 0))
    task = double(task)
    solved = {"theta": torch.linalg.solve(task["w"], task["y"])}
    assert family.loss(solved, task, {}) < 1e-16
