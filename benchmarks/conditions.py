"""What a measurement was made with and under, for the JSON that it is written to."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch


def conditions(program: str, load_before: float) -> dict[str, Any]:
    """The command, the machine, torch, and whether the machine was at rest.

    Args:
        program: the module that was run, as in `python -m benchmarks.step`.
        load_before: the load average of the minute before, `os.getloadavg()[0]`.
    """
    return {
        "command": " ".join([f"python -m {program}", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": load_before,
        "load_was_low": load_before < 0.25 * (os.cpu_count() or 1),
    }
