"""Runs recorded with Weights & Biases, in a way that can cost a run nothing but its record.

Recording is a convenience: it never asks for a login, never waits long, and whatever goes wrong in it, from a missing
package to a crashed service, is one warning, after which the run goes on without it. All files lie under
`<run folder>/wandb`.

A run keeps its identity in `<run folder>/wandb_id.txt`, so that a resumed run continues the same wandb run. Metrics are
plotted over their own `outer_step` and not over wandb's internal counter, which may only grow: outer steps that are
logged again after a resume are then as welcome as any others. Offline, each start writes a folder of its own; `wandb
sync` joins those of one run, in the order in which they were started.

The client is imported when a tracker is made, and not at all when the mode is "disabled".
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import netrc
import os
import re
import secrets
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from learned_opt.files import write_atomically

if TYPE_CHECKING:
    import wandb

Mode = Literal["auto", "offline", "online", "disabled"]
Scalar = str | float | int | bool | None

ID_FILE = "wandb_id.txt"
STEP = "outer_step"

# wandb refuses these in the names of projects and runs.
_FORBIDDEN = r"/\\#?%:"
_ENVIRONMENT_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_DEFAULT_PROJECT = "learned-opt"

# What would slow the start down, print over the progress bar, or record more than was asked for is off. The time
# limits are in seconds: wandb's own would let a run wait 90 for its start and forever for its end.
_SETTINGS: dict[str, object] = {
    "allow_val_change": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
    "init_timeout": 15.0,
    "label_disable": True,
    "login_timeout": 1.0,
    "save_code": False,
    "silent": True,
    "symlink": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    # A killed run loses what was logged since the last flush.
    "x_transaction_log_flush_interval": 1.0,
}


class TrackingWarning(UserWarning):
    """Something about recording a run did not work; the run itself is not affected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run is recorded.

    Attributes:
        mode: "online", "offline" (upload later with `wandb sync`), "disabled", or "auto": what the environment variable
            WANDB_MODE says, otherwise online where a login is configured and offline where none is.
        project: wandb project; WANDB_PROJECT replaces the default.
        entity: wandb user or team; that of the login if empty.
        name: the run's name; the run folder's name if empty.
        tags: labels to find the run by, each of 1 to 64 characters.
        group: joins runs that belong together, such as the seeds of one experiment.
    """

    mode: Mode = "auto"
    project: str = _DEFAULT_PROJECT
    entity: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    group: str = ""
    # A misspelled field in a config file is refused by whoever reads it with pydantic's rules.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {self.mode!r}")
        if not re.fullmatch(f"[^{_FORBIDDEN}]{{1,128}}", self.project):
            raise ValueError(
                f"project must have 1 to 128 characters, none of them one of /\\#?%:; got {self.project!r}"
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"tags must each have 1 to 64 characters; got {tag!r}")


class Tracker:
    """Records one run.

    No method raises because of wandb: the first failure is a `TrackingWarning`, and every later call does nothing.

    Args:
        config: where to.
        run_dir: the run's folder; made if it does not exist.
        run_config: the run's resolved configuration; nested mappings of plain values.
        resume: continue the wandb run that was recorded from this folder before.

    Attributes:
        mode: "online", "offline" or "disabled"; "disabled" from the moment recording has failed.
        run_id: wandb's identifier of the run, or None.
        url: the run's page if it is online, or None.
    """

    def __init__(
        self, config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.run_id: str | None = None
        self.url: str | None = None
        self._folder = Path(run_dir).resolve()
        self._directory: Path | None = None
        self._run: wandb.Run | None = None
        self._step = 0
        self.mode: Mode = _mode_from_environment(config.mode)
        if self.mode != "disabled":
            with self._guard("starting"):
                self._start(config, run_config, resume)

    @property
    def directory(self) -> Path | None:
        """The folder that this start records in, which `wandb sync` takes; None if nothing is recorded."""
        return self._directory

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of an outer step; values that are not finite are recorded as such.

        Args:
            metrics: name -> value; a slash groups names into a section.
            step: the outer step that they belong to; may be one that was logged before.
        """
        self._step = step
        if self._run is not None:
            with self._guard("logging metrics"):
                self._run.log({**{name: float(value) for name, value in metrics.items()}, STEP: step})

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Scalar]]) -> None:
        """Record a table.

        Args:
            name: its name.
            columns: headings.
            rows: one value per column each; a column may mix numbers, text and None.
        """
        if self._run is not None:
            with self._guard(f"logging the table {name!r}"):
                module = importlib.import_module("wandb")
                table = module.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
                self._run.log({name: table, STEP: self._step})

    def log_image(self, name: str, path: Path) -> None:
        """Record a picture.

        Args:
            name: its name.
            path: a PNG or JPEG file.
        """
        if self._run is not None:
            with self._guard(f"logging the picture {name!r}"):
                module = importlib.import_module("wandb")
                self._run.log({name: module.Image(str(path)), STEP: self._step})

    def log_summary(self, summary: Mapping[str, Scalar]) -> None:
        """Record values that describe the run as a whole; name -> value."""
        if self._run is not None:
            with self._guard("logging the summary"):
                self._run.summary.update(dict(summary))

    def log_artifact(
        self, path: Path, *, name: str, kind: str = "optimizer", metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Record a file as a wandb artifact.

        Args:
            path: the file; its present content is what is recorded, even if it is overwritten later.
            name: the artifact's name; characters that wandb does not allow become "-".
            kind: the artifact's type.
            metadata: plain values to describe it by; "sha256" (of the file's bytes, hexadecimal) and "num_bytes" are
                added.
        """
        if self._run is not None:
            with self._guard(f"recording the file {path}"):
                module = importlib.import_module("wandb")
                data = Path(path).read_bytes()
                facts = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
                artifact = module.Artifact(
                    re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:128], type=kind, metadata={**_plain(metadata or {}), **facts}
                )
                artifact.add_file(str(path), skip_cache=True)
                self._run.log_artifact(artifact)

    def finish(self, exit_code: int = 0) -> None:
        """End the recording; further calls do nothing.

        Args:
            exit_code: 0 for a run that finished, anything else for one that failed or was stopped.
        """
        if self._run is not None:
            with self._guard("finishing"):
                self._close(self._run, exit_code)

    def _start(self, config: TrackingConfig, run_config: Mapping[str, Any], resume: bool) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with _environment({"WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(self._folder / "wandb" / "cache")}):
            module = importlib.import_module("wandb")
            can_log_in = _login_is_configured(module.setup().settings, module.Settings().base_url)
            problem = ""
            if self.mode == "online" and not can_log_in:
                problem = "wandb has no login on this machine (`wandb login` makes one)"
            self.mode = "online" if can_log_in and self.mode in ("auto", "online") else "offline"
            run_id = self._identity(resume)
            try:
                run = self._init(self.mode, config, run_config, run_id, resume)
            except Exception as error:
                if self.mode != "online":
                    raise
                problem = f"wandb could not start online ({_describe(error)})"
                self.mode = "offline"
                # The client's service still holds the id for the attempt that failed.
                module.teardown(exit_code=1)
                run = self._init("offline", config, run_config, run_id, resume)
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP)
        self._run, self.run_id = run, run.id
        self._directory = Path(run.dir).parent
        self.url = run.url if self.mode == "online" else None
        if problem:
            _warn(f"{problem}; the run is recorded offline, upload it later with: wandb sync {self._directory}")

    def _identity(self, resume: bool) -> str:
        """This run's id, stored before it is used: assigned by `wandb agent`, the one to continue, or a new one."""
        path = self._folder / ID_FILE
        given = os.environ.get("WANDB_RUN_ID", "")
        stored = path.read_text(encoding="utf-8", errors="replace").strip() if resume and path.is_file() else ""
        if not re.fullmatch(rf"((?![{_FORBIDDEN}])[!-~]){{1,128}}", stored):
            stored = ""
        run_id = (given if _in_sweep() else "") or stored or given or secrets.token_hex(4)
        if run_id != stored:
            write_atomically(path, f"{run_id}\n".encode())
        return run_id

    def _init(
        self, mode: Mode, config: TrackingConfig, run_config: Mapping[str, Any], run_id: str, resume: bool
    ) -> wandb.Run:
        module = importlib.import_module("wandb")
        known = getattr(module.Settings, "model_fields", _SETTINGS)
        project: str | None = config.project
        if config.project == _DEFAULT_PROJECT and os.environ.get("WANDB_PROJECT"):
            project = None
        # `wandb agent` has put project, entity and id into the environment, and wandb complains about any others.
        own = {} if _in_sweep() else {"id": run_id, "project": project, "entity": config.entity or None}
        return module.init(
            **own,
            mode=mode,
            dir=str(self._folder),
            name=config.name or self._folder.name,
            tags=list(config.tags) or None,
            group=config.group or None,
            config=_plain(run_config),
            resume="allow" if resume else None,
            reinit="create_new",
            settings=module.Settings(**{name: value for name, value in _SETTINGS.items() if name in known}),
        )

    @contextlib.contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turn any failure inside into one warning, and recording off."""
        try:
            # Copies of files wait for their upload under the run's folder, not in the user's home.
            with _environment({"WANDB_DATA_DIR": str(self._folder / "wandb" / "data")}):
                yield
        except ImportError as error:
            self._turn_off(f"wandb cannot be imported ({_describe(error)}); install it with: pip install wandb")
        except Exception as error:
            self._turn_off(f"{doing} failed ({_describe(error)})")

    def _close(self, run: wandb.Run, exit_code: int) -> None:
        self._run = None
        try:
            run.finish(exit_code=exit_code)
        except Exception:
            # The client would try again when the interpreter exits, and report its failure at length.
            with contextlib.suppress(Exception):
                importlib.import_module("wandb").teardown(exit_code=1)
            raise

    def _turn_off(self, reason: str) -> None:
        self.mode = "disabled"
        if self._run is not None:
            with contextlib.suppress(Exception):
                self._close(self._run, exit_code=1)
        kept = f"; what was recorded before is in {self._directory}" if self._directory else ""
        _warn(f"wandb tracking is off from here on, the run goes on: {reason}{kept}")


def _warn(message: str) -> None:
    """Warn at the line that called this module."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, contextlib.__file__):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, TrackingWarning, stacklevel=level)


def _describe(error: BaseException) -> str:
    """The error's type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _in_sweep() -> bool:
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _mode_from_environment(mode: Mode) -> Mode:
    """`mode`, unless it is "auto" and WANDB_MODE says something that is known."""
    if mode != "auto":
        return mode
    return _ENVIRONMENT_MODES.get(os.environ.get("WANDB_MODE", "").strip().lower(), "auto")


def _login_is_configured(settings: Any, default_base_url: str) -> bool:
    """Whether wandb would find a key without asking: in the environment, in its settings, or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    hosts = {urlsplit(settings.base_url).netloc}
    if settings.base_url == default_base_url:
        hosts.add("api.wandb.ai")  # logins of clients whose default was another address stay valid
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entries = netrc.netrc(path).hosts
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(host in entries and entries[host][2] for host in hosts):
            return True
    return False


def _plain(value: Any) -> Any:
    """`value` as nested dicts and lists of numbers, text and None, which is what wandb records faithfully."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold inside; those that the user has set keep their values."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
