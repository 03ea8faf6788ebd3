"""One contender on one workload, in a process of its own that is told when to run.

A number of seconds on standard input lets it take steps for at least as long, and answers in JSON on standard output;
an empty line ends it. `Contender`, in the process that measures, starts and speaks to one.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.meta_training.workloads import SpeedWorkload
from learned_opt.task import Tensors

CONTENDERS = {
    "ours": "this library",
    "ours-torch": "this library without a compiler",
    "jax": "strong JAX",
    "plain": "plain PyTorch loop",
    "products": "matrix products alone",
}
"""What can be measured -> what it is."""

_SIZE = 1024
_REPEATS = 8


def environment(contender: str, num_threads: int) -> dict[str, str]:
    """The environment that a contender's process starts in."""
    out = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads), "WANDB_MODE": "disabled"}
    if contender == "ours-torch":
        out["LEARNED_OPT_NATIVE"] = "0"
    if contender == "jax":
        flags = ["--xla_cpu_multi_thread_eigen=false"]
        if num_threads > 1:
            flags.append(f"--xla_force_host_platform_device_count={num_threads}")
        out |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    return out


Made = tuple[Callable[[], float], dict[str, Any]]
"""(A function that does the least there is to do and says how much that was, what to note down.)"""


def make(contender: str, workload: SpeedWorkload, num_threads: int, variant: int = 0) -> Made:
    """A contender. How much it does is in inner steps x particles; for "products", in floating-point operations.

    Args:
        contender: key of `CONTENDERS`.
        workload: what to train.
        num_threads: of torch, or host devices of JAX.
        variant: of JAX, its index in `jax_scan.variants`.

    Raises:
        ValueError: an unknown contender.
    """
    import torch

    torch.set_num_threads(num_threads)
    theta = workload.rule.init_theta(torch.Generator().manual_seed(0))
    if contender == "products":
        left = torch.ones(_SIZE, _SIZE)
        out = torch.empty_like(left)

        def products() -> float:
            for _ in range(_REPEATS):
                torch.mm(left, left, out=out)
            return 2.0 * _SIZE**3 * _REPEATS

        return products, {}
    if contender in ("ours", "ours-torch"):
        return _ours(workload), {}
    if contender == "plain":
        from benchmarks.meta_training.plain_loop import PlainLoop

        return PlainLoop(workload, theta).step, {}
    if contender == "jax":
        return _jax(workload, theta, num_threads, variant)
    raise ValueError(f"unknown contender {contender!r}; choose from {', '.join(CONTENDERS)}")


def _ours(workload: SpeedWorkload) -> Callable[[], float]:
    from train_optimizer import assemble

    trainer = assemble(workload.settings)
    arms = 2 if workload.pairs else 1

    def step() -> float:
        before = trainer.totals["inner_steps"]
        trainer.step()
        return (trainer.totals["inner_steps"] - before) / arms

    return step


def _jax(workload: SpeedWorkload, theta: Tensors, num_threads: int, index: int) -> Made:
    from benchmarks.meta_training.jax_scan import JaxMetaTraining, variants

    choices = variants(workload, num_threads)
    arrays = {name: value.numpy() for name, value in theta.items()}
    training = JaxMetaTraining(workload, arrays, num_threads, choices[index])
    return training.step, {"variant": dataclasses.asdict(choices[index]), "num_variants": len(choices)}


def timed(step: Callable[[], float], seconds: float) -> dict[str, float]:
    """Take steps for at least so long: what was done, and the rate of it."""
    done, start, busy = 0.0, time.perf_counter(), time.process_time()
    while True:
        done += step()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return {
                "done": done,
                "seconds": elapsed,
                "cpu_seconds": time.process_time() - busy,
                "rate": done / elapsed,
            }


def resident_mib(*, peak: bool) -> float:
    """The process's resident memory in MiB, at its highest or, on Linux, now."""
    if not peak and sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / (2**20 if sys.platform == "darwin" else 1024)


def pin(num_threads: int) -> None:
    """Hold the process to so many processors, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:num_threads])


def main() -> None:
    """What runs in the contender's own process."""
    parser = argparse.ArgumentParser()
    for name, kind in (("contender", str), ("workload", str), ("threads", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--truncation", type=int)
    parser.add_argument("--variant", type=int, default=0)
    arguments = parser.parse_args()
    pin(arguments.threads)
    workload = SpeedWorkload.of(arguments.workload, truncation=arguments.truncation)
    workload.family.shared_data()  # loaded, and the libraries imported, before memory is counted
    if arguments.contender == "jax":
        pass
    else:
        import train_optimizer  # noqa: F401
    gc.collect()
    baseline = resident_mib(peak=False)
    start = time.perf_counter()
    step, notes = make(arguments.contender, workload, arguments.threads, arguments.variant)
    for _ in range(1 if arguments.contender == "plain" else 2):
        step()
    print(json.dumps({"start_seconds": time.perf_counter() - start, **notes}), flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        answer = timed(step, float(line))
        answer["peak_mib"] = resident_mib(peak=True) - baseline
        print(json.dumps(answer), flush=True)


class Contender:
    """A contender's process.

    Args:
        name: key of `CONTENDERS`.
        workload: name of the preset.
        num_threads: processors it may use.
        truncation: another than the preset's.
        variant: of JAX, its index in `jax_scan.variants`.

    Attributes:
        notes: what it said when it was ready, "start_seconds" among it.

    Raises:
        RuntimeError: the process ended instead of answering; its own message has been printed.
    """

    def __init__(
        self, name: str, workload: str, num_threads: int, truncation: int | None = None, variant: int = 0
    ) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.meta_training.worker", "--contender", name]
        command += ["--workload", workload, "--threads", str(num_threads), "--variant", str(variant)]
        command += ["--truncation", str(truncation)] if truncation else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(name, num_threads)},
            cwd=Path(__file__).parents[2],
        )
        self.notes = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the process of contender {self.name!r} ended with status {self._process.wait()}")

    def run(self, seconds: float) -> dict[str, Any]:
        """Let it work for at least so long; "rate", "seconds", "cpu_seconds" and "peak_mib"."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


def start_fastest(name: str, workload: str, num_threads: int, truncation: int | None, seconds: float) -> Contender:
    """The contender's process; of JAX, that of the variant which was fastest over so many seconds each."""
    best = Contender(name, workload, num_threads, truncation)
    rates: dict[str, float] = {}
    fastest = 0.0
    for i in range(best.notes.get("num_variants", 0)):
        other = best if i == 0 else Contender(name, workload, num_threads, truncation, i)
        rate = other.run(seconds)["rate"]
        rates[str(other.notes["variant"])] = rate
        if rate > fastest:
            fastest, best, other = rate, other, best
        if other is not best:
            other.close()
    if rates:
        best.notes["rates_of_variants"] = rates
    return best


if __name__ == "__main__":
    main()
