"""Memory that was freed is kept: counted in the page faults of a process that makes and drops the same tensors."""

import os
import platform
import subprocess
import sys

import pytest

from learned_opt import allocation

SCRIPT = """
import resource
import torch
from learned_opt.allocation import keep_freed_memory

torch.set_num_threads(1)
print(KEEP and keep_freed_memory())

def work():
    tensors = [torch.ones(2**19) for _ in range(12)]  # 2 MiB each

for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep):
    """With the thresholds that the C library starts with, which it otherwise changes as a process goes along."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    run = subprocess.run(
        [sys.executable, "-c", f"KEEP = {keep}\n{SCRIPT}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **thresholds},
    )
    answer, count = run.stdout.split()
    assert answer == str(keep)
    return int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are the GNU C library's")
def test_the_second_time_costs_no_page_faults():
    kept, given_back = page_faults(True), page_faults(False)
    assert given_back > 20 * 12 * 100  # of 512 pages a tensor, where pages are of four KiB
    assert kept < given_back / 20


class Without:
    """A C library that has no such function."""

    def __init__(self, name):
        pass


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_elsewhere_nothing_happens(monkeypatch, error):
    monkeypatch.setattr(allocation.ctypes, "CDLL", Without)
    assert not allocation.keep_freed_memory()

    def fail(name):
        raise error

    monkeypatch.setattr(allocation.ctypes, "CDLL", fail)
    assert not allocation.keep_freed_memory()
