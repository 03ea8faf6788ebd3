"""Meta-training on several ranks: the numbers of one process, whatever the number of ranks, and one state for all."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator

import pytest
import rank_cases
import torch
import torchrun

from learned_opt import distributed
from learned_opt.distributed import ALONE, LostRank, Ranks
from learned_opt.estimators.base import Estimate
from learned_opt.estimators.sharded import mean_over_ranks
from learned_opt.meta_loss import MetaLoss

PROGRAM = torchrun.ROOT / "tests" / "rank_cases.py"

ENDING = """
import pathlib, torch
from learned_opt import distributed

def threads():
    return sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))

with distributed.start() as ranks:
    torch.optim.Adam([ranks.sum(torch.ones(2))])  # loads parts of torch that know of groups
    print(f"inside:{threads() > 0}\\n", end="", flush=True)
print(f"after:{threads()}\\n", end="", flush=True)
"""


@pytest.fixture(scope="module")
def two_then_four(tmp_path_factory):
    """Outer steps 1 and 2 on two ranks, 3 and 4 on four that go on from their states."""
    folder = tmp_path_factory.mktemp("ranks")
    for num_ranks, files in ((2, ["two.pt"]), (4, ["four.pt", "two.pt"])):
        done = torchrun.run(torchrun.command(num_ranks, PROGRAM, *files), folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / name, weights_only=True) for name in ("two.pt", "four.pt")]


@pytest.fixture(scope="module")
def one():
    """The same four steps in this process."""
    found: list[dict] = [{}, {}]
    for name in rank_cases.CASES:
        trainer = rank_cases.trainer_of(name)
        for half in found:
            half[name] = {"metrics": rank_cases.run(trainer, 2), "state": trainer.state_dict()}
    return found


def leaves(value, path="") -> Iterator[tuple[str, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
    else:
        for key, inner in items:
            yield from leaves(inner, f"{path}/{key}")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, in units of the largest entry."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-300)) if want.numel() else 0.0


@pytest.mark.parametrize("half", [0, 1], ids=["two ranks", "four ranks"])
@pytest.mark.parametrize("name", rank_cases.CASES)
def test_as_one_process(name, half, one, two_then_four):
    want, got = one[half][name], two_then_four[half][name]
    single = "single precision" in name
    for key, value in want["state"]["theta"].items():
        assert relative(got["state"]["theta"][key], value) <= (1e-6 if single else 1e-12)
    found = dict(leaves(got["state"]))
    assert found.keys() == dict(leaves(want["state"])).keys()
    for path, value in leaves(want["state"]):
        if isinstance(value, torch.Tensor):
            assert relative(found[path], value) <= (1e-3 if single else 1e-10), path
        elif isinstance(value, float):
            assert found[path] == pytest.approx(value, rel=1e-4 if single else 1e-10), path
        else:
            assert found[path] == value, path
    for got_metrics, want_metrics in zip(got["metrics"], want["metrics"]):
        assert got_metrics == pytest.approx(want_metrics, rel=1e-3 if single else 1e-9, nan_ok=True)


def test_the_cases_are_what_they_are_for(one, two_then_four):
    for name in ("backprop", "es", "pes", "nres", "mix", "imitation"):
        assert two_then_four[1][name]["state"]["totals"]["invalid"] > 0, f"{name}: every particle stayed valid"
    assert one[1]["curriculum"]["state"]["curriculum"]["stage"] > 0
    held = {name: (two_then_four[0][name]["held"], two_then_four[1][name]["held"]) for name in rank_cases.CASES}
    assert held["backprop"] == ([8, 8], [4, 4, 4, 4])
    assert held["backprop of 5 particles"] == ([5, 5], [3, 3, 2, 2])
    assert held["fewer particles than ranks"] == ([1, 1], [1, 1, 0, 0])
    assert held["es"] == ([2, 2], [1, 1, 1, 1])
    assert all(sum(four) == sum(two) for two, four in held.values())


def test_shares_are_balanced_and_complete():
    for size in (1, 2, 3, 7):
        for count in (0, 1, 5, 8):
            for first in (0, 3):
                shares = [Ranks(rank, size).share(range(count), first) for rank in range(size)]
                assert sorted(k for share in shares for k in share) == list(range(count))
                assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks(0, 3).share("abcd", first=2) == ["b"]


def test_alone_nothing_is_exchanged():
    value = torch.tensor([1.0, 2.0])
    assert ALONE.sum(value) is value and ALONE.highest(3) == 3 and ALONE.gather("x") == ["x"]
    estimate = Estimate(grads={"a": value}, meta_loss=1.0, num_inner_steps=2, num_invalid=0, num_clipped=0, weight=2.0)
    assert mean_over_ranks([estimate], ALONE, [4.0]) == ([estimate], [4.0])
    with pytest.raises(KeyError):
        ALONE.first(lambda: {}["missing"])


class Added(Ranks):
    """Two ranks of which this process is both: what the other one contributes is given."""

    def __init__(self, other: torch.Tensor) -> None:
        super().__init__(0, 2)
        self.other = other

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.other


def test_means_are_weighted_by_valid_particles():
    mine = Estimate(
        grads={"a": torch.tensor([2.0])}, meta_loss=1.0, num_inner_steps=10, num_invalid=1, num_clipped=0, weight=3.0
    )
    # weight, weight x meta-loss, counts, weight x gradient, and the number that rides along
    other = torch.tensor([1.0, 5.0, 20.0, 0.0, 7.0, -2.0, 100.0], dtype=torch.float64)
    (mean,), (number,) = mean_over_ranks([mine], Added(other), [1.0])
    assert mean.grads["a"].tolist() == [(3 * 2.0 - 2.0) / 4] and mean.grads["a"].dtype == torch.float32
    assert mean.meta_loss == (3 * 1.0 + 5.0) / 4 and number == 101.0
    assert (mean.num_inner_steps, mean.num_invalid, mean.num_clipped, mean.weight) == (30, 1, 7, 4.0)
    other[5] = math.inf
    (bad,), _ = mean_over_ranks([mine], Added(other), [1.0])
    assert not torch.isfinite(bad.grads["a"]).any()  # one rank's overflow skips the step on all


def test_log_mean_over_ranks_is_that_of_all_particles():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(4, 5, dtype=torch.float64, generator=generator) + 0.5
    initial = torch.ones(5, dtype=torch.float64)
    for average in ("mean", "final"):
        meta_loss = MetaLoss(normalization="log_mean", average=average)
        valid = torch.tensor([True, True, False, True, True])
        want, weights = meta_loss.weights(losses, initial, valid)
        parts = [slice(0, 3), slice(3, 5)]
        sums = [torch.cat([losses[:, p][:, valid[p]].sum(1), valid[p].sum()[None].double()]) for p in parts]
        for p in parts:
            got, own = meta_loss.weights(losses[:, p], initial[p], valid[p], lambda _: sums[0] + sums[1])
            assert float(got) == pytest.approx(float(want), rel=1e-14)
            # The mean over ranks weighs each by its valid particles.
            share = int(valid[p].sum()) / int(valid.sum())
            torch.testing.assert_close(own * share, weights[:, p], rtol=1e-12, atol=0)


def test_one_numbered_gpu_is_not_for_several_ranks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Ranks(0, 1).place("cuda:1") == "cuda:1" and Ranks(0, 2, 0, 1).place("cpu") == "cpu"
    with pytest.raises(ValueError, match="device is 'cuda:0', one GPU, for 2 ranks on a machine; say 'cuda'"):
        Ranks(0, 2, 0, 2).place("cuda:0")


def test_a_rank_whose_torchrun_is_gone_says_so(monkeypatch):
    with socket.socket() as taken:  # bound, and nobody listens: a connection is refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        values = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setattr(distributed, "_LAUNCHER_SECONDS", 0.3)
        said = rf"torchrun .* cannot be reached at 127\.0\.0\.1:{port} .*start it again"
        with pytest.raises(LostRank, match=said), distributed.start():
            pass


def test_no_thread_of_the_network_outlives_the_group(tmp_path):
    """A thread that is left ends a process with SIGABRT, now and then, where the interpreter has gone before it."""
    (tmp_path / "ending.py").write_text(ENDING)
    done = torchrun.run(torchrun.command(2, "ending.py"), tmp_path, anew=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["after:0", "after:0", "inside:True", "inside:True"]
