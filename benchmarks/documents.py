"""What benchmarks write: intervals as plain lists, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learned_opt.evaluation import Interval
from learned_opt.files import write_atomically


def plain(found: Interval) -> list[float]:
    """[value, low, high]."""
    return [found.value, found.low, found.high]


def write(path: Path | None, document: dict[str, Any]) -> None:
    """Write the document as JSON, if a path is given; its folder is made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(document, indent=1).encode())
