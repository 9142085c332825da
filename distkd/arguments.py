"""What the command line takes: commands, their arguments, and the words that explain them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from distkd import __version__
from distkd import commands as do
from distkd.world import World

__all__ = ["parser"]

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]

_EPILOG = """exit codes: 0 done, 2 error in config, data or arguments, 3 interrupted with a complete checkpoint,
1 anything else. Launchers lose them: `outcome.json` in the run folder has the truth."""


def parser() -> argparse.ArgumentParser:
    """Of all commands; each sets `command`, a function of `distkd.commands`."""
    every = argparse.ArgumentParser(
        prog="distkd",
        description="Distil a teacher that sees everything into a student for the clinic.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every.add_argument("--version", action="version", version=f"distkd {__version__}")
    every.add_argument("--debug", action="store_true", help="show the traceback of user errors too")
    commands = every.add_subparsers(required=True, metavar="COMMAND")
    for add in (_train, _submit, _evaluate, _predict, _export, _report, _shards, _config, _status, _top, _doctor):
        add(commands)
    return every


def _train(commands: _Commands) -> None:
    train = _command(commands, "train", do.train, "train one stage per config, in order; resumes by itself")
    train.add_argument("config", nargs="+", type=Path, help="YAML files, for example a teacher's and a student's")
    train.add_argument("--folds", type=_numbers, help="repeat for these folds, for example 0-14 or 0,3,7")
    train.add_argument("--seeds", type=_numbers, help="repeat for these seeds, for example 0-4")
    train.add_argument("--allow-change", action="store_true", help="go on in a run folder although the config changed")
    train.add_argument("--stage-in", action="store_true", help="only copy to data.scratch, once a machine before a job")
    train.epilog = (
        "Any config value can be given as --section.field VALUE, for example --optim.lr 1e-3 --run.root /scratch/runs. "
        "Watch it with `distkd top RUN`; with --metrics.export local Prometheus can, see docs/monitoring.md."
    )


def _submit(commands: _Commands) -> None:
    submit = _command(commands, "submit", do.submit, "train as SLURM jobs: teachers, then students, then a report")
    submit.add_argument("config", nargs="+", type=Path, help="YAML files, for example a teacher's and a student's")
    submit.add_argument("--folds", type=_numbers, help="an array job over these folds, for example 0-14 or 0,3,7")
    submit.add_argument("--seeds", type=_numbers, help="an array job over these seeds, for example 0-4")
    submit.add_argument("--nodes", type=_positive, metavar="N", help="nodes of each job (default: 1)")
    submit.add_argument("--ranks-per-node", type=_positive, metavar="N", help="default: one per GPU, without GPUs 1")
    submit.add_argument("--time", metavar="LIMIT", help="time limit of each job, for example 4:00:00")
    submit.add_argument(
        "--lead", type=_positive, default=120, metavar="SECONDS", help="save so long before the limit (default: 120)"
    )
    submit.add_argument("--together", action="store_true", help="all stages in one job (or task) instead of one each")
    submit.add_argument("--elastic", type=_positive, metavar="MIN", help="go on after a loss while MIN nodes are left")
    submit.add_argument("--throttle", type=_positive, metavar="N", help="at most N tasks of each array at once")
    submit.add_argument("--site", type=Path, metavar="FILE", help="settings of the cluster (default: slurm/site.env)")
    submit.add_argument("--no-report", action="store_true", help="no job for the report at the end")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch commands and submit nothing")
    submit.add_argument("--allow-change", action="store_true", help="go on in a run folder although the config changed")
    submit.epilog = """Runs that are done are left out, those in the queue refused. Any config value can be given as
--section.field VALUE. Settings of the cluster are in slurm/site.env; the environment wins over them. Examples:
  distkd submit teacher.yaml student.yaml --folds 0-4 --nodes 2 --time 8:00:00 --dry-run
  distkd submit teacher.yaml --seeds 42,1337 --throttle 4 --optim.lr 1e-3 --run.root /scratch/runs
  DISTKD_PARTITION=debug distkd submit teacher.yaml --time 0:20:00 --no-report"""
    submit.formatter_class = argparse.RawDescriptionHelpFormatter


def _evaluate(commands: _Commands) -> None:
    evaluate = _command(commands, "eval", do.evaluate, "metrics and predictions of a run's student")
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")


def _predict(commands: _Commands) -> None:
    predict = _command(commands, "predict", do.predict, "the student on raw files or shards, as the clinic would")
    predict.add_argument("source", type=Path, help="run folder or export folder")
    predict.add_argument(
        "input", nargs="+", type=Path, help="shard set, image files, .npy or .csv files with one row per item"
    )
    predict.add_argument("--output", type=Path, required=True, help="folder for predictions.csv")


def _export(commands: _Commands) -> None:
    export = _command(commands, "export", do.export, "the student alone, with its preprocessing and class names")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument(
        "--format", default="safetensors", choices=("safetensors", "pt2", "onnx"), help="default: safetensors"
    )
    export.add_argument("--output", type=Path, help="folder to write (default: export/ of the run)")


def _report(commands: _Commands) -> None:
    report = _command(commands, "report", do.report, "one HTML page and PNGs of a run or a study")
    report.add_argument("run", nargs="+", type=Path, help="run folders, or folders that contain them")
    report.add_argument("--output", type=Path, help="folder to write (default: report/ of the first argument)")
    report.add_argument("--split", default="test", help="split of the table")
    report.add_argument("--baseline", metavar="METHOD", help="method to compare with instead of the student alone")


def _shards(commands: _Commands) -> None:
    shards = _command(commands, "shards", do.shards, "look at a shard set, check every byte of it, or copy it")
    shards.add_argument(
        "action", choices=("info", "verify", "show", "copy"), help="numbers, checksums, a picture, a copy"
    )
    shards.add_argument("folder", help="shard set, with its manifest.json; info and show: or its URL")
    shards.add_argument("--to", type=Path, metavar="FOLDER", help="copy: folder on this machine's own disk")
    shards.add_argument("--json", action="store_true", default=None, help="info: the same numbers for scripts")
    shards.add_argument("--threads", type=_positive, help="verify: files at a time (default: one per core)")
    shards.add_argument("--output", type=Path, help="show: .png or .jpg to write (default: samples.png in the folder)")
    which = shards.add_mutually_exclusive_group()
    which.add_argument("--per-class", type=_positive, help="show: samples of each class (default: 4)")
    which.add_argument("--samples", nargs="+", metavar="KEY", help="show: these samples instead")
    shards.add_argument("--fold", type=int, help="show: say which split of this fold each sample is in")


def _config(commands: _Commands) -> None:
    config = _command(commands, "config", do.config, "the resolved config")
    config.add_argument("config", nargs="?", type=Path, help="YAML file")
    config.add_argument("--schema", action="store_true", help="print the JSON schema of config files for editors")


def _status(commands: _Commands) -> None:
    status = _command(commands, "status", do.status, "how far each run is, what its job does, what is wrong")
    status.add_argument("run", nargs="*", type=Path, help="run folders, or folders that contain them (default: runs)")
    status.add_argument("--json", action="store_true", help="an object for each run, for scripts")
    status.add_argument(
        "--watch",
        nargs="?",
        type=_positive,
        const=10,
        metavar="SECONDS",
        help="again every SECONDS (default: 10) until nothing runs or waits; stands last, or before another option",
    )
    status.add_argument("--all", action="store_true", help="a line for each run of a study")


def _top(commands: _Commands) -> None:
    top = _command(commands, "top", do.top, "the numbers of a training as it goes: speed, phases, losses, ranks, banks")
    top.add_argument("run", nargs="*", type=Path, help="run folders, or folders that contain them (default: runs)")
    top.add_argument("--once", action="store_true", help="as text, once; also where standard output is no terminal")
    top.add_argument("--json", action="store_true", help="an object for each run, once, for scripts")
    top.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="between readings (default: 2)")
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.epilog = """Of several runs the one that runs and has the newest line is shown; n and p go to others, q quits.
It ends by itself, with code 0, when nothing runs or waits; the last view stays. Nothing is written."""


def _doctor(commands: _Commands) -> None:
    _command(commands, "doctor", do.doctor, "what this machine can do; what is missing and the command that fixes it")


def _command(
    commands: _Commands,
    name: str,
    run: Callable[[argparse.Namespace, list[str], World], int],
    summary: str,
) -> argparse.ArgumentParser:
    # no abbreviations: --seed would be taken for --seeds, which names a study
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(command=run)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> list[int]:
    """`0-4` or `0,3,7` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not numbers:
            raise argparse.ArgumentTypeError(f"cannot read {part!r} in {text!r}; expected numbers such as 0-4 or 0,3,7")
        found += numbers
    return found


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; expected a whole number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; expected seconds from 0.1 to 3600")
    return seconds
