"""Meta-train an update rule into an optimizer: configure, assemble, loop, export, compare.

    python train_optimizer.py                                   the demo preset
    python train_optimizer.py --preset quadratic         another preset
    python train_optimizer.py --config my.yaml --trainer.outer-steps 2000
    python train_optimizer.py --resume runs/digits              continue a run that was stopped

Everything a run makes lies in its folder: config.yaml, checkpoints/, optimizer.safetensors, results.json, curves.png
and wandb/.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch

try:
    import pydantic  # noqa: F401  (checks configuration files)
    import rich  # noqa: F401  (the progress bar)
    import tyro
    import yaml
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: meta-training needs {missing.name}: pip install 'learned-opt[train]'") from None

import tasks
from learned_opt import config as configuration
from learned_opt import estimators, rules
from learned_opt.artifact import Artifact, save_artifact
from learned_opt.artifact import load as load_artifact_or_shipped
from learned_opt.checkpoints import CheckpointFolder
from learned_opt.config import RunConfig
from learned_opt.evaluation import BASELINES, Comparison, Learned, compare
from learned_opt.files import write_atomically
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.progress import Progress
from learned_opt.rules import UpdateRule
from learned_opt.run_folder import RunFolder
from learned_opt.task import TaskFamily, Tensors
from learned_opt.tracking import Mode, Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Meta-train an optimizer. Every setting below may also stand in a YAML file given with --config."""

    preset: str = "digits"
    """Settings to start from; see learned_opt/presets."""
    config: str = ""
    """YAML file of settings to start from, instead of a preset."""
    resume: str = ""
    """Folder of a run to continue, with the settings it was started with."""
    fall_back: bool = False
    """When resuming: if the newest checkpoint is damaged, use the one before it."""
    run_dir: str = ""
    """Folder for what the run makes; by default runs/<preset>, or runs/<preset>-2, … if that is taken."""
    wandb: str = ""
    """Short for --settings.tracking.mode: auto, offline, online or disabled."""
    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)


def parse(argv: Sequence[str]) -> Arguments:
    """The arguments and the settings: preset or file first, then whatever the command line overrides."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--config", "--resume"):
        first.add_argument(option, default="")
    chosen, _ = first.parse_known_args(argv)
    if chosen.resume:
        settings = RunFolder(Path(chosen.resume)).load_config()
    elif chosen.config:
        settings = configuration.load(Path(chosen.config))
    else:
        settings = configuration.preset(chosen.preset or "digits")
    arguments = tyro.cli(Arguments, args=list(argv), default=Arguments(settings=settings), registry=_yaml_dicts())
    if arguments.wandb:
        tracking = dataclasses.replace(arguments.settings.tracking, mode=cast(Mode, arguments.wandb))
        arguments = dataclasses.replace(arguments, settings=dataclasses.replace(arguments.settings, tracking=tracking))
    return arguments


def _yaml_dicts() -> tyro.constructors.ConstructorRegistry:
    """Dictionaries on the command line are YAML: --rule-settings '{hidden_size: 4}'."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type_origin is not dict:
            return None

        def read(strings: list[str]) -> dict[str, Any]:
            value = configuration.read_yaml(strings[0])
            if not isinstance(value, dict):
                raise ValueError(f"{strings[0]!r} is not a YAML mapping such as {{hidden_size: 4}}")
            return value

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="YAML",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [
                yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
            ],
        )

    return registry


def assemble(settings: RunConfig) -> MetaTrainer:
    """The meta-trainer that the settings describe."""
    rule = rules.get(settings.rule, **settings.rule_settings)
    return MetaTrainer(
        rule,
        build_families(settings.families),
        settings.trainer,
        estimators.get(settings.estimator, **settings.estimator_settings),
        validation_families=build_families(settings.validation_families),
        theta=starting_theta(settings.start_from, rule) if settings.start_from else None,
        device=settings.device,
    )


def starting_theta(path: str, rule: UpdateRule) -> Tensors:
    """The theta of an exported optimizer, which must be of this rule."""
    found = load_artifact_or_shipped(path)
    if (found.rule.kind, found.rule.settings()) != (rule.kind, rule.settings()):
        raise ValueError(
            f"start_from names {path}, whose rule is {found.rule.kind} with {found.rule.settings()}; "
            f"the run's rule is {rule.kind} with {rule.settings()}"
        )
    return found.theta


def build_families(described: dict[str, dict[str, Any]]) -> dict[str, TaskFamily]:
    """Label -> family, from label -> {name: …, setting: value, …}; an entry with `sample` becomes several."""
    return tasks.build(described)


def meta_train(
    trainer: MetaTrainer, settings: RunConfig, folder: RunFolder, tracker: Tracker, progress: Progress
) -> int:
    """The outer loop. Returns 0 when it is done, or the number of the signal that stopped it."""
    checkpoints = CheckpointFolder(folder.checkpoints, keep=settings.keep_checkpoints)
    signals = StopSignals()
    saved = -1
    with progress, signals:
        while not trainer.finished and not signals.received:
            before = trainer.totals["inner_steps"]
            metrics = trainer.step()
            rate = progress.update(trainer.outer_step, metrics["meta_loss"], trainer.totals["inner_steps"] - before)
            metrics["inner_steps_per_second"] = rate
            improved = False
            if trainer.validation_due:
                metrics |= trainer.validate()
                improved = trainer.best_step == trainer.outer_step
                progress.validated(trainer.outer_step, metrics["validation"], improved)
            if settings.diagnose_every and trainer.outer_step % settings.diagnose_every == 0:
                metrics |= diagnose(trainer, settings)
            tracker.log(metrics, trainer.outer_step)
            if improved or trainer.finished or trainer.outer_step % settings.checkpoint_every == 0:
                checkpoints.save(trainer.state_dict(), trainer.outer_step, best=improved)
                saved = trainer.outer_step
        # Here, and not in the loop: a signal may come at any moment, also before the first step.
        if signals.received and saved != trainer.outer_step:
            checkpoints.save(trainer.state_dict(), trainer.outer_step)
    return signals.received


def diagnose(trainer: MetaTrainer, settings: RunConfig) -> dict[str, float]:
    """Bias, noise and cost of the estimator at the current theta, on the first family; the run is not touched."""
    work = next(iter(trainer.work.values()))
    longest = settings.trainer.horizons_at(trainer.curriculum).longest
    comparison = estimators.compare(
        trainer.rule,
        work.batched.family,
        trainer.theta,
        {settings.estimator: trainer.estimator},
        horizon=longest - longest % work.truncation,
        truncations=(work.truncation,),
        num_particles=settings.trainer.num_particles,
        num_samples=4,
        device=settings.device,
    )
    return comparison.metrics("diagnostics")


def export(trainer: MetaTrainer, settings: RunConfig, folder: RunFolder) -> Artifact:
    """Write the best theta as one file."""
    provenance = {
        "families": settings.families,
        "start_from": settings.start_from,
        "estimator": settings.estimator,
        "horizon": settings.trainer.horizons.longest,
        "truncation": settings.trainer.truncation,
        "seed": settings.trainer.seed,
        "outer_steps": trainer.best_step,
        "inner_steps": trainer.totals["inner_steps"],
        "validation": trainer.best_score,
        "torch": torch.__version__,
    }
    theta = trainer.best_theta if trainer.best_theta is not None else trainer.theta
    return save_artifact(folder.optimizer, trainer.rule, theta, provenance, name=settings.rule)


def evaluate(artifact: Artifact, settings: RunConfig, folder: RunFolder, device: str) -> Comparison:
    """Compare with the tuned baselines on meta-test tasks; every result is saved as it comes."""

    def save(comparison: Comparison) -> None:
        write_atomically(folder.results, json.dumps(comparison.to_json(), indent=1).encode())

    return compare(
        [
            Learned(name="learned", rule=artifact.rule, theta=artifact.theta),
            *(BASELINES[name] for name in settings.baselines),
        ],
        build_families(settings.test_families or settings.families),
        settings.evaluation,
        device=device,
        on_result=lambda _, comparison: save(comparison),
    )


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish to stop after the current outer step; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, self._before[number])


def run(arguments: Arguments) -> int:
    """One run, from its settings to its report. Returns the exit status."""
    settings, resuming = arguments.settings, bool(arguments.resume)
    unknown = [name for name in settings.baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; choose from {', '.join(BASELINES)}")
    torch.set_num_threads(settings.num_threads)
    trainer = assemble(settings)
    if resuming:
        folder = RunFolder(Path(arguments.resume))
        folder.resume(settings)
        checkpoints = CheckpointFolder(folder.checkpoints)
        if checkpoints.latest() is not None:  # a run killed before its first checkpoint starts over: the same bits
            trainer.load_state_dict(checkpoints.load_latest(fall_back=arguments.fall_back))
    else:
        stem = Path(arguments.config).stem if arguments.config else arguments.preset
        folder = RunFolder(Path(arguments.run_dir)) if arguments.run_dir else RunFolder.new(Path("runs"), stem)
        folder.start(settings)
    tracker = Tracker(settings.tracking, folder.path, settings.to_dict(), resume=resuming)
    progress = Progress(settings.trainer.outer_steps, completed=trainer.outer_step)
    try:
        progress.say(f"run folder: {folder.path}" + (f"\nwandb: {tracker.url}" if tracker.url else ""))
        stopped = meta_train(trainer, settings, folder, tracker, progress)
        if stopped:
            progress.say(
                f"stopped at outer step {trainer.outer_step}; continue with: "
                f"python train_optimizer.py --resume {folder.path}"
            )
            tracker.finish(exit_code=1)
            return 128 + stopped
        artifact = export(trainer, settings, folder)
        tracker.log_artifact(
            folder.optimizer, name=f"optimizer-{settings.rule}", metadata={"hash": artifact.hash, **artifact.provenance}
        )
        tracker.log_summary({"best_score": trainer.best_score, "best_step": trainer.best_step})
        progress.say(f"exported the theta of outer step {trainer.best_step} to {folder.optimizer}")
        if settings.baselines:
            report(evaluate(artifact, settings, folder, settings.device), folder, tracker, progress)
        tracker.finish()
        return 0
    except KeyboardInterrupt:
        progress.say(f"interrupted; continue with: python train_optimizer.py --resume {folder.path}")
        tracker.finish(exit_code=1)
        return 128 + signal.SIGINT
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    finally:
        folder.release()


def report(comparison: Comparison, folder: RunFolder, tracker: Tracker, progress: Progress) -> None:
    """Print the table, draw the picture, and send both to the tracker."""
    from learned_opt.evaluation import plots

    plots.save_curves(comparison, folder.picture)
    progress.say("\n" + comparison.table())
    progress.say(f"\nresults: {folder.results}\npicture: {folder.picture}")
    tracker.log_table("results", comparison.header(), comparison.rows())
    tracker.log_image("curves", folder.picture)


def main() -> int:
    """The command: 0 when all is done, 2 for bad input, 128 + signal when stopped."""
    try:
        return run(parse(sys.argv[1:]))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = "; make room or check the permissions, then continue with --resume" if disk else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
