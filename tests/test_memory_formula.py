"""The memory of first-order meta-training: the documented formula against the tensors that are really alive."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.meta_training.memory import numbers_per_coordinate, predicted_bytes, state_rows
from learned_opt import estimators, rules
from learned_opt.meta_config import MetaTrainerConfig
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.rules import lstm_tape
from learned_opt.task import TaskFamily
from learned_opt.truncation import HorizonSchedule

SIZE = 8_000


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations return while it is active, and their peak."""

    def __init__(self, known):
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._note(tensor)

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_, key=key, size=size):
            self._seen.pop(key, None)
            self.bytes -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor:
                self._note(leaf)
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separate(TaskFamily):
    """|x − y|²: next to no temporaries of its own."""

    name: ClassVar[str] = "separate"
    size: int = SIZE

    def sample_task(self, split, generator):
        return {"target": torch.randn(1, generator=generator)}

    def init_params(self, task, generator):
        return {"x": torch.randn(self.size, generator=generator)}

    def loss(self, params, task, batch):
        return (params["x"] - task["target"]).square().sum()


def test_live_tensors_are_counted_and_forgotten():
    with LiveTensors([torch.zeros(0)]) as live:
        kept = torch.zeros(1000)
        view = kept[10:]
        torch.ones(500)
        gc.collect()
        assert live.bytes == 4000 and live.peak == 6000
        del kept
        assert live.bytes == 4000
        del view
    assert live.bytes == 0


# A compiled kernel keeps its blocks out of torch's sight; they do not depend on the number of coordinates.
@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize(
    ("truncation", "particles", "horizon", "offsets", "restarts", "share"),
    [
        (20, 1, 100, False, 0, 1.0),
        (5, 2, 100, False, 0, 1.0),
        (20, 2, 20, False, 1, 1.0),
        (20, 1, 30, False, 1, 1.0),
        (20, 2, 20, True, 2, 0.5),
    ],
    ids=["no restart", "two particles", "restart at the end", "restart inside", "two restarts"],
)
def test_the_formula_is_what_is_held(monkeypatch, native, truncation, particles, horizon, offsets, restarts, share):
    monkeypatch.setenv("LEARNED_OPT_NATIVE", native)
    lstm_tape._kept.tapes.clear()  # what a longer truncation, of a test before, was recorded in
    rule = rules.get("rnnprop", dense_units=0)
    config = MetaTrainerConfig(
        num_particles=particles,
        truncation=truncation,
        horizons=HorizonSchedule(longest=horizon, random_offsets=offsets),
    )
    trainer = MetaTrainer(rule, {"separate": Separate()}, config, estimators.get("backprop", chunk_size=400))
    trainer.step()  # with a horizon of 30, the restart is in the middle of the second truncation
    state = trainer.estimator_states["separate"]
    if offsets:
        assert len({*state.steps, 0}) == 3  # both restart in the next truncation, apart, and neither at its end
    held = [state.params, state.grads, state.losses, state.initial, *state.rule_state.values(), *state.tasks.values()]
    gc.collect()
    with LiveTensors(held) as live:
        trainer.step()
    predicted = predicted_bytes(rule, SIZE * particles, truncation, restarts=restarts, share=share)
    # What is beside it: one chunk of 400 coordinates, of which torch holds some 650 numbers at every step.
    beside = 4 * 400 * truncation * (650 if native == "0" else 4)
    # And the blocks of a step, for at most some 12,800 coordinates at once.
    beside += 4 * 200 * min(SIZE * particles, 12_800) if native == "0" else 0
    assert 0.93 * predicted <= live.peak <= 1.02 * predicted + beside


@pytest.mark.parametrize(("particles", "is_kept"), [(1, True), (2, False)])
def test_what_is_kept_of_a_truncation_is_within_its_budget(monkeypatch, particles, is_kept):
    """Beside what the formula says, whether the unroll keeps its steps or a replay takes them again."""
    monkeypatch.setenv("LEARNED_OPT_NATIVE", "0")
    monkeypatch.setattr(lstm_tape._kept, "tapes", {})
    monkeypatch.setattr(lstm_tape, "KEPT_NUMBERS", 2**24)
    rule = rules.get("rnnprop", dense_units=0)
    truncation = next(k for k in range(1, 50) if rule.network.most_coordinates(k + 1) < SIZE)
    config = MetaTrainerConfig(
        num_particles=particles, truncation=truncation, horizons=HorizonSchedule(longest=100, random_offsets=False)
    )
    trainer = MetaTrainer(rule, {"separate": Separate()}, config, estimators.get("backprop"))
    gc.collect()
    with LiveTensors([]) as live:
        trainer.step()
    n, kept = SIZE * particles, lstm_tape._kept.tapes[torch.float32]
    assert (kept.width * kept.num_blocks == n) is is_kept
    assert len(kept.memory) <= 2**24
    # A step's blocks, or one step's room on the way back, for every coordinate that is taken at once.
    assert live.peak <= 4 * (2**24 + 300 * SIZE) + 1.02 * predicted_bytes(rule, n, truncation)


def test_one_million_parameters_fit_in_four_gibibytes():
    rule = rules.get("rnnprop", dense_units=0)
    assert state_rows(rule) == 83
    assert predicted_bytes(rule, 2**20, 20) < 1.5 * 2**30
    assert predicted_bytes(rule, 2 * 2**20, 20) < 4 * 2**30


def test_the_documentation_states_the_formula():
    text = (Path(__file__).resolve().parent.parent / "docs" / "speed.md").read_text(encoding="utf-8")
    found = re.search(r"K = 20: 4·83 \+ 21 \+ 10 = (\d+) numbers", text)
    assert found and int(found[1]) == numbers_per_coordinate(rules.get("rnnprop", dense_units=0), 20)
