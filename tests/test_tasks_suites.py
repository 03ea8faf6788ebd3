"""Suites: what they hold, and that the test suites hold what training never saw."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import tasks
from learned_opt.batched import BatchedFamily
from learned_opt.task import task_seed
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


# Taken when the suites were made. A suite that is to hold something else gets a new name.
DIGEST = "e7b1cdc163ef116fcf1b666066048545c722d04e62b8ad912f314f883859718f"
# Parameters, and the loss of meta-test task 0 where it starts; None where that depends on Python's own sources.
FROZEN: dict[str, tuple[int, float | None]] = {
    "digits sigmoid 20": (1510, 2.3395),
    "digits tanh 16-16": (1482, 2.5116),
    "digits relu 32": (2410, 2.5579),
    "digits elu 24-16-16": (2402, 2.3498),
    "breast cancer tanh": (290, 0.43778),
    "diabetes silu": (113, 1.6429),
    "quadratic": (20, 4.6917),
    "autoencoder": (3478, 0.69954),
    "digits silu 24-24": (2410, 2.2996),
    "digits leaky relu 48": (3610, 2.5533),
    "wine elu": (179, 0.94168),
    "rosenbrock": (10, 3.2246),
    "digits gelu 40": (3010, 2.2763),
    "convolutions": (426, 2.3407),
    "sinusoids": (1761, 25.214),
    "traffic": (417, 1.9507),
    "ratings": (451, 1.2617),
    "lasso": (50, 22.793),
    "characters": (3440, None),
    "digits gelu 128-128": (26122, 2.3296),
    "digits sigmoid 20 x 6": (3610, 2.9754),
    "batch-normalized convolutions": (1442, 2.5119),
    "layer-normalized convolutions": (1442, 2.4685),
    "variational autoencoder": (13328, 0.70973),
    "gated recurrence": (15552, None),
    "transformer": (19424, None),
    "finance": (417, 1.8746),
    "matrix factorization": (144, 0.86792),
    "logistic regression": (11, 0.69315),
    "pendulum": (81, 1.6978),
    "cart and pole": (113, 0.11329),
    "plateau": (10, 0.58956),
    "saddle": (10, 0.25001),
    "ackley": (10, 5.8516),
}


def test_suites_never_change():
    assert hashlib.sha256(json.dumps(SUITES, sort_keys=True).encode()).hexdigest() == DIGEST
    assert {label for described in SUITES.values() for label in described} == set(FROZEN)


@pytest.mark.parametrize("name", list(SUITES))
def test_families_of_suites_draw_what_they_always_drew(name):
    """The names and fields alone do not fix a suite: a changed default or draw would change it too."""
    for label, family in suite(name).items():
        batched, seeds = BatchedFamily(family, dtype=torch.float64), [task_seed("meta_test", 0)]
        stacked, params = batched.start("meta_test", seeds)
        batch = {n: v[0] for n, v in batched.batches(stacked, seeds, [0], 1).items()}
        num_parameters, loss = FROZEN[label]
        assert batched.num_parameters == num_parameters, label
        if loss is not None:
            assert float(batched.losses(params, stacked, batch)) == pytest.approx(loss, rel=1e-4), label


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
