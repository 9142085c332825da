"""What each command does: thin over the package, whose heavy parts are imported where they are needed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distkd.errors import ConfigError
from distkd.world import World

if TYPE_CHECKING:
    from distkd.data.shardset import ShardSet
    from distkd.slurm.site import Site
    from distkd.slurm.units import Unit
    from distkd.train.settings import Settings

__all__ = [
    "DONE", "config", "doctor", "evaluate", "export", "predict", "report", "say", "shards", "status", "submit", "top",
    "train",
]  # fmt: skip

DONE = 0


def say(world: World, text: str) -> None:
    """To standard error, once and not once per rank."""
    if world.is_main:
        print(f"distkd: {text}", file=sys.stderr, flush=True)


def train(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.comm import world as comm
    from distkd.config import parse_overrides
    from distkd.stages import in_order, load_all
    from distkd.train import loop
    from distkd.train.job import device_of

    overrides = parse_overrides(rest)
    loaded = load_all(arguments.config, overrides, folds=arguments.folds, seeds=arguments.seeds)
    stages = in_order(list(loaded.values()))
    if arguments.stage_in:
        return _stage_in(stages, world)
    first = stages[0]
    comm.init(
        world,
        device=device_of(first, world),
        timeout_s=first.engine.timeout_s,
        debug=first.engine.debug,
        record=first.folder / "events" / "flight-rank-",
    )
    try:
        for settings in stages:
            followed = settings is not stages[-1]
            loop.train(settings, world, allow_change=arguments.allow_change, followed=followed)
    finally:
        comm.shutdown()
    return DONE


def _stage_in(stages: Sequence[Settings], world: World) -> int:
    """Copy what the stages would copy to this machine, so that no rank waits for that in a collective."""
    from distkd.data.manifest import MANIFEST
    from distkd.data.scratch import local_copy
    from distkd.train.job import shards_folder

    asking = [stage for stage in stages if stage.data.scratch is not None]
    if not asking:
        say(world, "nothing to copy: data.scratch is not set")
    for folder, scratch, make in dict.fromkeys((shards_folder(s), str(s.data.scratch), s.data.make) for s in asking):
        if make is not None and not (folder / MANIFEST).exists():
            say(world, f"nothing to copy: training makes shard set {str(folder)!r} first")
        else:
            print(local_copy(folder, scratch), flush=True)
    return DONE


def submit(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.config import parse_overrides
    from distkd.slurm import submit
    from distkd.slurm.words import advice_for
    from distkd.stages import in_order, load_all, teacher_folders

    overrides = parse_overrides(rest, advice_for)
    place = submit.where(arguments.site)
    loaded = load_all(arguments.config, overrides, folds=arguments.folds, seeds=arguments.seeds)
    in_order(list(loaded.values()))  # says what no order of the stages mends
    units = [
        submit.Unit(path, fold, seed, settings, teacher_folders(settings))
        for (path, fold, seed), settings in loaded.items()
    ]
    for unit in {unit.config: unit for unit in units}.values():
        _check_site_words(unit, place.site, overrides)
    names = ("nodes", "ranks_per_node", "time", "together", "elastic", "throttle", "dry_run", "allow_change")
    given = {name: getattr(arguments, name) for name in names}
    options = submit.Options(**given, lead_s=arguments.lead, report=not arguments.no_report, words=rest)
    submit.submit(units, options, place)
    return DONE


def _check_site_words(unit: Unit, site: Site, overrides: Mapping[str, Any]) -> None:
    """Refuse what would be refused in the job, where the scripts put settings of the site before the user's words."""
    from distkd.config import load, parse_overrides

    words = site.overrides(streamed=unit.streamed)
    try:
        load(unit.config, {**parse_overrides(words), **overrides}, fold=unit.fold, seed=unit.seed)
    except ConfigError as error:
        advice = f"jobs are given {shlex.join(words)} by the site's settings (DISTKD_SCRATCH, DISTKD_METRICS)"
        raise ConfigError(f"{error}\n{advice}; mend them in slurm/site.env, or in the environment") from error


def _no_rest(rest: list[str]) -> None:
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; see --help")


def evaluate(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.config import load, parse_overrides
    from distkd.train.use import evaluate_run

    metrics = evaluate_run(load(_config_of(arguments.run), parse_overrides(rest)), arguments.run, arguments.split)
    print(json.dumps(metrics, indent=1))
    return DONE


def _config_of(run: Path) -> Path:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml; name a folder that `distkd train` wrote")
    return path


def predict(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.train.use import predict_files

    _no_rest(rest)
    path = predict_files(arguments.source, arguments.input, arguments.output)
    print(path)
    return DONE


def export(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.train.use import copy_export

    _no_rest(rest)
    if arguments.format != "safetensors":
        raise ConfigError(f"export --format {arguments.format} is not available yet; use --format safetensors")
    print(copy_export(arguments.run, arguments.output))
    return DONE


def report(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.report import make_report

    _no_rest(rest)
    print(make_report(arguments.run, arguments.output, split=arguments.split, baseline=arguments.baseline))
    return DONE


def shards(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.data.look.opened import opened

    _no_rest(rest)
    options = {"info": ("json",), "verify": ("threads",), "show": ("output", "per_class", "samples", "fold")}
    options["copy"] = ("to",)
    for action, names in options.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
        if given and action != arguments.action:
            raise ConfigError(f"{given[0]} is an option of `shards {action}`, not of `shards {arguments.action}`")
    if arguments.action == "copy":
        return _copy(arguments)
    with opened(arguments.folder) as shards:
        _look(shards, arguments, world)
    return DONE


def _copy(arguments: argparse.Namespace) -> int:
    from distkd.data.remote.transport import is_url
    from distkd.data.scratch import copy_set

    if arguments.to is None:
        raise ConfigError("`shards copy` needs --to FOLDER, a folder on this machine's own disk")
    if is_url(arguments.folder):
        raise ConfigError(
            f"`shards copy` copies a folder, {arguments.folder} is none; what is streamed is kept on a disk of "
            "this machine by data.stream.cache"
        )
    print(copy_set(Path(arguments.folder), arguments.to))
    return DONE


def _look(shards: ShardSet, arguments: argparse.Namespace, world: World) -> None:
    remote = shards.place != str(shards.folder)
    if arguments.action == "info":
        from distkd.data.look.info import info
        from distkd.data.look.summary import summary

        print(summary(shards).to_json() if arguments.json else info(shards))
    elif arguments.action == "verify":
        from distkd.data.look.info import verified

        if remote:
            shards.verify()  # says why it does not
        print(verified(shards, arguments.threads))
    else:
        from distkd.data.look.show import show

        out = arguments.output or (Path() if remote else shards.folder) / "samples.png"
        shown = show(shards, out, per_class=arguments.per_class or 4, keys=arguments.samples, fold=arguments.fold)
        for note in shown.left_out:
            say(world, note)
        print(shown.path)


def config(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.config import load, parse_overrides, schema

    if arguments.schema:
        print(json.dumps(schema(), indent=1))
        return DONE
    if arguments.config is None:
        raise ConfigError("name a config file, or pass --schema")
    settings = load(arguments.config, parse_overrides(rest))
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
    return DONE


def status(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.slurm.table import run

    _no_rest(rest)
    return run(
        arguments.run or [Path("runs")], as_json=arguments.json, every_s=arguments.watch, everything=arguments.all
    )


def top(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.top.run import run

    _no_rest(rest)
    return run(arguments.run or [Path("runs")], once=arguments.once, as_json=arguments.json, every_s=arguments.interval)


def doctor(arguments: argparse.Namespace, rest: list[str], world: World) -> int:
    from distkd.doctor import run

    _no_rest(rest)
    return run()
