"""The compiled LSTM kernel against the rules in float64, and against plain torch where numbers are not finite."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import torch
from rule_cases import arguments, in_dtype, rows_of, told

from learned_opt import estimators, rules
from learned_opt.batched import BatchedFamily
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan
from learned_opt.rules import UpdateRule, slice_coordinates
from learned_opt.rules.context import TensorLayout, context
from learned_opt.rules.features import agreement
from learned_opt.rules.inplace import stepper, update_
from learned_opt.rules.kernels import build, native
from learned_opt.truncation import HorizonSchedule
from tasks.quadratic import Quadratic

VARIANTS = {name: (name, {}) for name in rules.RULES if hasattr(rules.get(name), "native_kernel")} | {
    "growing": ("mixture", {"growth": 0.2}),
    "told_of_signal": ("mixture", {"growth": 0.2, "signal": True}),
    "hushed": ("mixture", {"growth": 0.2, "signal": True, "loudness": 0.5}),
    "leaking": ("mixture", {"growth": 0.2, "signal": True, "leak": 0.3}),
    "hushed_and_leaking": ("mixture", {"growth": 0.2, "leak": 0.2, "signal": True, "loudness": 0.5}),
    "clipping": ("mixture", {"growth": 0.2, "clip": 1.5}),
    "braking": ("mixture", {"growth": 0.2, "clip": 1.5, "brake": 0.5}),
    "all_of_them": (
        "mixture",
        {"growth": 0.2, "leak": 0.2, "signal": True, "loudness": 0.5, "clip": 1.5, "brake": 0.3, "most_braked": 0.8}
        | {"relative_eps": 0.1},
    ),
    "resting": ("mixture", {"growth": 0.2, "relative_eps": 0.3}),
    "three_layers": ("lstm", {"num_layers": 3, "hidden_size": 5, "dense_units": 3, "output_tanh": False}),
    "three_layers_log": (
        "lstm",
        {"num_layers": 3, "hidden_size": 5, "dense_units": 3, "output_tanh": False, "inputs": "log_and_sign"},
    ),
    "one_unit": ("lstm", {"hidden_size": 1, "beta": 0.9}),
    "two_single_units": ("lstm", {"hidden_size": 1, "num_layers": 2}),
    "wide_log": ("lstm", {"hidden_size": 32, "dense_units": 20, "inputs": "log_and_sign", "log_range": 5.0}),
}
ROUNDING = {"rtol": 2e-5, "atol": 5e-6}

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(params=list(VARIANTS))
def rule(request):
    name, settings = VARIANTS[request.param]
    return rules.get(name, **settings)


def theta_of(rule, seed=0):
    """Float32 theta away from its special initial values."""
    generator = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(generator)
    return {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in theta.items()}


def grads_of(n, num_steps=4, seed=1):
    """Every coordinate has a scale of its own; the second of them has gradient zero."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-5, 3, n)[torch.randperm(n, generator=generator)]
    grads = torch.randn(num_steps, n, generator=generator) * scales
    grads[:, 1:2] = 0.0
    return grads


def double(tensors):
    return {name: value.double() for name, value in tensors.items()}


def started(rule, theta, n, num_steps=3, seed=9):
    """State that has seen some steps."""
    state = rule.init_state(n)
    for grads in grads_of(n, num_steps, seed):
        state = rule.update(theta, grads, torch.zeros(n), state)[1]
    return state


def assert_close_to_largest(got, want, share):
    for name, value in want.items():
        assert float((got[name].double() - value).abs().max()) <= share * float(value.abs().max()) + 1e-30, name


@pytest.mark.parametrize("count", ["shared", "own"])
def test_a_step_is_the_rules(rule, count):
    theta = theta_of(rule)
    for n in (1, 31, 32, 33, 100, 1000):
        state = rule.init_state(n)
        if "step" in state:
            state["step"] = torch.zeros(1) if count == "shared" else torch.arange(n) % 7.0
        step, untouched, largest = stepper(rule, theta), state, torch.zeros(n)
        for grads in grads_of(n):
            say = told(rule, n)
            want, want_state = rule.update(
                double(theta), grads.double(), torch.zeros(n).double(), double(state), *rows_of(say, n)
            )
            got, state = step(grads, torch.zeros(n), state, False, say)
            torch.testing.assert_close(got.double(), want, **ROUNDING)
            largest = torch.maximum(largest, grads.abs())
            for name, value in want_state.items():  # what an average has seen can cancel
                by = largest.pow({"m": 1, "v": 2}.get(name, 0)).clamp_min(1e-30)
                torch.testing.assert_close(state[name] / by, (value / by).float(), **ROUNDING)
            assert (got[1:2] == 0).all() and (n == 1 or got.count_nonzero() == n - 1)
        assert all((v == 0).all() for name, v in untouched.items() if name != "step")


def test_in_place_and_between_other_coordinates_the_bits_are_the_same(rule):
    theta, n = theta_of(rule), 45
    step, first, grads = stepper(rule, theta), started(rule, theta, n), grads_of(n)
    inside = {name: torch.full((*v.shape[:-1], n + 9), 7.0) for name, v in first.items()}
    views = {name: v[..., 4 : 4 + n].copy_(first[name]) for name, v in inside.items()}
    copied = {name: v.clone() for name, v in first.items()}
    state, scratch, spread = first, {}, torch.full((n, 2), 3.0)
    for row in grads:
        want, state = step(row, row, state, False)
        got, copied = step(row, row, copied, True)
        spread[:, 0] = row
        strided = update_(rule, theta, spread[:, 0], row, views, scratch)
        if "step" in views:
            views["step"] += 1
        assert torch.equal(got, want) and torch.equal(strided, want)
        assert all(torch.equal(copied[name], v) and torch.equal(views[name], v) for name, v in state.items())
    for value in inside.values():
        assert (value[..., :4] == 7).all() and (value[..., 4 + n :] == 7).all()


def test_rows_that_lie_unevenly_are_copied(rule):
    theta, n = theta_of(rule), 10
    want_state = started(rule, theta, n)
    state = {name: v.movedim(-1, 0).contiguous().movedim(0, -1) for name, v in want_state.items()}
    if "step" in state:
        state["step"] = torch.stack([state["step"]] * 2, -1)[:, 0]
    step, in_place = (stepper(rule, theta) for _ in range(2))
    for grads in grads_of(n):  # in place again and again
        want, want_state = step(grads, torch.zeros(n), want_state, False)
        got, state = in_place(grads, torch.zeros(n), state, True)
        assert torch.equal(got, want) and all(torch.equal(state[name], v) for name, v in want_state.items())
    one_number = torch.tensor(0.5).expand(n)
    want, _ = stepper(rule, theta)(one_number.clone(), torch.zeros(n), rule.init_state(n), False)
    got, _ = stepper(rule, theta)(one_number, torch.zeros(n), rule.init_state(n), False)
    assert torch.equal(got, want)


def test_several_sets_of_theta_side_by_side(rule):
    thetas, n = [theta_of(rule, seed) for seed in range(3)], 33
    stacked = {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}
    state, grads = started(rule, thetas[0], 3 * n), grads_of(3 * n)
    together = stepper(rule, stacked, 3)
    alone = [slice_coordinates(state, k * n, (k + 1) * n) for k in range(3)]
    for row in grads:
        got, state = together(row, row, state, False)
        for k, theta in enumerate(thetas):
            part = row[k * n : (k + 1) * n]
            want, alone[k] = stepper(rule, theta)(part, part, alone[k], False)
            assert torch.equal(got[k * n : (k + 1) * n], want)
            mine = slice_coordinates(state, k * n, (k + 1) * n)
            assert all(torch.equal(mine[name], v) for name, v in alone[k].items())


@pytest.mark.parametrize("name", ["compact", "rnnprop", "l2l"])
def test_several_sets_of_theta_without_a_kernel(name, monkeypatch):
    monkeypatch.setenv("LEARNED_OPT_NATIVE", "0")
    rule, n = rules.get(name), 33
    thetas = [theta_of(rule, seed) for seed in range(3)]
    together = stepper(rule, {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}, 3)
    state, grads = started(rule, thetas[0], 3 * n), grads_of(3 * n)
    alone = [slice_coordinates(state, k * n, (k + 1) * n) for k in range(3)]
    for row in grads:
        got, state = together(row, row, state, False)
        for k, theta in enumerate(thetas):
            part = row[k * n : (k + 1) * n]
            want, alone[k] = rule.update(theta, part, part, alone[k])
            torch.testing.assert_close(got[k * n : (k + 1) * n], want, **ROUNDING)
            mine = slice_coordinates(state, k * n, (k + 1) * n)
            for name, value in alone[k].items():
                torch.testing.assert_close(mine[name], value, **ROUNDING)


@pytest.mark.parametrize("num_steps", [1, 3, 20, 40])
def test_backward_is_autograds(rule, num_steps):
    theta = theta_of(rule)
    for n in (1, 70):
        whole = started(rule, theta, n + 30)
        state = slice_coordinates(whole, 13, 13 + n)
        grads, loss_grads = grads_of(n + 5, num_steps)[:, 2 : 2 + n], grads_of(n, num_steps, seed=5).flip(1)
        say = told(rule, n, num_steps)
        got = rule.backward(theta, grads, torch.zeros(n), state, loss_grads, *arguments(say))
        want = UpdateRule.backward(
            rule,
            double(theta),
            grads.double(),
            torch.zeros(n).double(),
            double(state),
            loss_grads.double(),
            *arguments(in_dtype(say, torch.float64)),
        )
        assert_close_to_largest(got, want, 5e-5)
        assert all(v.abs().max() > 0 for v in want.values())


def test_vjp_is_autograds(rule):
    theta, generator = theta_of(rule), torch.Generator().manual_seed(3)
    clips = rule.settings().get("clip", 0) > 0  # alone in its tensor, what is clipped has a derivative of zero
    for n in (33, 600) if clips else (1, 33, 600):
        state, grads, d_update = started(rule, theta, n), grads_of(n)[0] + 0.1, torch.randn(n, generator=generator)
        d_state = {name: torch.randn(v.shape, generator=generator) for name, v in state.items()}
        layout = (TensorLayout((n // 3, n - n // 3)) if n > 1 else TensorLayout((1,)),) if rule.num_context else ()
        want = UpdateRule.vjp(
            rule,
            double(theta),
            grads.double(),
            torch.zeros(n).double(),
            double(state),
            d_update.double(),
            double(d_state),
            *layout,
        )
        got = rule.vjp(theta, grads, torch.zeros(n), state, d_update, d_state, *layout)
        assert_close_to_largest(got[0], want[0], 5e-5)
        assert_close_to_largest({"grads": got[1], "params": got[2]}, {"grads": want[1], "params": want[2]}, 2e-4)
        assert_close_to_largest(got[3], want[3], 2e-4)
        assert got[3].keys() == state.keys() and want[1].abs().max() > 0


ODD = [float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e19, 1e-19, 1e-30, 1e-45, -0.0, 0.0, 1.0]


def test_what_is_not_finite_shows_where_the_rules_does(rule):
    theta, n = theta_of(rule), 4 * len(ODD)
    for seed in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        steady = torch.tensor(ODD * 4)[order]
        state = want_state = rule.init_state(n)
        for t in range(4):
            grads = torch.where(torch.arange(n) % 4 == t, steady, 1.0)  # one odd gradient a coordinate
            want, want_state = rule.update(theta, grads, torch.zeros(n), want_state)
            got, state = stepper(rule, theta)(grads, torch.zeros(n), state, False)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, equal_nan=True)
            for name, value in want_state.items():
                assert torch.equal(state[name].isfinite(), value.isfinite()), (name, t)


def test_threads_change_no_bit(rule):
    theta, n = theta_of(rule), 3000
    state, grads = started(rule, theta, n), grads_of(n, 12)
    num_threads, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            update, after = stepper(rule, theta)(grads[0], grads[0], state, False)
            back = rule.backward(theta, grads, grads[0], state, grads)
            d_state = {name: torch.ones_like(v) for name, v in state.items()}
            pulled = rule.vjp(theta, grads[0], grads[0], state, grads[1], d_state)
            results.append([update, *after.values(), *back.values(), *pulled[0].values(), *pulled[3].values()])
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_theta_may_hold_more(rule):
    theta, n = theta_of(rule), 8
    more = {"initial_params": torch.ones(5), **theta}
    state, grads = started(rule, theta, n), grads_of(n)
    assert torch.equal(stepper(rule, more)(grads[0], grads[0], state, False)[0], stepper(rule, theta)(
        grads[0], grads[0], state, False
    )[0])  # fmt: skip
    want = rule.backward(theta, grads, grads[0], state, grads)
    got = rule.backward(more, grads, grads[0], state, grads)
    assert list(got) == list(more) and (got["initial_params"] == 0).all() and got["initial_params"].shape == (5,)
    assert all(torch.equal(got[name], v) for name, v in want.items())


def test_no_coordinates(rule):
    theta, nothing = theta_of(rule), torch.zeros(0)
    update, _ = stepper(rule, theta)(nothing, nothing, rule.init_state(0), False)
    back = rule.backward(theta, torch.zeros(2, 0), nothing, rule.init_state(0), torch.zeros(2, 0))
    assert update.shape == (0,) and all((v == 0).all() for v in back.values())


def test_mixed_dtypes_are_refused():
    rule = rules.get("compact")
    with pytest.raises(TypeError, match=r"works on float32 tensors on the CPU; got torch.float64 on cpu. Hold theta"):
        stepper(rule, theta_of(rule))(torch.ones(3).double(), torch.zeros(3), rule.init_state(3), False)


def test_wide_networks_are_left_to_torch():
    rule = rules.get("lstm", hidden_size=200)
    assert rule.native_kernel(rule.init_theta(torch.Generator())) is None


def test_the_environment_turns_it_off(monkeypatch):
    rule = rules.get("compact")
    theta, state, grads = theta_of(rule), rule.init_state(9), grads_of(9)
    assert rule.native_kernel(theta) is not None and rule.native_kernel(double(theta)) is None
    got = rule.backward(theta, grads, grads[0], state, grads)
    monkeypatch.setenv("LEARNED_OPT_NATIVE", "0")
    assert rule.native_kernel(theta) is None
    want = rule.backward(theta, grads, grads[0], state, grads)
    assert_close_to_largest(got, double(want), 1e-5)
    assert any(not torch.equal(got[name], v) for name, v in want.items())


def test_a_compiler_that_fails_leaves_plain_torch(monkeypatch, tmp_path):
    rule = rules.get("compact")
    theta, state, grads = theta_of(rule), rule.init_state(9), grads_of(9)
    monkeypatch.setenv("LEARNED_OPT_NATIVE", "0")
    want = rule.backward(theta, grads, grads[0], state, grads)
    monkeypatch.delenv("LEARNED_OPT_NATIVE")
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", "echo 'fatal error: no space' >&2; exit 1")))
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    with pytest.warns(
        build.NativeWarning, match=r"lstm_kernel could not be built or loaded \(.*broken: fatal error: no"
    ):
        got = rule.backward(theta, grads, grads[0], state, grads)
    again = rule.backward(theta, grads, grads[0], state, grads)  # without another warning
    assert all(torch.equal(got[name], v) and torch.equal(again[name], v) for name, v in want.items())


@pytest.mark.parametrize(("order", "kernels"), [(1, "0"), (1, "1"), (2, "1")], indirect=["kernels"])
@pytest.mark.usefixtures("kernels")
def test_meta_gradients_in_float32(rule, order):
    results = []
    for dtype in (torch.float32, torch.float64):
        theta = {n: v.to(dtype) for n, v in theta_of(rule).items()}
        work = estimators.Workload(
            rule=rule,
            batched=BatchedFamily(Quadratic(dim=4), dtype=dtype),
            plan=EpisodePlan(split="meta_train", run_seed=3, horizons=HorizonSchedule(longest=7)),
            meta_loss=MetaLoss(),
            truncation=5,
        )
        estimator = estimators.get("backprop", order=order)
        state = estimator.init(work, theta, [0, 1, 2])
        for _ in range(2):
            got = estimator.estimate(work, theta, state)
        results.append(got)
    assert results[0].meta_loss == pytest.approx(results[1].meta_loss, rel=1e-4, abs=1e-5)
    assert_close_to_largest(results[0].grads, results[1].grads, 2e-3)


def test_forked_processes_do_not_wait_for_threads():
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    code = """
import os, torch
from learned_opt import rules
torch.set_num_threads(2)
rule = rules.get("compact")
theta, state, grads = rule.init_theta(torch.Generator()), rule.init_state(10000), torch.ones(5, 10000)
want = rule.backward(theta, grads, grads[0], state, grads)
child = os.fork()
if not child:
    got = rule.backward(theta, grads, grads[0], state, grads)
    os._exit(0 if all(torch.equal(got[name], v) for name, v in want.items()) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = fork_server.run("-c", code)
    assert done.returncode == 0, done.stderr


# How libraries are built and kept: with a source that compiles in no time.


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tiny.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }\n')
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a compiler that notes that it was called."""
    compiler = build._compiler()[0]
    counting = script(tmp_path / "counting", f'echo "$@" >> {tmp_path}/calls; exec {compiler} "$@"')
    monkeypatch.setenv("CXX", str(counting))
    monkeypatch.setenv("LEARNED_OPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def num_builds(cache):
    return sum("tiny.cpp" in line for line in (cache.parent / "calls").read_text().splitlines())


def test_a_library_is_built_once(source, cache):
    assert [build.load(source, ["-DANSWER=42"]).answer() for _ in range(2)] == [42, 42]
    assert num_builds(cache) == 1 and [p.suffix for p in cache.iterdir()] == [".so"]
    assert build.load(source, ["-DANSWER=43"]).answer() == 43
    source.write_text('extern "C" int answer() { return ANSWER + 1; }\n')
    assert build.load(source, ["-DANSWER=42"]).answer() == 43 and num_builds(cache) == 3


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_damaged_library_is_built_again(source, cache, size):
    build._open([os.environ["CXX"]], source, ["-DANSWER=42"])
    (library,) = cache.iterdir()
    damaged = library.read_bytes()[:size]
    library.unlink()  # a loaded library keeps its file
    library.write_bytes(damaged)
    assert build.load(source, ["-DANSWER=42"]).answer() == 42
    assert num_builds(cache) == 2 and len(list(cache.iterdir())) == 1
    assert build.load(source, ["-DANSWER=42"]).answer() == 42 and num_builds(cache) == 2


def test_a_folder_that_cannot_be_written(source, cache, monkeypatch):
    cache.write_text("a file, not a folder")
    assert build.load(source, ["-DANSWER=42"]).answer() == 42
    monkeypatch.setenv("LEARNED_OPT_CACHE", str(cache / "below"))
    assert build.load(source, ["-DANSWER=42"]).answer() == 42 and num_builds(cache) == 2


def test_where_libraries_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("LEARNED_OPT_CACHE", "somewhere")
    assert build.cache_folder() == Path("somewhere")
    monkeypatch.delenv("LEARNED_OPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "learned_opt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert build.cache_folder() == tmp_path / ".cache" / "learned_opt"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert build.cache_folder() is None


def test_two_processes_build_at_once(source, cache):
    code = (
        "import importlib.util, pathlib, sys; spec = importlib.util.spec_from_file_location('build', sys.argv[1]); "
        "build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build); "
        "print(build.load(pathlib.Path(sys.argv[2]), ['-DANSWER=42']).answer())"
    )
    command = [sys.executable, "-W", "error", "-c", code, build.__file__, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=60)[0] for p in processes] == ["42\n", "42\n"]
    assert build.load(source, ["-DANSWER=42"]).answer() == 42
    assert all(p.suffix == ".so" for p in cache.iterdir())


def test_without_a_compiler_nothing_is_said(source, cache, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.load(source, ["-DANSWER=42"]) is None


def test_settings_that_a_compiler_lacks_are_left_out(source, cache, monkeypatch, tmp_path):
    compiler = build._compiler()[0]
    picky = f'case "$*" in *march*|*mcpu*|*openmp*) echo "unknown option" >&2; exit 1;; esac; exec {compiler} "$@"'
    monkeypatch.setenv("CXX", f"{script(tmp_path / 'picky', picky)} -DUNUSED")  # with an argument of its own
    assert build.load(source, ["-DANSWER=42"]).answer() == 42


@pytest.mark.parametrize(
    ("named", "body", "reason"),
    [
        ("missing", None, r"tiny could not be built or loaded \(the environment's CXX names '.*missing', which is not"),
        (
            "silent",
            "exit 3",
            r"silent: exit status 3\); plain torch does its work, more slowly. Set LEARNED_OPT_NATIVE=0",
        ),
        ("loud", "echo 'In file x:' >&2; echo 'tiny.cpp: error: bad' >&2; exit 1", r"loud: tiny.cpp: error: bad\)"),
        ("empty", "exit 0", r"tiny could not be built or loaded \("),
    ],
)
def test_a_compiler_that_cannot_do_it(source, cache, monkeypatch, tmp_path, named, body, reason):
    if body is not None:
        script(tmp_path / named, body)
    monkeypatch.setenv("CXX", str(tmp_path / named))
    with pytest.warns(build.NativeWarning, match=reason):
        assert build.load(source, ["-DANSWER=42"]) is None


def test_a_compiler_that_never_ends(source, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(script(tmp_path / "slow", "exec sleep 5")))
    monkeypatch.setattr(build, "_PATIENCE", 0.05)
    with pytest.warns(build.NativeWarning, match="timed out"):
        assert build.load(source, ["-DANSWER=42"]) is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"signal": True},
        {"signal": True, "loudness": 0.5},
        {"clip": 1.5},
        {"relative_eps": 0.5},
        {"signal": True, "clip": 2.0, "relative_eps": 0.5},
    ],
)
def test_sums_over_tensors(settings):
    rule = rules.get("mixture", growth=0.2, **settings)
    theta, sizes = theta_of(rule), (1, 3000, 40, 7)
    n = 2 * sum(sizes)
    state, grads = started(rule, theta, n), grads_of(n)[0]
    layout = TensorLayout(sizes, 2)
    state["v"][:, 5:9], state["m"][:, 5:9], grads[5:9] = 0.0, 0.0, 0.0
    want = rule.context_of(layout.sums(rule.context_terms(grads.double(), double(state))))
    got = context(rule, grads, state, layout)
    torch.testing.assert_close(got.values.double(), want, rtol=1e-4, atol=1e-5)
    whole = grads.clone()
    grads[20:24] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    spoiled = context(rule, grads, state, layout).values
    whole[20:24], state["m"][:, 20:24] = 0.0, 0.0
    assert spoiled.isfinite().all()
    torch.testing.assert_close(spoiled, context(rule, whole, state, layout).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("signal", "loudness", "clip", "relative_eps"),  # each is a kernel of its own to compile
    [
        (False, 0.0, 0.0, 0.0),
        (False, 0.0, 1.5, 0.25),
        (True, 0.0, 0.0, 0.25),
        (True, 0.0, 1.5, 0.0),
        (True, 0.4, 0.0, 0.0),
        (True, 0.4, 1.5, 0.25),
    ],
)
def test_agreement_is_what_it_is_in_torch(signal, loudness, clip, relative_eps):
    rule = rules.get("paced", signal=signal, loudness=loudness, clip=clip, relative_eps=relative_eps)
    a, *averages = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [(a, a), *((b, b) for b in averages), *((a, b) for b in averages), *itertools.combinations(averages, 2)]
    sums = torch.stack([(one * other).sum(0) for one, other in (*pairs, *[pairs[3], (a, a)] * signal)])
    sums[:, 2], sums[1, 3], sums[0, 4] = 0, float("nan"), 1e-300
    want, kernel = agreement(sums, loudness), native.kernel(rule.native_shape)
    assert (want[:, 2] == 0).all()
    if clip:
        squares = torch.tensor([[9.0, 0.0, 1e-300, 9.0, 2.0], [1.0, 1.0, 1e-302, 0.0, 1.0]], dtype=torch.float64)
        factors = torch.tensor([0.5, 1.0, 0.15, 1.0, 1.0], dtype=torch.float64)
        sums, want = torch.cat([sums, squares]), torch.cat([want, factors[None]])
    if relative_eps:
        squares = torch.tensor([[18.0, 0.0, 1e-300, 9.0, 4.0], [2.0, 0.0, 1.0, 1.0, 16.0]], dtype=torch.float64)
        roots = torch.tensor([3.0, 0.0, 1e-150, 3.0, 0.5], dtype=torch.float64)
        sums, want = torch.cat([sums, squares]), torch.cat([want, relative_eps * roots[None]])
    found = kernel.agreement(sums, loudness, clip, relative_eps)
    torch.testing.assert_close(found, want, rtol=1e-14, atol=0)
    assert rule.context_of(sums).equal(found)
    assert rule.context_of(sums.requires_grad_()).requires_grad


def test_threads_and_neighbours_change_no_bit_of_the_sums():
    rule = rules.get("paced")
    theta, sizes = theta_of(rule), (3, 2000, 1, 9000, 33)
    n = sum(sizes)
    state, grads = started(rule, theta, n), grads_of(n)[0]
    num_threads, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(rule.context_sums(grads, state, TensorLayout(sizes)))
    finally:
        torch.set_num_threads(num_threads)
    start = 0
    for k, size in enumerate(sizes):
        mine, stop = slice_coordinates(state, start, start + size), start + size
        alone = rule.context_sums(grads[start:stop], mine, TensorLayout((size,)))
        assert all(torch.equal(found[:, k], alone[:, 0]) for found in results)
        start = stop
    assert results[0].dtype == torch.float64


@pytest.mark.parametrize("most", [12.0, 1.5])
def test_what_has_grown_is_held_within_its_bound(most):
    rule = rules.get("mixture", growth=1.0, most_grown=most)
    theta, n = theta_of(rule), 64
    theta["output.bias"][-1] = torch.tensor(5.0)
    for sign in (1.0, -1.0):
        theta["output.bias"][-1] *= sign
        state = {**started(rule, theta, n), "log_size": torch.full((n,), most - 0.5 if sign > 0 else -11.5)}
        grads, loss_grads = grads_of(n, 3), grads_of(n, 3, seed=5).flip(1)
        got = rule.backward(theta, grads, torch.zeros(n), state, loss_grads, told(rule, n, 3))
        say = told(rule, n, 3)
        want = UpdateRule.backward(
            rule,
            double(theta),
            grads.double(),
            torch.zeros(n).double(),
            double(state),
            loss_grads.double(),
            in_dtype(say, torch.float64),
        )
        assert_close_to_largest(got, want, 5e-5)
        for grad in grads:
            _, state = stepper(rule, theta)(grad, torch.zeros(n), state, False, told(rule, n))
        assert (state["log_size"][2:] == (most if sign > 0 else -12)).all()
