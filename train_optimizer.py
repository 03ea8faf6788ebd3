"""Meta-train an update rule into an optimizer: configure, assemble, loop, export, compare.

    python train_optimizer.py                                   the demo preset
    python train_optimizer.py --preset quadratic         another preset
    python train_optimizer.py --config my.yaml --trainer.outer-steps 2000
    python train_optimizer.py --resume runs/digits              continue a run that was stopped
    torchrun --nproc-per-node 4 train_optimizer.py              the same run on four processes; see docs/scale.md

Everything a run makes lies in its folder: config.yaml, checkpoints/, optimizer.safetensors, results.json, curves.png
and wandb/. Of several processes the first alone writes there, prints, and reports to wandb.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch

try:
    import pydantic  # noqa: F401  (checks configuration files)
    import rich  # noqa: F401  (the progress bar)
    import tyro
    import yaml  # noqa: F401  (reads them)
    from rich.console import Console
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: meta-training needs {missing.name}: pip install 'learned-opt[train]'") from None

import tasks
from learned_opt import config as configuration
from learned_opt import distributed, estimators, managed, rules
from learned_opt.artifact import Artifact, check_theta, save_artifact
from learned_opt.artifact import load as load_artifact_or_shipped
from learned_opt.checkpoints import CheckpointFolder
from learned_opt.command_line import quietly, yaml_dicts
from learned_opt.config import RunConfig
from learned_opt.distributed import ALONE, LostRank, Ranks, StoppedElsewhere
from learned_opt.evaluation import BASELINES, Comparison, Learned, compare
from learned_opt.files import write_atomically
from learned_opt.initial_params import name_of, split
from learned_opt.meta_trainer import MetaTrainer
from learned_opt.progress import Progress
from learned_opt.rules import UpdateRule
from learned_opt.run_folder import RunFolder, open_folder, refuse_differences, versions
from learned_opt.stop_signals import StopSignals
from learned_opt.task import TaskFamily, Tensors
from learned_opt.tracking import Mode, Tracker, TrackingConfig

SOURCES = [Path(str(module.__file__)).parent for module in (distributed, tasks)]
"""Folders of the packages whose code a run depends on."""


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
    auto_resume: bool = False
    """With --run-dir: continue the run in that folder if there is one, start it otherwise. For queues that start a job
    again after an interruption."""
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
    arguments = tyro.cli(Arguments, args=list(argv), default=Arguments(settings=settings), registry=yaml_dicts())
    if arguments.wandb:
        tracking = dataclasses.replace(arguments.settings.tracking, mode=cast(Mode, arguments.wandb))
        arguments = dataclasses.replace(arguments, settings=dataclasses.replace(arguments.settings, tracking=tracking))
    return arguments


def assemble(settings: RunConfig, ranks: Ranks = ALONE) -> MetaTrainer:
    """The meta-trainer that the settings describe, with this rank's share of the particles.

    Raises:
        ValueError: a name or a setting is not valid, of whatever is used later too.
    """
    unknown = [name for name in settings.baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; choose from {', '.join(BASELINES)}")
    rule = rules.get(settings.rule, **settings.rule_settings)
    exported_rule(settings, rule)
    families = build_families(settings.families)
    return MetaTrainer(
        rule,
        families,
        settings.trainer,
        estimators.get(settings.estimator, **settings.estimator_settings),
        validation_families=build_families(settings.validation_families),
        theta=starting_theta(settings, rule, families) if settings.start_from else None,
        device=ranks.place(settings.device),
        ranks=ranks,
    )


def starting_theta(settings: RunConfig, rule: UpdateRule, families: Iterable[str]) -> Tensors:
    """The theta of an exported optimizer, which must be of this rule, with the initial parameters to go on from."""
    path = managed.expand(settings.start_from)
    found = load_artifact_or_shipped(path)
    ours = [one.settings() for one in (rule, exported_rule(settings, rule))]
    if found.rule.kind != rule.kind or found.rule.settings() not in ours:
        raise ValueError(
            f"start_from names {path}, whose rule is {found.rule.kind} with {found.rule.settings()}; "
            f"the run's rule is {rule.kind} with {rule.settings()}"
        )
    labels = [n for n in settings.trainer.initial_params.labels(families) if n in found.initial_params]
    initial = {name_of(n): torch.cat([v.flatten() for v in found.initial_params[n].values()]) for n in labels}
    return {**found.theta, **initial}


def build_families(described: dict[str, dict[str, Any]]) -> dict[str, TaskFamily]:
    """Label -> family, from label -> {name: …, setting: value, …}; an entry with `sample` becomes several.

    $NAME and ${NAME} in a setting stand for environment variables, such as a data folder's.
    """
    return tasks.build(managed.expand(described))


def meta_train(
    trainer: MetaTrainer, settings: RunConfig, folder: RunFolder, tracker: Tracker, progress: Progress
) -> int:
    """The outer loop. Returns 0 when it is done, or the number of the signal that stopped it."""
    checkpoints = CheckpointFolder(folder.checkpoints, keep=settings.keep_checkpoints)
    ranks, signals = trainer.ranks, StopSignals()
    saved = -1

    def save(best: bool = False) -> None:
        state = trainer.state_dict()  # of all ranks, at the first one
        if ranks.is_first:
            checkpoints.save(state, trainer.outer_step, best=best)

    with progress, signals:
        # A signal to any rank stops all of them after the same outer step.
        while not (stopped := ranks.highest(signals.received)) and not trainer.finished:
            before = trainer.totals["inner_steps"]
            metrics = trainer.step()
            rate = progress.update(trainer.outer_step, metrics["meta_loss"], trainer.totals["inner_steps"] - before)
            metrics["inner_steps_per_second"] = rate
            improved = False
            if trainer.validation_due:
                metrics |= trainer.validate()
                improved = trainer.best_step == trainer.outer_step
                progress.validated(trainer.outer_step, metrics["validation"], improved)
            if ranks.is_first and settings.diagnose_every and trainer.outer_step % settings.diagnose_every == 0:
                metrics |= diagnose(trainer, settings)
            tracker.log(metrics, trainer.outer_step)
            if improved or trainer.finished or trainer.outer_step % settings.checkpoint_every == 0:
                save(improved)
                saved = trainer.outer_step
        # Here, and not in the loop: a signal may come at any moment, also before the first step.
        if stopped and saved != trainer.outer_step:
            save()
    return stopped


def diagnose(trainer: MetaTrainer, settings: RunConfig) -> dict[str, float]:
    """Bias, noise and cost of the estimator at the current theta, on the first family; the run is not touched."""
    work = next(iter(trainer.work.values()))
    longest = settings.trainer.horizons_at(trainer.curriculum).longest
    comparison = estimators.compare(
        trainer.rule,
        work.batched.family,
        split(trainer.theta)[0],
        {settings.estimator: trainer.estimator},
        horizon=longest - longest % work.truncation,
        truncations=(work.truncation,),
        num_particles=settings.trainer.num_particles,
        num_samples=4,
        device=settings.device,
    )
    return comparison.metrics("diagnostics")


def exported_rule(settings: RunConfig, rule: UpdateRule) -> UpdateRule:
    """The rule of the exported file: the trained one, but for `export_settings`.

    Raises:
        ValueError: a setting is not valid, or theta would have other shapes with it.
    """
    out = rules.get(settings.rule, **{**settings.rule_settings, **settings.export_settings})
    try:
        check_theta(out, rule.init_theta(torch.Generator()))
    except ValueError as error:
        raise ValueError(
            f"export_settings must leave theta as it is trained; with {settings.export_settings} {error}: "
            "put them into rule_settings"
        ) from None
    return out


def export(trainer: MetaTrainer, start: Tensors, settings: RunConfig, folder: RunFolder) -> Artifact:
    """Write the best theta, or what lies between it and where training began, as one file."""
    rule = exported_rule(settings, trainer.rule)
    trained_with = {name: trainer.rule.settings()[name] for name in settings.export_settings}
    provenance = {
        "families": settings.families,
        "trained_with": trained_with,
        "export_share": settings.export_share,
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
    theta, initial = split(trainer.best_theta if trainer.best_theta is not None else trainer.theta)
    if settings.export_share < 1:
        theta = {name: start[name] + settings.export_share * (value - start[name]) for name, value in theta.items()}
    initial_params = {label: trainer.work[label].batched.unflatten(flat) for label, flat in initial.items()}
    return save_artifact(folder.optimizer, rule, theta, provenance, name=settings.rule, initial_params=initial_params)


def evaluate(artifact: Artifact, settings: RunConfig, folder: RunFolder, device: str) -> Comparison:
    """Compare with the tuned baselines on meta-test tasks; every result is saved as it comes."""

    def save(comparison: Comparison) -> None:
        write_atomically(folder.results, json.dumps(comparison.to_json(), indent=1).encode())

    return compare(
        [
            Learned(name="learned", rule=artifact.rule, theta=artifact.theta, initial_params=artifact.initial_params),
            *(BASELINES[name] for name in settings.baselines),
        ],
        build_families(settings.test_families or settings.families),
        settings.evaluation,
        device=device,
        on_result=lambda _, comparison: save(comparison),
    )


def latest_state(folder: RunFolder, arguments: Arguments) -> dict[str, Any] | None:
    """The newest checkpoint; None for a run killed before its first one, which starts over: the same bits."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    return checkpoints.load_latest(fall_back=arguments.fall_back) if checkpoints.latest() is not None else None


def run(arguments: Arguments, ranks: Ranks = ALONE, job: managed.ManagedJob | None = None) -> int:
    """One run, from its settings to its report. Returns the exit status."""
    if job is not None and not (arguments.resume or arguments.run_dir):
        arguments = dataclasses.replace(arguments, run_dir=str(job.run), auto_resume=True)
    settings = arguments.settings
    refuse_differences(ranks, {"settings": settings.to_dict(), "versions": versions(SOURCES)})
    torch.set_num_threads(settings.num_threads)
    trainer = ranks.together(lambda: assemble(settings, ranks))
    held: list[RunFolder] = []

    def take() -> tuple[Path, bool, dict[str, Any] | None]:
        stem = Path(arguments.config).stem if arguments.config else arguments.preset
        folder, resuming = open_folder(
            settings,
            ranks,
            stem=stem,
            resume=arguments.resume,
            run_dir=arguments.run_dir,
            auto_resume=arguments.auto_resume,
        )
        held.append(folder)
        try:
            return folder.path, resuming, latest_state(folder, arguments) if resuming else None
        except ValueError:
            folder.release()
            raise

    start = {name: value.clone() for name, value in split(trainer.theta)[0].items()}
    path, resuming, state = ranks.first(take)
    folder = held[0] if held else RunFolder(path)  # the first rank's is locked
    if state is not None:
        ranks.together(lambda: trainer.load_state_dict(state))
    tracking = settings.tracking if ranks.is_first else TrackingConfig(mode="disabled")
    tracker = Tracker(tracking, folder.path, settings.to_dict(), resume=resuming)
    console = None if ranks.is_first else Console(quiet=True)
    progress = Progress(settings.trainer.outer_steps, completed=trainer.outer_step, console=console)
    try:
        progress.say(f"run folder: {folder.path}" + (f"\nwandb: {tracker.url}" if tracker.url else ""))
        if resuming:
            progress.say(f"continuing at outer step {trainer.outer_step}")
        stopped = meta_train(trainer, settings, folder, tracker, progress)
        if stopped:
            progress.say(
                f"stopped at outer step {trainer.outer_step}; continue with: "
                f"python train_optimizer.py --resume {folder.path}"
            )
            tracker.finish(exit_code=1)
            return 128 + stopped
        if not ranks.is_first:
            return 0  # what is left is for one process
        artifact = export(trainer, start, settings, folder)
        tracker.log_artifact(
            folder.optimizer, name=f"optimizer-{settings.rule}", metadata={"hash": artifact.hash, **artifact.provenance}
        )
        tracker.log_summary({"best_score": trainer.best_score, "best_step": trainer.best_step})
        progress.say(f"exported the theta of outer step {trainer.best_step} to {folder.optimizer}")
        if settings.baselines:
            report(evaluate(artifact, settings, folder, ranks.place(settings.device)), folder, tracker, progress)
        if job is not None:
            job.deliver(folder)
            progress.say(f"copied to {job.model}")
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
    """The command: 0 when all is done, 2 for bad input, 1 if another rank is gone, 128 + signal when stopped."""
    ranks, job = ALONE, managed.find()

    def fail(reason: str) -> int:
        print(f"error: {reason}" if ranks.is_first else f"error: rank {ranks.rank}: {reason}", file=sys.stderr)
        if job is not None:
            job.failed(reason)
        return 2

    try:
        with distributed.start() as ranks:
            if not ranks.is_first:
                warnings.simplefilter("ignore")  # the first rank has the same
            argv = managed.arguments(sys.argv[1:]) if job is not None else sys.argv[1:]
            return run(ranks.together(lambda: quietly(parse, argv, speak=ranks.is_first)), ranks, job)
    except (StoppedElsewhere, LostRank) as error:
        if ranks.is_first:
            fail(str(error))
        else:
            time.sleep(1)  # torchrun ends all ranks once one has ended: the first has something to say
        return 1
    except (ValueError, RuntimeError) as error:
        return fail(str(error))
    except OSError as error:
        disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = "; make room or check the permissions, then continue with --resume" if disk else ""
        return fail(f"{error}{remedy}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
