"""Training jobs that a service runs: what Amazon SageMaker says in environment variables, and where it looks.

In script mode the service starts `train_optimizer.py` as it is. Its hyperparameters arrive as arguments, in a form that
`arguments` understands; data channels lie in folders named by SM_CHANNEL_…, which settings reach through `expand`; what
lies in SM_MODEL_DIR at the end is the job's result; the folder `checkpoints` beside it is copied to storage while the
job runs and put back when it is started again; and the text in the file `failure` is what the console shows of a job
that failed. Nothing here imports the service's packages, and without its variables nothing here does anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_opt.config import read_yaml
from learned_opt.files import write_atomically
from learned_opt.run_folder import RunFolder

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_FAILURE_CHARACTERS = 1024
"""What the service keeps of a failure's text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManagedJob:
    """Where a managed job's files go.

    Attributes:
        model: folder whose content is the job's result.
        run: the run folder: the one that outlives interruptions where the job has it, else among the job's outputs.
        failure: file for the reason of a failure.
    """

    model: Path
    run: Path
    failure: Path

    def deliver(self, folder: RunFolder) -> None:
        """Copy what the run made (the exported optimizer, the comparison, the configuration) to the job's result.

        Raises:
            OSError: the folder cannot be written.
        """
        self.model.mkdir(parents=True, exist_ok=True)
        for path in (folder.optimizer, folder.results, folder.picture, folder.config):
            if path.is_file():
                shutil.copy2(path, self.model / path.name)

    def failed(self, reason: str) -> None:
        """Say why the job failed, where the service looks; a folder that cannot be written is no further failure."""
        with contextlib.suppress(OSError):
            self.failure.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.failure, reason[:_FAILURE_CHARACTERS].encode())


def find(environment: Mapping[str, str] | None = None) -> ManagedJob | None:
    """The managed job that this process is part of; None in an ordinary run (SM_MODEL_DIR is not set).

    Args:
        environment: variables; those of the process by default.
    """
    variables = os.environ if environment is None else environment
    if not variables.get("SM_MODEL_DIR"):
        return None
    model = Path(variables["SM_MODEL_DIR"])
    output = Path(variables.get("SM_OUTPUT_DIR") or model.parent / "output")
    checkpoints = model.parent / "checkpoints"  # there if the job was given a place to keep them
    data = Path(variables.get("SM_OUTPUT_DATA_DIR") or output / "data")
    return ManagedJob(
        model=model, run=checkpoints if checkpoints.is_dir() else data / "run", failure=output / "failure"
    )


def arguments(argv: Sequence[str]) -> list[str]:
    """Hyperparameters as the service passes them, in the form of a command line.

    Each arrives as `--name value`, whatever its type. True and False become flags (`--trainer.x False` becomes
    `--trainer.no-x`), and a list such as [adam, sgd] becomes several values. A dictionary must be given as text, such
    as "{digits: {name: image_mlp}}".
    """
    found: list[str] = []
    for word in argv:
        is_value = bool(found) and found[-1].startswith("--") and not word.startswith("--")
        if is_value and word in ("True", "true", "False", "false"):
            if word in ("False", "false"):
                prefix, dot, name = found[-1].removeprefix("--").rpartition(".")
                found[-1] = f"--{prefix}{dot}no-{name}"
        elif is_value and word.startswith("[") and word.endswith("]"):
            values = read_yaml(word)
            found += [str(value) for value in values]
        else:
            found.append(word)
    return found


def expand(settings: Any) -> Any:
    """Nested settings with $NAME and ${NAME} in every text replaced by environment variables.

    Raises:
        ValueError: a variable is not set.
    """
    if isinstance(settings, Mapping):
        return {name: expand(value) for name, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [expand(value) for value in settings]
    if not isinstance(settings, str):
        return settings

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            near = ", ".join(sorted(n for n in os.environ if n.startswith("SM_CHANNEL_")))
            hint = f"the data channels are {near}" if near else "set it, or write the path itself"
            raise ValueError(
                f"the setting {settings!r} names the environment variable {name}, which is not set; {hint}"
            )
        return os.environ[name]

    return _VARIABLE.sub(value, settings)
