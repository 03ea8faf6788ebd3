"""The meta-loss against closed forms, and its weights against finite differences."""

import math

import pytest
import torch

from learned_opt.meta_loss import AVERAGES, NORMALIZATIONS, MetaLoss

LOSSES = torch.tensor([[2.0, 9.0], [1.0, 3.0], [0.5, 30.0]], dtype=torch.float64)
INITIAL = torch.tensor([4.0, 3.0], dtype=torch.float64)
EVERYONE = torch.tensor([True, True])


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("normalization", "average", "want"),
    [
        ("log", "mean", mean([math.log(x) for x in (2 / 4, 1 / 4, 0.5 / 4, 9 / 3, 3 / 3, 30 / 3)])),
        ("log", "final", mean([math.log(0.5 / 4), math.log(30 / 3)])),
        ("ratio", "mean", mean([2 / 4, 1 / 4, 0.5 / 4, 9 / 3, 3 / 3, 30 / 3])),
        ("ratio", "final", mean([0.5 / 4, 30 / 3])),
        ("none", "mean", mean([2.0, 1.0, 0.5, 9.0, 3.0, 30.0])),
        ("none", "final", mean([0.5, 30.0])),
    ],
)
def test_closed_forms(normalization, average, want):
    meta_loss = MetaLoss(normalization=normalization, average=average)
    for initial in (INITIAL, INITIAL.expand(3, 2)):
        assert float(meta_loss(LOSSES, initial)) == pytest.approx(want, rel=1e-14)
        assert float(meta_loss(LOSSES, initial, EVERYONE)) == pytest.approx(want, rel=1e-14)
        assert float(meta_loss.per_particle(LOSSES, initial).mean()) == pytest.approx(want, rel=1e-14)
        assert float(meta_loss.weights(LOSSES, initial, EVERYONE)[0]) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_weights_are_the_derivative(normalization, average):
    meta_loss = MetaLoss(normalization=normalization, average=average, clip=8.0)
    losses = LOSSES.clone()
    value, weights = meta_loss.weights(losses, INITIAL, EVERYONE)
    assert torch.equal(losses, LOSSES) and not losses.requires_grad and not value.requires_grad
    step = 1e-6
    for index in [(t, p) for t in range(3) for p in range(2)]:
        above, below = losses.clone(), losses.clone()
        above[index] += step
        below[index] -= step
        slope = float(meta_loss(above, INITIAL) - meta_loss(below, INITIAL)) / (2 * step)
        assert float(weights[index]) == pytest.approx(slope, rel=1e-8, abs=1e-9)
    assert weights[2, 1] == 0  # 30 is beyond eight times its initial loss
    assert weights[2, 0] > 0


def test_weights_of_log_in_closed_form():
    _, weights = MetaLoss().weights(LOSSES, INITIAL, EVERYONE)
    torch.testing.assert_close(weights, 1 / (6 * LOSSES), rtol=1e-14, atol=0)


def test_initial_loss_may_differ_along_the_truncation():
    initial = torch.tensor([[4.0], [4.0], [8.0]], dtype=torch.float64)
    losses = torch.tensor([[2.0], [1.0], [8.0]], dtype=torch.float64)
    assert float(MetaLoss(normalization="ratio")(losses, initial)) == pytest.approx((0.5 + 0.25 + 1) / 3)


@pytest.mark.parametrize(("normalization", "want"), [("log", math.log(10.0)), ("ratio", 10.0), ("none", 40.0)])
@pytest.mark.parametrize("loss", [41.0, 1e30, math.inf])
def test_clip(normalization, want, loss):
    meta_loss = MetaLoss(normalization=normalization, clip=10.0)
    losses, initial = torch.tensor([[loss]], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    value, weights = meta_loss.weights(losses, initial, torch.tensor([True]))
    assert float(value) == pytest.approx(want)
    assert float(weights) == 0
    assert meta_loss.num_clipped(losses, initial) == 1


def test_clip_of_none_is_relative_to_one_where_the_initial_loss_is_small_or_negative():
    meta_loss = MetaLoss(normalization="none", clip=10.0)
    losses = torch.full((1, 3), 1e9, dtype=torch.float64)
    initial = torch.tensor([0.0, -0.5, -20.0], dtype=torch.float64)
    assert meta_loss.per_particle(losses, initial).tolist() == [10.0, 10.0, 200.0]
    assert meta_loss.num_clipped(torch.tensor([[9.0, 10.0, 201.0]], dtype=torch.float64), initial) == 1


def test_floor():
    meta_loss = MetaLoss(floor=1e-3)
    losses, initial = torch.tensor([[0.0, 1e-9, -5.0]], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    value, weights = meta_loss.weights(losses, initial, torch.ones(3, dtype=torch.bool))
    assert float(value) == pytest.approx(math.log(1e-3))
    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    # "ratio" has no floor: a negative loss counts.
    assert float(MetaLoss(normalization="ratio")(losses[:, 2:], initial[2:])) == -5.0


def test_initial_loss_of_zero_is_finite():
    losses, initial = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    got = MetaLoss(clip=10.0).per_particle(losses, initial)
    assert got.tolist() == pytest.approx([math.log(1e-12), math.log(10.0)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_invalid_particles_count_for_nothing(normalization, bad):
    meta_loss = MetaLoss(normalization=normalization)
    losses = torch.cat([LOSSES, torch.tensor([[1.0], [bad], [bad]], dtype=torch.float64)], 1)
    initial = torch.tensor([4.0, 3.0, bad], dtype=torch.float64)
    valid = torch.tensor([True, True, False])
    value, weights = meta_loss.weights(losses, initial, valid)
    want_value, want_weights = meta_loss.weights(LOSSES, INITIAL, EVERYONE)
    assert torch.equal(value, want_value)
    assert torch.equal(weights[:, :2], want_weights)
    assert weights[:, 2].tolist() == [0.0, 0.0, 0.0]


def test_nobody_valid():
    losses = torch.full((3, 2), math.nan, dtype=torch.float64)
    value, weights = MetaLoss().weights(losses, INITIAL, torch.tensor([False, False]))
    assert float(value) == 0 and weights.count_nonzero() == 0 and not weights.isnan().any()


def test_num_clipped():
    meta_loss = MetaLoss(clip=10.0)
    losses = torch.tensor([[40.0, 31.0], [math.nan, -math.inf], [math.inf, 29.0]], dtype=torch.float64)
    # 40 is exactly ten times its initial loss; minus infinity is floored, not clipped.
    assert meta_loss.num_clipped(losses, INITIAL) == 3
    assert MetaLoss(normalization="none", clip=10.0).num_clipped(losses, INITIAL) == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"normalization": "logs"}, "normalization must be one of log, ratio, none, log_mean; got 'logs'"),
        ({"average": "sum"}, "average must be one of mean, final; got 'sum'"),
        ({"clip": 1.0}, "clip must be greater than 1; got 1.0"),
        ({"clip": math.nan}, "clip must be greater than 1; got nan"),
        ({"floor": 0.0}, "floor must lie strictly between 0 and 1; got 0.0"),
        ({"floor": 1.0}, "floor must lie strictly between 0 and 1; got 1.0"),
        ({"floor": math.nan}, "floor must lie strictly between 0 and 1; got nan"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        MetaLoss(**settings)


@pytest.mark.parametrize(
    ("average", "want"), [("mean", mean([math.log(5.5), math.log(2.0), math.log(15.25)])), ("final", math.log(15.25))]
)
def test_log_mean_is_the_log_of_the_mean_over_particles_at_each_step(average, want):
    meta_loss = MetaLoss(normalization="log_mean", average=average)
    assert float(meta_loss(LOSSES, INITIAL)) == pytest.approx(want, rel=1e-14)
    spoilt = torch.cat([LOSSES, torch.full((3, 1), math.nan, dtype=torch.float64)], dim=1)
    initial = torch.cat([INITIAL, INITIAL[:1]])
    valid = torch.tensor([True, True, False])
    value, weights = meta_loss.weights(spoilt, initial, valid)
    assert float(value) == pytest.approx(want, rel=1e-14)
    steps = [0, 1, 2] if average == "mean" else [2]
    for step in range(3):
        share = 1 / (len(steps) * float(LOSSES[step].sum())) if step in steps else 0.0
        torch.testing.assert_close(weights[step], torch.tensor([share, share, 0.0], dtype=torch.float64))


def test_log_mean_has_no_value_per_particle():
    with pytest.raises(ValueError, match="'log_mean' has no value per particle.*choose log, ratio or none"):
        MetaLoss(normalization="log_mean").per_particle(LOSSES, INITIAL)
