"""The worked example of meta-training on a problem of one's own runs from end to end."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_problem.py"


def test_own_problem(capsys):
    example = runpy.run_path(str(EXAMPLE))
    results = example["main"](outer_steps=2, num_steps=4, num_groups=2)
    assert "on each of 2 files never seen" in capsys.readouterr().out
    assert {"learned", "Adam 0.01"} <= set(results)
    assert all(math.isfinite(value) for scores in results.values() for value in scores)
    data = example["source_files"]()
    assert min(data.num_groups(split) for split in data.ranges) >= 10
    assert data.inputs.shape[1] == 4 and int(data.targets.max()) < 64
