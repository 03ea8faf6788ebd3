"""How tasks are named: seeds, splits, and batches that do not depend on how they are asked for."""

import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch

from learned_opt.task import SPLITS, TaskFamily, draw_batches, draw_task, generator_for, stack, task_seed
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

# Chosen so that neighbouring and large integers occur, and keys of the length that particles use.
KEYS = [(r, p, e) for r in (0, 1, 17, 2**31) for p in range(8) for e in range(8)]


@pytest.mark.parametrize(("index", "split"), list(enumerate(SPLITS)))
def test_seed_names_its_split(index, split):
    seeds = [task_seed(split, *key) for key in KEYS]
    assert {seed % 3 for seed in seeds} == {index}
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert seeds == [task_seed(split, *key) for key in KEYS]
    assert len(set(seeds)) == len(seeds)


def test_largest_word_stays_in_range(monkeypatch):
    class Fixed:
        word = 0

        def __init__(self, entropy):
            pass

        def generate_state(self, count, dtype):
            return [self.word]

    monkeypatch.setattr("learned_opt.task.np.random.SeedSequence", Fixed)
    for word in (2**32 - 1, (2**32 - 2) // 3 - 1, (2**32 - 2) // 3, 0):
        monkeypatch.setattr(Fixed, "word", word)
        for index, split in enumerate(SPLITS):
            seed = task_seed(split, 1)
            assert 0 <= seed < 2**32 and seed % 3 == index


def test_splits_share_no_seed():
    by_split = [{task_seed(split, *key) for key in KEYS} for split in SPLITS]
    for a, b in itertools.combinations(by_split, 2):
        assert not a & b


def test_order_of_the_key_matters():
    assert task_seed("meta_train", 1, 2, 3) != task_seed("meta_train", 1, 3, 2)
    assert task_seed("meta_train", 1, 2, 3) != task_seed("meta_train", 2, 2, 3)


def test_unknown_split():
    text = "split must be one of meta_train, meta_validation, meta_test; got 'train'"
    with pytest.raises(ValueError, match=text):
        task_seed("train", 0)


def test_negative_key_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        task_seed("meta_train", -1)


def test_generator_is_a_function_of_its_arguments():
    def draw(*key):
        return torch.rand(4, generator=generator_for(*key))

    assert torch.equal(draw(5), draw(5))
    assert torch.equal(draw(5, 3), draw(5, 3))
    drawn = [draw(5), draw(6), draw(5, 0), draw(5, 1), draw(5, 2), draw(6, 0)]
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.equal(a, b)
    # A plain seed is torch's own: anyone can draw the same task without this package.
    assert torch.equal(draw(5), torch.rand(4, generator=torch.Generator().manual_seed(5)))
    assert generator_for(5).device.type == "cpu"


def test_nothing_touches_the_global_generator():
    before = torch.get_rng_state()
    family = ImageMLP(hidden=(3,), batch_size=4)
    task, _ = draw_task(family, "meta_train", 3)
    draw_batches(family, task, 3, 0, 5)
    task_seed("meta_train", 1)
    assert torch.equal(before, torch.get_rng_state())


def test_draw_task_uses_constants_first_then_parameters():
    family = Quadratic(dim=3)
    task, params = draw_task(family, "meta_test", 11)
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(task["w"], torch.randn(3, 3, generator=generator))
    assert torch.equal(task["y"], torch.randn(3, generator=generator))
    assert torch.equal(params["theta"], torch.randn(3, generator=generator))


@pytest.mark.parametrize("cuts", [[0, 100], [0, 1, 2, 3, 100], [0, 31, 32, 33, 64, 65, 100], [0, 20, 40, 60, 80, 100]])
def test_batches_are_the_same_however_they_are_cut(cuts):
    family = ImageMLP(hidden=(3,), batch_size=4)
    task, _ = draw_task(family, "meta_train", 9)
    whole = draw_batches(family, task, 9, 0, 100)["rows"]
    assert whole.shape == (100, 4)
    parts = [draw_batches(family, task, 9, a, b - a)["rows"] for a, b in zip(cuts, cuts[1:])]
    assert torch.equal(torch.cat(parts), whole)
    # Steps do have batches of their own.
    assert len({tuple(row.tolist()) for row in whole}) > 90


@pytest.mark.parametrize("first", [0, 5, 31, 32, 63, 200])
@pytest.mark.parametrize("count", [1, 2, 32, 33, 70])
def test_batches_from_anywhere(first, count):
    family = ImageMLP(hidden=(3,), batch_size=4)
    task, _ = draw_task(family, "meta_train", 9)
    one_by_one = [draw_batches(family, task, 9, step, 1)["rows"] for step in range(first, first + count)]
    assert torch.equal(draw_batches(family, task, 9, first, count)["rows"], torch.cat(one_by_one))


def test_seed_decides_the_batches():
    family = ImageMLP(hidden=(3,), batch_size=4)
    task, _ = draw_task(family, "meta_train", 9)
    assert not torch.equal(draw_batches(family, task, 9, 0, 3)["rows"], draw_batches(family, task, 12, 0, 3)["rows"])


def test_full_batch_families_have_no_batches():
    family = Quadratic(dim=3)
    assert draw_batches(family, {}, 0, 40, 5) == {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneBatch(TaskFamily):
    """Forgets to stack."""

    name: ClassVar[str] = "one_batch"
    size: int = 4

    def sample_task(self, split, generator):
        return {}

    def init_params(self, task, generator):
        return {"x": torch.zeros(1)}

    def sample_batches(self, task, num_steps, generator):
        return {"noise": torch.zeros(self.size)}

    def loss(self, params, task, batch):
        return (params["x"] + batch["noise"]).sum()


def test_unstacked_batches_are_refused():
    text = r"one_batch: sample_batches must stack num_steps batches .* asked for 32, got 'noise' of shape \(4,\)"
    with pytest.raises(ValueError, match=text):
        draw_batches(OneBatch(), {}, 0, 0, 1)


def test_config_rebuilds_the_family():
    family = ImageMLP(hidden=(3, 5), activation="relu")
    assert ImageMLP(**family.config()) == family
    assert OneBatch(size=3).config() == {"size": 3}
    assert OneBatch(size=3).describe() == "one_batch(size=3)"


def test_defaults_of_the_interface():
    family = Quadratic(dim=2)
    assert family.shared_data() == {}
    assert family.eval_metrics({}, {}) == {}
    assert family.sample_batches({}, 3, torch.Generator()) == {}


def test_stack():
    rows = [{"a": torch.tensor([1, 2]), "b": torch.tensor(1.0)}, {"a": torch.tensor([3, 4]), "b": torch.tensor(2.0)}]
    stacked = stack(rows)
    assert stacked["a"].tolist() == [[1, 2], [3, 4]]
    assert stacked["b"].tolist() == [1.0, 2.0]
