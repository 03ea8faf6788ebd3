"""The contenders of the speed benchmark compute what this library computes, and its arithmetic is right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from meta_training_cases import CASES, TRUNCATION, case, difference

from benchmarks.meta_training.plain_loop import PlainLoop, PlainOptimizer, PlainTask
from benchmarks.meta_training.report import markdown, summarize, table
from benchmarks.meta_training.worker import Contender, environment, make
from benchmarks.meta_training.workloads import TITLES, SpeedWorkload, check_names, floors, forward_flops
from tasks.sinusoid import Sinusoid

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_plain_loop_computes_our_meta_gradient(name):
    given = case(name)
    loop = PlainLoop(given.workload, given.theta)
    loop.optimizer.double().load_theta(given.theta)
    loop.shared = {n: v.double() if v.is_floating_point() else v for n, v in loop.shared.items()}
    num, pairs = len(given.params), given.workload.pairs
    shapes = {n: v.shape for n, v in loop.family.init_params({}, torch.Generator().manual_seed(0)).items()}

    def start(column):
        parts = given.params[column].split([s.numel() for s in shapes.values()])
        params = {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts)}
        constants = {n: v[column] for n, v in given.constants.items()}
        return PlainTask(loop, constants, params, given.first_batch.get("rows", torch.zeros(num, 1))[column])

    rows = given.batches.get("rows", torch.zeros(TRUNCATION, num, 1))
    if pairs:
        for index in range(num // 2):
            noise = PlainOptimizer(given.workload.rule.config).double()
            noise.load_theta({n: v[index] for n, v in given.noise.items()})
            loop.tasks[index] = [start(index), start(index + num // 2)]
            loop.seen[index] = [torch.zeros_like(p) for p in noise.parameters()]
            loop.pair(index, [p.detach() for p in noise.parameters()], rows[:, index])
    else:
        for column in range(num):
            loop.truncation(start(column), rows[:, column]).backward()
    assert difference(loop.optimizer.theta_grads(), given.grads) < 1e-8


def test_the_jax_version_computes_our_meta_gradient():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    # In a process of its own: jax objects to every later fork of the process that has loaded it.
    script = ROOT / "tests" / "meta_training_cases.py"
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiling is most of the time
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **quick}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 7
    assert all(value < 1e-8 for value in found.values()), found


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_plain_training_moves_theta_after_the_last_task(name):
    loop = PlainLoop(
        SpeedWorkload.of(name, truncation=2, num_particles=4), SpeedWorkload.of(name).rule.init_theta(generator())
    )
    before = [p.detach().clone() for p in loop.optimizer.parameters()]
    for index in range(len(loop.tasks)):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, loop.optimizer.parameters())), index
        assert loop.step() == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, loop.optimizer.parameters()))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_presets_are_the_workloads_of_the_tables():
    sizes = {name: SpeedWorkload.of(name) for name in TITLES}
    assert {n: w.num_parameters for n, w in sizes.items()} == {
        "w1": 1510,
        "w2": 10,
        "w3": 1510,
        "w4": 98658,
        "w5": 1510,
    }
    assert {n: w.num_particles for n, w in sizes.items()} == {"w1": 8, "w2": 128, "w3": 8, "w4": 4, "w5": 8}
    assert {w.truncation for w in sizes.values()} == {20} and {w.episode for w in sizes.values()} == {5}
    assert [w.name for w in sizes.values() if w.exact] == ["w5"] and [w.name for w in sizes.values() if w.pairs] == [
        "w3"
    ]
    for workload in sizes.values():
        trainer, config = workload.settings.trainer, workload.rule.config
        assert (trainer.optimizer, trainer.learning_rate_at(7), trainer.clip_norm) == ("Adam", 1e-3, 1.0)
        assert (config.num_layers, config.hidden_size, config.dense_units) == (2, 20, 0)
        assert (config.output_scale, config.output_tanh, config.inputs, config.beta) == (0.1, True, "normalized", 0.95)


@pytest.mark.parametrize(("name", "floor"), [("w1", 2660), ("w2", 401_600), ("w3", 3990), ("w5", 2660)])
def test_floors_of_the_rules_matrix_products(name, floor):
    # By hand: 22·80 + 40·80 + 20 products and sums a coordinate, at 120 GFLOP/s.
    assert floors(SpeedWorkload.of(name), 120e9)[0] == pytest.approx(floor, rel=1e-3)


def test_arithmetic_of_the_tasks():
    mlp, conv, quadratic = (SpeedWorkload.of(name) for name in ("w1", "w4", "w2"))
    first, second = 2 * 64 * 64 * 20, 2 * 64 * 20 * 10
    assert mlp.task_flops == 2 * first + 3 * second
    assert SpeedWorkload.of("w5").task_flops == 3 * mlp.task_flops
    assert SpeedWorkload.of("w3").task_flops == 2 * mlp.task_flops
    layers = [64 * 9 * 32, 16 * 9 * 32 * 64, 4 * 9 * 64 * 136, 136 * 10]
    assert forward_flops(conv.family) == [2 * 64 * n for n in layers]
    assert quadratic.task_flops == 400
    both = floors(conv, 1e9)
    assert both[1] == pytest.approx(1e9 / (conv.rule_flops + conv.task_flops)) and both[1] < both[0]
    with pytest.raises(ValueError, match="the arithmetic of sinusoid is not known; use image_mlp"):
        forward_flops(Sinusoid())


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="unknown workload 'w9'; choose from w1, w2"):
        check_names(["w1", "w9"])
    with pytest.raises(ValueError, match="unknown contender 'tf'; choose from ours, ours-torch, jax"):
        make("tf", SpeedWorkload.of("w2"), 1)


def test_only_the_path_without_compiler_turns_compiled_kernels_off():
    assert environment("ours-torch", 2)["LEARNED_OPT_NATIVE"] == "0"
    assert "LEARNED_OPT_NATIVE" not in environment("ours", 2)
    assert "device_count=2" in environment("jax", 2)["XLA_FLAGS"]


def test_a_contender_answers_from_a_process_of_its_own():
    with_torch = Contender("ours-torch", "w2", 1, truncation=2)
    try:
        answer = with_torch.run(0.01)
    finally:
        with_torch.close()
    assert answer["done"] % (2 * 128) == 0 and answer["done"] > 0
    assert answer["rate"] == pytest.approx(answer["done"] / answer["seconds"])
    assert 0 < answer["peak_mib"] < 4000


def test_ratios_are_of_one_round_and_floors_of_the_measured_products():
    workload = SpeedWorkload.of("w1")
    flops = workload.rule_flops + workload.task_flops

    def rates(*values):
        return [{"rate": value, "peak_mib": 10.0 * i, "seconds": 1.0} for i, value in enumerate(values)]

    # The machine halves its speed in the second round: ratios and shares of the floor must not notice.
    rounds = {"ours": rates(100.0, 50.0), "jax": rates(80.0, 40.0), "products": rates(400 * flops, 200 * flops)}
    found = summarize(workload, rounds, {"ours": {}, "jax": {"start_seconds": 3.0}})
    jax = found["contenders"]["jax"]
    assert jax["ours_is_faster_by"] == {"median": 1.25, "least": 1.25, "greatest": 1.25}
    assert jax["of_floor"] == pytest.approx({"median": 0.2, "least": 0.2, "greatest": 0.2})
    assert (jax["peak_mib"], jax["start_seconds"], found["floor"]) == (10.0, 3.0, pytest.approx(300.0))
    rows = [{"threads": 2, **found}]
    assert "1.25 [1.25, 1.25]" in table(rows) and "20%" in table(rows)
    assert (
        markdown(rows).splitlines()[3].startswith("| W1, digits, MLP 64-20-10 | 2 | strong JAX | 60 [40, 80] | 20% |")
    )
