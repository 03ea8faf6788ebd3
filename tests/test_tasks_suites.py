"""Suites: what they hold, and that the test suites hold what training never saw."""

from __future__ import annotations

import pytest

import tasks
from learned_opt.batched import BatchedFamily
from tasks.suites import SUITES, suite

SEEN = [*SUITES["train"].values(), *SUITES["validation"].values()]


def architecture(described):
    """What tells two networks of one family apart, data and sizes of batches aside."""
    family = tasks.get(**described)
    keys = ("hidden", "activation", "channels", "norm", "cell", "variational", "kind")
    return (family.name, *(getattr(family, key, None) for key in keys))


@pytest.mark.parametrize("name", ["test_small", "test"])
def test_the_test_suites_hold_nothing_that_was_trained_or_validated_on(name):
    seen = {architecture(described) for described in SEEN}
    assert not [label for label, described in SUITES[name].items() if architecture(described) in seen]
    activations = {described.get("activation") for described in SEEN}
    assert "gelu" not in activations
    whole_families = {d["name"] for d in SUITES[name].values()} - {d["name"] for d in SEEN}
    assert len(whole_families) >= 6


def test_suites_are_labelled_once_and_the_small_one_is_part_of_the_other():
    assert SUITES["test_small"].items() <= SUITES["test"].items()
    assert not SUITES["train"].keys() & SUITES["validation"].keys()
    for described in SUITES.values():
        families = [tasks.get(**fields) for fields in described.values()]
        assert len(set(families)) == len(families)


def test_every_family_of_every_suite_runs():
    for name in SUITES:
        for label, family in suite(name).items():
            batched = BatchedFamily(family)
            stacked, params = batched.start("meta_test", [2])
            batch = {n: v[0] for n, v in batched.batches(stacked, [2], [0], 1).items()}
            losses, grads = batched.losses_and_grads(params, stacked, batch)
            assert losses.isfinite().all() and grads.isfinite().all(), label


def test_unknown_suite():
    with pytest.raises(ValueError, match="suite must be one of train, validation, test_small, test; got 'tests'"):
        suite("tests")
