"""Compare learned optimizers with hand-designed ones over a suite of task families, and report it.

    python evaluate_optimizer.py                                  the default optimizer on the small test suite
    python evaluate_optimizer.py runs/digits/optimizer.safetensors compact --suite test
    python evaluate_optimizer.py mine=a.safetensors --families quadratic rosenbrock --horizons 100 1000
    python evaluate_optimizer.py a.safetensors --families my.yaml --baselines adam my_module:MyOptimizer

Everything goes to one folder: results.json, written after every result, report.html, pictures and wandb/. Runs are kept
in a cache, so the same command given again after an interruption goes on where it was, and a comparison with one more
optimizer computes that one alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import torch

try:
    import matplotlib  # noqa: F401  (pictures)
    import rich  # noqa: F401  (the progress bar)
    import tyro
    import yaml
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: evaluation needs {missing.name}: pip install 'learned-opt[train]'") from None

import tasks
from learned_opt import __version__
from learned_opt import config as configuration
from learned_opt.artifact import Artifact
from learned_opt.artifact import load as load_artifact_or_shipped
from learned_opt.evaluation import (
    BASELINES,
    Baseline,
    Comparison,
    EvaluationConfig,
    Learned,
    Result,
    RunCache,
    Total,
    compare,
    find,
    totals,
)
from learned_opt.evaluation.aggregate import totals_table
from learned_opt.evaluation.cache import default_folder
from learned_opt.evaluation.explain import Explanation, explain
from learned_opt.evaluation.plots import save_curves
from learned_opt.evaluation.progress import ComparisonProgress
from learned_opt.evaluation.report import build
from learned_opt.evaluation.suite_plots import draw_profiles, draw_speedups
from learned_opt.files import write_atomically
from learned_opt.task import TaskFamily
from learned_opt.tracking import ID_FILE, Mode, Tracker, TrackingConfig
from tasks import suites

_DOTS_PER_INCH = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare learned optimizers with hand-designed ones, and report it."""

    optimizers: tyro.conf.Positional[tuple[str, ...]] = ("compact",)
    """Exported files, or names of optimizers that ship; each may be given a label, as in mine=file.safetensors."""
    suite: str = "test_small"
    """The families to compare on: a name in tasks/suites.py."""
    families: tuple[str, ...] = ()
    """Instead of a suite: names of families at their defaults, or YAML files of label: {name: …, field: value, …}, each
    with a horizon of its own if it is to have one."""
    horizons: tuple[int, ...] = ()
    """Inner steps; with several, every family is compared at each of them. By default --horizon."""
    baselines: tuple[str, ...] = ()
    """What to compare with: names, or module:attribute of a Baseline or an optimizer class of your own. By default all
    that learned_opt.evaluation.BASELINES has and that are installed."""
    explain_families: int = 2
    """On how many of the families to record what the learned optimizers do, for the part of the report that explains
    them; −1 leaves that part out."""
    cache: str = ""
    """Folder of runs to use again; by default the user's cache folder (~/.cache/learned_opt/runs); "off" for none."""
    out: str = ""
    """Folder for what is made; by default runs/evaluation-<suite>-<digits that depend on the settings>."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""
    num_threads: int = 1
    """Threads of torch."""
    wandb: str = ""
    """Short for --tracking.mode: auto, offline, online or disabled."""
    tracking: TrackingConfig = TrackingConfig()
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = EvaluationConfig(
        horizon=500, num_tasks=4, num_validation_tasks=8, cost_seconds=0.2
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be compared, checked and loaded.

    Attributes:
        artifacts: label -> learned optimizer.
        baselines: the others.
        families: label -> family.
        horizons: label -> inner steps, where not the configuration's.
        left_out: baselines that are not installed.
        settings: all of it as plain values.
    """

    artifacts: dict[str, Artifact]
    baselines: list[Baseline]
    families: dict[str, TaskFamily]
    horizons: dict[str, int]
    left_out: list[str]
    settings: dict[str, Any]


def parse(argv: Sequence[str]) -> Arguments:
    """The command line.

    Raises:
        ValueError: an option that takes one or more values was given none.
    """
    arguments = tyro.cli(Arguments, args=list(argv))
    for name in ("families", "horizons", "baselines"):
        if f"--{name}" in argv and not getattr(arguments, name):
            raise ValueError(f"--{name} was given no value; name at least one, or leave it out for the default")
    if arguments.wandb:
        tracking = dataclasses.replace(arguments.tracking, mode=cast(Mode, arguments.wandb))
        arguments = dataclasses.replace(arguments, tracking=tracking)
    return arguments


def prepare(arguments: Arguments) -> Plan:
    """Load everything that is named, so that whatever is wrong is said before any work is done."""
    artifacts = load_optimizers(arguments.optimizers)
    families, horizons = load_families(arguments)
    left_out = [name for name, baseline in BASELINES.items() if not baseline.installed]
    if arguments.baselines:
        left_out = []
    baselines = [find(name) for name in arguments.baselines or [n for n in BASELINES if n not in left_out]]
    labels = [*artifacts, *(baseline.name for baseline in baselines)]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two optimizers are called {label!r}; give the learned one another label: NAME={label}")
    if arguments.num_threads < 1:
        raise ValueError(f"num_threads must be at least 1; got {arguments.num_threads}")
    settings = {
        "optimizers": {label: artifact.identity for label, artifact in artifacts.items()},
        "baselines": [baseline.name for baseline in baselines],
        "families": {label: family.describe() for label, family in families.items()},
        "horizons": horizons,
        **dataclasses.asdict(arguments.evaluation),
        "device": arguments.device,
        "num_threads": arguments.num_threads,
    }
    return Plan(artifacts, baselines, families, horizons, left_out, json.loads(json.dumps(settings)))


def load_optimizers(named: Sequence[str]) -> dict[str, Artifact]:
    """Label -> learned optimizer. A file is called what it was exported as, unless the command line says otherwise."""
    out: dict[str, Artifact] = {}
    for text in named:
        label, equals, where = text.partition("=")
        artifact = load_artifact_or_shipped(where if equals else text)
        label = label if equals else artifact.name
        if label in out:
            raise ValueError(f"two optimizers are called {label!r}; give one another label, as in other={text}")
        out[label] = artifact
    if not out:
        raise ValueError("optimizers must name at least one learned optimizer: a file, or a name that ships")
    return out


def load_families(arguments: Arguments) -> tuple[dict[str, TaskFamily], dict[str, int]]:
    """Label -> family, and label -> horizon where it has one of its own."""
    horizons: dict[str, int] = {}
    if not arguments.families:
        families = suites.suite(arguments.suite)
    else:
        families = {}
        for name in arguments.families:
            described, own = (
                read_families(Path(name)) if name.endswith((".yaml", ".yml")) else ({name: {"name": name}}, {})
            )
            found = tasks.build(described)
            twice = sorted(found.keys() & families.keys())
            if twice:
                raise ValueError(f"two families are called {twice[0]!r}; give them different labels")
            families |= found
            horizons |= own
    if len(arguments.horizons) == 1:
        horizons = dict.fromkeys(families, arguments.horizons[0]) | horizons
    elif arguments.horizons:
        several = {f"{label}, {h} steps": (family, h) for label, family in families.items() for h in arguments.horizons}
        families = {label: family for label, (family, _) in several.items()}
        horizons = {label: h for label, (_, h) in several.items()}
    return families, horizons


def read_families(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What a YAML file says of families: label -> name and fields, and label -> horizon."""
    try:
        values = configuration.read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not values or not all(isinstance(v, dict) for v in values.values()):
        raise ValueError(f"{path} must hold a mapping of labels to families, as in  small: {{name: image_mlp}}")
    horizons = {}
    for label, fields in values.items():
        if "horizon" in fields:
            horizon = fields.pop("horizon")
            if not isinstance(horizon, int) or horizon < 1:
                raise ValueError(
                    f"{path}: the horizon of {label!r} must be a whole number of at least 1; got {horizon!r}"
                )
            horizons[str(label)] = horizon
    return {str(label): fields for label, fields in values.items()}, horizons


def folder_for(arguments: Arguments, plan: Plan) -> Path:
    """The folder, made if need be. One that holds another comparison's results is refused."""
    digits = hashlib.sha256(json.dumps(plan.settings, sort_keys=True).encode()).hexdigest()[:8]
    name = "families" if arguments.families else arguments.suite
    folder = Path(arguments.out) if arguments.out else Path("runs") / f"evaluation-{name}-{digits}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}; name another with --out") from error
    results = folder / "results.json"
    if results.is_file():
        try:
            before = json.loads(results.read_text(encoding="utf-8")).get("settings")
        except (ValueError, AttributeError, OSError):
            before = None
        if before != plan.settings:
            raise ValueError(f"{folder} holds the results of another comparison; name another folder with --out")
    return folder


def save_results(comparison: Comparison, plan: Plan, folder: Path, sums: Sequence[Total] = ()) -> None:
    """Write all results so far, and at the end what they come to over all families."""
    found = {
        "settings": plan.settings,
        "library_version": __version__,
        "torch": torch.__version__,
        "complete": len(comparison.results) == comparison.num_expected,
        "totals": [total.to_json() for total in sums],
        "comparison": comparison.to_json(),
    }
    write_atomically(folder / "results.json", json.dumps(found, indent=1, allow_nan=False).encode())


def run(arguments: Arguments) -> int:
    """The whole comparison, from its arguments to its report. Returns the exit status."""
    plan = prepare(arguments)
    folder = folder_for(arguments, plan)
    torch.set_num_threads(arguments.num_threads)
    cache = None if arguments.cache == "off" else RunCache(arguments.cache or default_folder())
    candidates = [Learned(name=n, rule=a.rule, theta=a.theta) for n, a in plan.artifacts.items()]
    progress = ComparisonProgress(len(plan.families) * (len(candidates) + len(plan.baselines)))
    so_far: list[Comparison] = []

    def keep(result: Result, comparison: Comparison) -> None:
        so_far[:] = [comparison]
        save_results(comparison, plan, folder)
        progress.found(result, comparison)

    progress.say(f"folder: {folder}" + (f"\ncache: {cache.folder}" if cache else ""))
    for name in plan.left_out:
        progress.say(f"{name} is left out: pip install 'learned-opt[baselines]'")
    tracker = Tracker(arguments.tracking, folder, plan.settings, resume=(folder / ID_FILE).is_file())
    status = 0
    try:
        with progress:
            comparison = compare(
                [*candidates, *plan.baselines],
                plan.families,
                arguments.evaluation,
                horizons=plan.horizons,
                device=arguments.device,
                cache=cache,
                on_start=progress.started,
                on_result=keep,
            )
        explanations = explain_all(arguments, plan, progress)
    except KeyboardInterrupt as stopped:
        status, explanations = status_of(stopped), {}
        progress.say("interrupted; the same command goes on from here")
        if not so_far:
            tracker.finish(exit_code=1)
            return status
        comparison = so_far[0]
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    if cache is not None:
        damaged = f", {cache.num_damaged} damaged ones among them" if cache.num_damaged else ""
        progress.say(f"runs from the cache: {cache.num_found}; computed: {cache.num_computed}{damaged}")
    sums = totals(comparison, num_resamples=arguments.evaluation.num_resamples)
    save_results(comparison, plan, folder, sums)
    report(comparison, sums, explanations, arguments, plan, folder, tracker, progress)
    tracker.finish(exit_code=1 if status else 0)
    return status


def explain_all(arguments: Arguments, plan: Plan, progress: ComparisonProgress) -> dict[str, Explanation]:
    """What every learned optimizer has learned; one that cannot be explained costs the report that part alone."""
    if arguments.explain_families < 0:
        return {}
    families = dict(list(plan.families.items())[: arguments.explain_families])
    horizon = min([200, *(plan.horizons.get(label, arguments.evaluation.horizon) for label in families)])
    out = {}
    for label, artifact in plan.artifacts.items():
        progress.say(f"explaining {label}")
        try:
            out[label] = explain(artifact.rule, artifact.theta, families, horizon=max(horizon, 2))
        except Exception as error:
            progress.say(f"{label} could not be explained: {type(error).__name__}: {error}")
    return out


def report(
    comparison: Comparison,
    sums: Sequence[Total],
    explanations: dict[str, Explanation],
    arguments: Arguments,
    plan: Plan,
    folder: Path,
    tracker: Tracker,
    progress: ComparisonProgress,
) -> None:
    """Print the tables, write pictures and page, and send all of it to the tracker."""
    progress.say("\n" + comparison.table())
    if sums:
        progress.say("\n" + totals_table(sums, comparison.reference))
    pictures = {"curves": folder / "curves.png"}
    save_curves(comparison, pictures["curves"])
    for name, draw in (("speedups", draw_speedups), ("profiles", draw_profiles)) if sums else ():
        pictures[name] = folder / f"{name}.png"
        draw(comparison, sums).savefig(pictures[name], dpi=_DOTS_PER_INCH, facecolor="white")
    facts = {
        **{name: value for name, value in plan.settings.items() if name != "families"},
        **{f"weights of {label}": artifact.identity for label, artifact in plan.artifacts.items()},
        "library": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }
    title = " and ".join(plan.artifacts) + ": " + ("families" if arguments.families else f"suite {arguments.suite}")
    html = build(comparison, title=title, explanations=explanations, settings=facts)
    write_atomically(folder / "report.html", html.encode())
    explained = {label: explanation.to_json() for label, explanation in explanations.items()}
    write_atomically(folder / "explanations.json", json.dumps(explained, allow_nan=False).encode())
    progress.say(f"\nresults: {folder / 'results.json'}\nreport: {folder / 'report.html'}")
    tracker.log_table("results", comparison.header(), comparison.rows(wide=True))
    for name, path in pictures.items():
        tracker.log_image(name, path)
    for total in sums:
        tracker.log_summary(
            {f"speedup/{total.optimizer}": total.speedup.value, f"diverged/{total.optimizer}": total.num_diverged}
        )
    for name in ("results.json", "report.html"):
        tracker.log_artifact(folder / name, name=f"evaluation-{Path(name).stem}", kind="evaluation")


def status_of(stopped: KeyboardInterrupt) -> int:
    """128 + the number of the signal that stopped the command."""
    return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)


def main() -> int:
    """The command: 0 when all is done, 2 for bad input, 128 + signal when stopped."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return run(parse(sys.argv[1:]))
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt as stopped:
        return status_of(stopped)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 2


if __name__ == "__main__":
    sys.exit(main())
