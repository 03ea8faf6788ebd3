"""Runs on disk: found again to the bit, computed anew when anything has changed or the file is damaged."""

import functools
import math

import pytest
import torch
from evaluation_families import Parabola, Regression

from learned_opt import rules
from learned_opt.batched import BatchedFamily
from learned_opt.evaluation import BASELINES, Baseline, EvaluationConfig, Learned, RunCache, cache, compare
from learned_opt.evaluation.cache import default_folder, fingerprint

OPTIONS = dict(split="meta_test", seeds=(0, 3), num_tasks=2, horizon=6)


def run(folder, baseline=BASELINES["adam"], family=None, rates=(0.1, 0.3), dtype=torch.float64, **change):
    """(runs, the cache), by way of a cache object of its own, as a new process would have."""
    found = RunCache(folder)
    batched = BatchedFamily(family or Parabola(), dtype=dtype)
    return baseline.run(batched, rates, cache=found, **{**OPTIONS, **change}), found


def counts(found):
    return found.num_found, found.num_computed, found.num_damaged


def same(one, other):
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=0, equal_nan=True)
    assert list(one.metrics) == list(other.metrics)
    torch.testing.assert_close(one.metrics, other.metrics, rtol=0, atol=0, equal_nan=True)


def test_a_run_is_found_again_to_the_bit(tmp_path):
    first, made = run(tmp_path / "deep" / "folder")
    again, used = run(tmp_path / "deep" / "folder")
    same(first, again)
    assert counts(made) == (0, 1, 0) and counts(used) == (1, 0, 0)
    assert first.metrics.keys() == {"distance"}
    plain = BASELINES["adam"].run(BatchedFamily(Parabola(), dtype=torch.float64), (0.1, 0.3), **OPTIONS)
    same(first, plain)


def test_infinities_and_the_order_of_metrics_survive(tmp_path):
    class TwoMetrics(Parabola):
        def eval_metrics(self, params, task):
            return {"z": params["theta"], "a": params["theta"] * 2}

    options = dict(family=TwoMetrics(), baseline=BASELINES["sgd"], rates=(1e200,))
    first, _ = run(tmp_path, **options)
    again, used = run(tmp_path, **options)
    same(first, again)
    assert used.num_found == 1 and not torch.isfinite(again.losses[-1]).any()
    assert list(again.metrics) == ["z", "a"]


@pytest.mark.parametrize(
    "change",
    [
        {"baseline": BASELINES["rmsprop"]},
        {"baseline": Baseline(name="adam", make=functools.partial(torch.optim.Adam, betas=(0.8, 0.9)))},
        {"baseline": Baseline(name="adam", make=torch.optim.Adam, elementwise=False)},
        {"rates": (0.1,)},
        {"family": Parabola(curvature=1.01)},
        {"family": Regression()},
        {"split": "meta_validation"},
        {"seeds": (0,)},
        {"num_tasks": 3},
        {"horizon": 7},
        {"with_metrics": False},
        {"dtype": torch.float32},
    ],
    ids=lambda change: "-".join(change),
)
def test_whatever_changes_the_numbers_is_another_run(tmp_path, change):
    run(tmp_path)
    _, found = run(tmp_path, **change)
    assert counts(found) == (0, 1, 0)


@pytest.mark.parametrize(("where", "name"), [(torch, "__version__"), (cache, "CACHE_VERSION")])
def test_another_version_is_another_run(tmp_path, monkeypatch, where, name):
    run(tmp_path)
    monkeypatch.setattr(where, name, "another")
    assert counts(run(tmp_path)[1]) == (0, 1, 0)


def test_a_schedule_and_the_label_s_irrelevance(tmp_path):
    run(tmp_path, Baseline(name="one", make=torch.optim.AdamW))
    assert counts(run(tmp_path, Baseline(name="two", make=torch.optim.AdamW))[1]) == (1, 0, 0)
    cosine = Baseline(name="one", make=torch.optim.AdamW, schedule=BASELINES["adamw_cosine"].schedule)
    assert counts(run(tmp_path, cosine)[1]) == (0, 1, 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "another key"])
def test_a_damaged_entry_is_computed_again_and_replaced(tmp_path, damage):
    first, _ = run(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-3] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "foreign":
        from safetensors.torch import save

        data = bytearray(save({"losses": torch.zeros(3)}))
    else:
        run(tmp_path / "other", horizon=9)
        (other,) = (tmp_path / "other").glob("*.safetensors")
        data = bytearray(other.read_bytes())
    path.write_bytes(data)
    again, found = run(tmp_path)
    same(first, again)
    assert counts(found) == (0, 1, 1)
    assert counts(run(tmp_path)[1]) == (1, 0, 0)


def test_what_has_no_lasting_name_is_never_kept(tmp_path):
    def local(groups):
        return torch.optim.SGD(groups)

    for make in (local, lambda groups: torch.optim.SGD(groups), functools.partial(local)):
        _, found = run(tmp_path, Baseline(name="x", make=make))
        assert counts(found) == (0, 1, 0)
    assert not list(tmp_path.iterdir())


def test_an_optimizer_whose_source_changed_is_another_one(tmp_path, monkeypatch):
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "own_optimizer_module.py"
    text = "import torch\nclass Mine(torch.optim.SGD):\n    factor = {}\n"

    def baseline(factor):
        source.write_text(text.format(factor))
        importlib.invalidate_caches()
        sys.modules.pop("own_optimizer_module", None)
        return Baseline(name="mine", make=importlib.import_module("own_optimizer_module").Mine)

    assert counts(run(tmp_path / "runs", baseline(1))[1]) == (0, 1, 0)
    assert counts(run(tmp_path / "runs", baseline(1))[1]) == (1, 0, 0)
    assert counts(run(tmp_path / "runs", baseline(2))[1]) == (0, 1, 0)


def test_a_family_s_code_and_data_are_part_of_its_fingerprint():
    class Steeper(Parabola):
        def loss(self, params, task, batch):
            return super().loss(params, task, batch) * 1.01

    class OtherData(Regression):
        def shared_data(self):
            return {"x": super().shared_data()["x"].flip(0)}

    class OtherMetric(Parabola):
        def eval_metrics(self, params, task):
            return {"distance": 2 * super().eval_metrics(params, task)["distance"]}

    assert fingerprint(Parabola()) == fingerprint(Parabola())
    prints = {fingerprint(f) for f in (Parabola(), Steeper(), OtherMetric(), Regression(), OtherData())}
    assert len(prints) == 5


def test_a_comparison_computes_only_what_changed(tmp_path, monkeypatch):
    config = EvaluationConfig(horizon=10, num_tasks=2, seeds=(0,), num_validation_tasks=2, num_resamples=20)
    families = {"one": Parabola(), "two": Parabola(curvature=3.0)}
    rule = rules.get("adam", lr=0.1)
    theta = rule.init_theta(torch.Generator())

    def go(theta, *names, families=families):
        found = RunCache(tmp_path)
        candidates = [Learned(name="learned", rule=rule, theta=theta), *(BASELINES[name] for name in names)]
        return compare(candidates, families, config, dtype=torch.float64, cache=found), found

    first, made = go(theta, "adam", "adam_default")
    # For each family: the learned one, Adam's tuning and final run, and the untuned one's run.
    assert made.num_found == 0 and made.num_computed >= 8
    again, used = go(theta, "adam", "adam_default")
    assert (used.num_found, used.num_computed) == (made.num_computed, 0)
    assert again == first
    other = {**theta, "log_lr": torch.tensor(math.log(0.2))}
    changed, found = go(other, "adam", "adam_default")
    assert (found.num_found, found.num_computed) == (made.num_computed - 2, 2)
    assert changed.result("one", "adam") == first.result("one", "adam")
    assert changed.result("one", "learned") != first.result("one", "learned")
    # The code of the rules is part of a learned optimizer's name, and of no other's.
    monkeypatch.setattr(cache, "_sources_of_rules", lambda: "other code")
    _, found = go(theta, "adam", "adam_default")
    assert (found.num_found, found.num_computed) == (made.num_computed - 2, 2)
    monkeypatch.undo()
    _, more = go(theta, "adam", families={**families, "three": Parabola(curvature=0.3)})
    assert more.num_computed >= 3 and more.num_found == made.num_computed - 2


def test_the_default_folder_is_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "learned_opt" / "runs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "learned_opt" / "runs"


def test_the_code_of_rules_is_all_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "rules"
    (folder / "kernels").mkdir(parents=True)
    for name, text in (("__init__.py", "one"), ("kernels/kernel.cpp", "two"), ("notes.txt", "three")):
        (folder / name).write_text(text)
    monkeypatch.setattr(cache.rules, "__file__", str(folder / "__init__.py"))
    hashes = [cache._sources_of_rules.__wrapped__()]
    for name in ("__init__.py", "kernels/kernel.cpp", "notes.txt"):
        (folder / name).write_text("changed")
        hashes.append(cache._sources_of_rules.__wrapped__())
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]  # notes are no code
