"""First-order replay against plain autograd: memory, time and agreement.

    python -m benchmarks.replay                               prints the table, writes benchmarks/results/replay.json
    python -m benchmarks.replay --quick --out replay.json     the smallest task alone

Both routes compute the same meta-gradient, that of a truncation whose inner gradients are constants. "autograd" unrolls
with a graph through every update and every loss and differentiates it once at the end. "replay" unrolls without a graph
and runs the rule alone once more, chunk by chunk (`learned_opt.estimators.backprop`). "unroll" is the part that cannot
be saved: the inner steps alone, no meta-gradient.

Every measurement runs in a process of its own. Memory is the peak of the process's resident set during the first
truncation, less what was resident before it; on a GPU, the same of allocated memory. Time is that of the fastest of
several truncations, after two that warm up: on a CPU the processor time of the one thread, which others' work on the
machine hardly touches, on a GPU the time on the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.func import vmap

from learned_opt import rules
from learned_opt.batched import BatchedFamily
from learned_opt.estimators import TruncatedBackprop, Workload
from learned_opt.meta_loss import MetaLoss
from learned_opt.particles import EpisodePlan, Particles, start_particles
from learned_opt.task import Tensors
from learned_opt.unroll import unroll
from tasks.image_mlp import ImageMLP

HIDDEN: dict[str, tuple[int, ...]] = {"1.5k": (20,), "15k": (200,), "100k": (280, 280)}
"""Hidden layers of the tasks: 1,510, 15,010 and 99,690 parameters."""

CASES = [
    ("compact", size, k) for size, ks in (("1.5k", (5, 20, 50)), ("15k", (5, 20, 50)), ("100k", (5, 20))) for k in ks
]
CASES += [("rnnprop", "1.5k", k) for k in (5, 20, 50)]
ROUTES = ("unroll", "replay", "autograd")
NUM_PARTICLES = 4
RESULTS = Path(__file__).parent / "results" / "replay.json"


def setup(
    rule_name: str, size: str, truncation: int, dtype: torch.dtype, device: str
) -> tuple[Workload, Tensors, Particles]:
    """What both routes start from."""
    rule = rules.get(rule_name)
    theta = {n: v.to(device, dtype) for n, v in rule.init_theta(torch.Generator().manual_seed(0)).items()}
    batched = BatchedFamily(
        ImageMLP(hidden=HIDDEN[size], activation="tanh", init="fan_in", init_scale=1.0), dtype=dtype, device=device
    )
    plan = EpisodePlan(split="meta_train", run_seed=0)
    work = Workload(rule=rule, batched=batched, plan=plan, meta_loss=MetaLoss(), truncation=truncation)
    return work, theta, start_particles(batched, rule, plan, range(NUM_PARTICLES))


def replay(work: Workload, theta: Tensors, particles: Particles) -> Tensors:
    """The library's route."""
    return TruncatedBackprop().estimate(work, theta, particles).grads


def plain_unroll(work: Workload, theta: Tensors, particles: Particles) -> Tensors:
    """The inner steps alone."""
    unroll(work.rule, theta, work.batched, work.plan, particles, work.truncation)
    return {}


def autograd(work: Workload, theta: Tensors, particles: Particles) -> Tensors:
    """One graph over the whole truncation, inner gradients detached."""
    batched, shared = work.batched, work.batched._shared
    leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}

    def loss(params: torch.Tensor, task: Tensors, batch: Tensors) -> torch.Tensor:
        return batched.family.loss(batched.unflatten(params), {**task, **shared}, batch)

    params, grads, state = particles.params.detach().requires_grad_(), particles.grads, particles.rule_state
    batches = batched.batches(particles.tasks, particles.seeds, [s + 1 for s in particles.steps], work.truncation)
    losses = []
    for k in range(work.truncation):
        update, state = work.rule.update(leaves, grads.reshape(-1), params.reshape(-1), state)
        params = params + update.view_as(params)
        losses.append(vmap(loss)(params, particles.tasks, {n: v[k] for n, v in batches.items()}))
        (grads,) = torch.autograd.grad(losses[-1].sum(), params, retain_graph=True)
    value = work.meta_loss(torch.stack(losses), particles.initial)
    out = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))
    particles.params, particles.grads = params.detach(), grads
    particles.rule_state = {n: v.detach() for n, v in state.items()}
    particles.steps = [s + work.truncation for s in particles.steps]
    return out


FUNCTIONS: dict[str, Callable[[Workload, Tensors, Particles], Tensors]] = {
    "unroll": plain_unroll,
    "replay": replay,
    "autograd": autograd,
}


class PeakMemory:
    """The peak of memory while it is entered, less what was in use before, in `mebibytes`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.mebibytes = 0.0

    def _resident(self, field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1024

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
            return self
        try:  # on Linux: give back what is free, and let the peak start from here
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._resident("VmRSS")
            self._linux = True
        except OSError:
            self._before = _max_resident()
            self._linux = False
        return self

    def __exit__(self, *_: object) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = self._resident("VmHWM") if self._linux else _max_resident()
        self.mebibytes = max(peak - self._before, 0.0)


def _max_resident() -> float:
    """The peak of the process so far, in MiB; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def measure_route(route: str, case: tuple[str, str, int], device: str, seconds: float) -> dict[str, float]:
    """Peak memory and time of one route, in this process."""
    work, theta, particles = setup(*case, torch.float32, device)
    # One inner step first, so that the libraries' own buffers are not counted.
    FUNCTIONS[route](Workload(**{**vars(work), "truncation": 1}), theta, particles)
    with PeakMemory(device) as memory:
        FUNCTIONS[route](work, theta, particles)
    for _ in range(2):
        FUNCTIONS[route](work, theta, particles)
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        FUNCTIONS[route](work, theta, particles)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return {"peak_mib": memory.mebibytes, "seconds": min(times), "num_timed": len(times)}


def measure_difference(case: tuple[str, str, int], device: str) -> dict[str, float]:
    """Largest difference of the two meta-gradients relative to the tensor's largest entry, in both precisions."""
    out = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        work, theta, particles = setup(*case, dtype, device)
        state = particles.state_dict()
        got = replay(work, theta, particles)
        particles = Particles.from_state_dict(state, work.batched, work.plan.split)
        want = autograd(work, theta, particles)
        out[name] = max(float((got[n] - v).abs().max() / v.abs().max()) for n, v in want.items())
    return out


def in_own_process(arguments: list[str]) -> dict[str, float]:
    """The JSON that this module prints when it is started with these arguments."""
    command = [sys.executable, "-m", "benchmarks.replay", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text."""
    head = [
        "rule",
        "parameters",
        "steps",
        "unroll",
        "replay",
        "autograd",
        "unroll",
        "replay",
        "autograd",
        "float32",
        "float64",
    ]
    lines = [f"{'':29}{'peak memory, MiB':>27}{'seconds a truncation':>27}{'relative difference':>20}"]
    widths = [9, 12, 8, 9, 9, 9, 9, 9, 9, 10, 10]
    lines.append("".join(f"{h:>{w}}" for h, w in zip(head, widths)))
    for row in rows:
        cells = [row["rule"], f"{row['num_parameters']:,}", str(row["truncation"])]
        cells += [f"{row[route]['peak_mib']:,.1f}" for route in ROUTES]
        cells += [f"{row[route]['seconds']:.4f}" for route in ROUTES]
        cells += [f"{row['difference'][d]:.1e}" for d in ("float32", "float64")]
        lines.append("".join(f"{c:>{w}}" for c, w in zip(cells, widths)))
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """All cases, their table and their file."""
    before = os.getloadavg()
    rows = []
    for rule, size, truncation in CASES:
        if arguments.quick and size != "1.5k":
            continue
        case = [rule, size, str(truncation), "--device", arguments.device, "--seconds", str(arguments.seconds)]
        rows.append(
            {
                "rule": rule,
                "num_parameters": setup(rule, size, truncation, torch.float32, "cpu")[0].batched.num_parameters,
                "num_particles": NUM_PARTICLES,
                "truncation": truncation,
                **{route: in_own_process(["--route", route, "--case", *case]) for route in ROUTES},
                "difference": in_own_process(["--route", "difference", "--case", *case]),
            }
        )
        print(table(rows).splitlines()[-1], flush=True)
    report = {
        "command": " ".join(["python -m benchmarks.replay", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name()
        if arguments.device != "cpu"
        else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": 1,
        "seconds_are": "processor time, fastest truncation"
        if arguments.device == "cpu"
        else "wall time, fastest truncation",
        "load_was_low": max(before[0], os.getloadavg()[0]) < 0.75 * (os.cpu_count() or 1),
        "load_average_before": before,
        "load_average_after": os.getloadavg(),
        "rows": rows,
    }
    print("\n" + table(rows))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each route for, at least")
    parser.add_argument("--quick", action="store_true", help="the smallest task alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="path of the JSON")
    parser.add_argument("--route", default="", help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.route:
        run(arguments)
        return
    rule, size, truncation = arguments.case
    case = (rule, size, int(truncation))
    if arguments.route == "difference":
        print(json.dumps(measure_difference(case, arguments.device)))
    else:
        print(json.dumps(measure_route(arguments.route, case, arguments.device, arguments.seconds)))


if __name__ == "__main__":
    main()
