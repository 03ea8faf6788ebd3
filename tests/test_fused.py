"""The fused kernel of the LSTM rule: its numbers in Triton's interpreter, and what happens where it fails.

Kernels run in processes of their own (tests/fused_runs.py), in which nothing has imported Triton yet: it reads then
whether to interpret. What needs no kernel is tested here with one made of the rule itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_cases import artifact_of, model_of, train

from learned_opt import LearnedOptimizer, rules
from learned_opt.coordinates import default_chunk_size
from learned_opt.rules.kernels import fused

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton, on Linux"
)


def run(what: str, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """The JSON that tests/fused_runs.py prints."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    settings.pop("LEARNED_OPT_FUSED", None)
    settings.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "tests" / "fused_runs.py", what]
    done = subprocess.run(command, cwd=ROOT, env=settings | environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_the_kernel_computes_what_the_rule_defines(tmp_path):
    result = run("numbers", tmp_path, TRITON_INTERPRET="1")
    checks = {name: value for name, value in result.items() if name.startswith("check of ")}
    steps = {name: value for name, value in result.items() if name not in checks}
    assert {"compact, 3", "compact, 64", "compact, 70", "rnnprop, 70", "l2l, 70"} <= set(steps)
    assert not {name: text for name, text in steps.items() if text}
    assert len(checks) == 14
    # Far below the limit of 1, at which plain torch would take over.
    assert not {name: worst for name, worst in checks.items() if not worst <= (0.1 if "float32" in name else 0.6)}


@needs_triton
def test_the_optimizer_steps_with_the_kernel_as_without(tmp_path):
    result = run("optimizer", tmp_path, TRITON_INTERPRET="1")
    assert len(result) == 5
    for name, (launches, worst, same_counts) in result.items():
        assert launches > 10, f"{name}: the kernel was not used"
        # Numbers kept in bfloat16 may be rounded to the other side, in each of the four steps.
        assert worst < (2 if "bfloat16" in name else 30), name
        assert same_counts, name


@needs_triton
def test_the_kernel_compiles_for_gpus(tmp_path):
    result = run("compiled", tmp_path)
    assert set(result) == {"compact, 75", "compact, 80", "rnnprop, 90"}
    for name, (matrix_products, shared, size) in result.items():
        assert (matrix_products > 0) == ("75" not in name), f"{name}: tensor cores where there are some"
        assert shared <= 48 * 1024, name
        assert size > 1000, name


def emulated(config: Any, weights: Any, params: Any, grads: Any, rows: Any, counts: Any, factors: Any) -> None:
    """What the kernel does, done by the rule: theta is read back from the flat weights."""
    rule = rules.LSTMRule(config)
    theta, start = {}, 0
    for name, value in rule.init_theta(torch.Generator()).items():
        theta[name] = weights[start : start + value.numel()].view_as(value)
        start += value.numel()
    moved, new_rows = fused._by_the_rule(rule, theta, params, grads, rows, counts, factors)
    params.copy_(moved)
    rows.copy_(new_rows)


def trained(name: str = "compact", num_steps: int = 3, **settings: Any) -> list[torch.Tensor]:
    """Parameters after some steps."""
    model = model_of()
    train(model, LearnedOptimizer(model.parameters(), artifact_of(name), **settings), num_steps)
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch treats the CPU as a GPU, and has not tried any kernel yet."""
    monkeypatch.setattr(fused, "wanted", lambda rule, device, dtype: True)
    monkeypatch.setattr(fused, "_trusted", {})


def test_a_sound_kernel_is_tried_once_and_then_trusted(on_cpu, monkeypatch):
    sizes = []

    def launch(*args: Any) -> None:
        sizes.append(args[2].numel())
        emulated(*args)

    monkeypatch.setattr(fused, "launch", launch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = trained()
    assert sizes == [fused.SAMPLE, fused.SAMPLE, 26, 26, 26]
    monkeypatch.undo()
    for mine, expected in zip(moved, trained()):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_each_setting_and_dtype_is_tried_for_itself(on_cpu, monkeypatch):
    monkeypatch.setattr(fused, "launch", emulated)
    trained("compact")
    trained("rnnprop")
    trained("compact", state_dtype=torch.bfloat16)
    assert len(fused._trusted) == 3
    assert all(fused._trusted.values())


def raises(*args: Any) -> None:
    raise RuntimeError("no such instruction")


def wrong(*args: Any) -> None:
    emulated(*args)
    args[2].add_(0.01)


def forgets(*args: Any) -> None:
    rows = args[4].clone()
    emulated(*args)
    args[4][-1] = rows[-1]


def nothing_but_nan(*args: Any) -> None:
    args[2].fill_(float("nan"))


@pytest.mark.parametrize(
    ("launch", "why"),
    [
        (raises, r"RuntimeError: no such instruction"),
        (wrong, r"ArithmeticError: its numbers differ from the rule's by \S+ times the tolerance"),
        (forgets, r"ArithmeticError: its numbers differ"),
        (nothing_but_nan, r"ArithmeticError: its numbers differ from the rule's by inf"),
    ],
)
@pytest.mark.parametrize("name", ["compact", "rnnprop", "l2l"])
def test_a_failing_kernel_is_replaced_by_plain_torch_with_one_warning(on_cpu, monkeypatch, launch, why, name):
    monkeypatch.setattr(fused, "launch", launch)
    with pytest.warns(fused.FusedStepWarning, match=why) as caught:
        moved = trained(name)
    assert len(caught) == 1
    assert "LEARNED_OPT_FUSED=0" in str(caught[0].message)
    monkeypatch.undo()
    assert all(map(torch.equal, moved, trained(name)))


def test_a_kernel_that_fails_later_leaves_the_step_to_plain_torch(on_cpu, monkeypatch):
    calls = []

    def launch(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 4:
            raise RuntimeError("out of memory")
        emulated(*args)

    monkeypatch.setattr(fused, "launch", launch)
    with pytest.warns(fused.FusedStepWarning, match="out of memory") as caught:
        moved = trained(num_steps=5)
    assert len(caught) == 1
    assert len(calls) == 5
    monkeypatch.undo()
    for mine, expected in zip(moved, trained(num_steps=5)):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_no_stretch_of_memory_take_plain_torch(on_cpu, monkeypatch):
    monkeypatch.setattr(fused, "launch", raises)
    param = torch.nn.Parameter(torch.ones(8)[::2])
    param.grad = torch.ones(4)
    LearnedOptimizer([param], artifact_of("compact")).step()
    assert not torch.equal(param.detach(), torch.ones(4))


def test_who_gets_the_kernel(monkeypatch):
    cuda, float32 = torch.device("cuda:0"), torch.float32
    compact = rules.get("compact")
    monkeypatch.delenv("LEARNED_OPT_FUSED", raising=False)
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    assert fused.wanted(compact, cuda, float32)
    assert fused.wanted(rules.get("l2l"), cuda, float32)
    assert not fused.wanted(compact, torch.device("cpu"), float32)
    assert not fused.wanted(compact, cuda, torch.float64)
    assert not fused.wanted(rules.get("adam"), cuda, float32)
    assert not fused.wanted(rules.get("compact", hidden_size=65), cuda, float32)
    assert not fused.wanted(rules.get("compact", dense_units=65), cuda, float32)
    monkeypatch.setenv("LEARNED_OPT_FUSED", "1")
    assert fused.wanted(compact, cuda, float32)
    monkeypatch.setenv("LEARNED_OPT_FUSED", "0")
    assert not fused.wanted(compact, cuda, float32)
    monkeypatch.delenv("LEARNED_OPT_FUSED")
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    assert not fused.wanted(compact, cuda, float32)


@pytest.mark.parametrize(
    ("version", "enough"), [("3.2.0", False), ("3.3.0", True), ("3.10.1+git1", True), ("4.0", True)]
)
def test_old_versions_of_triton_are_left_alone(monkeypatch, version, enough):
    module = types.ModuleType("triton")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", module)
    assert fused._has_triton.__wrapped__() == enough
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not fused._has_triton.__wrapped__()


def test_chunks_on_a_gpu_are_large_and_bounded():
    for name in ("adam", "compact", "rnnprop"):
        num_rows = rules.get(name).rows_per_coordinate
        size = default_chunk_size(num_rows, "cuda")
        assert size > 20 * default_chunk_size(num_rows)
        assert size * (2 * num_rows + 1) * 4 <= 256 * 2**20


def test_triton_is_not_imported_with_the_package():
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "import learned_opt, learned_opt.optimizer, learned_opt.rules.kernels.fused\n"
        "assert 'learned_opt.rules.kernels.fused_kernel' not in sys.modules\n"
        "assert before or 'triton' not in sys.modules\n"
        "sys.modules['triton'] = None\n"
        "import learned_opt.rules.kernels.fused_kernel\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
