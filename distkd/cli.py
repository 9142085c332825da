"""The command line: arguments in, one message for a user's error, exit codes that scripts can rely on."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from distkd import __version__
from distkd import commands as do
from distkd.commands import DONE, say
from distkd.errors import DiskError, DistkdError, DivergedError, Interrupted, LostRankError
from distkd.world import World

__all__ = ["DONE", "INTERNAL", "INTERRUPTED", "USER", "main"]

INTERNAL, USER, INTERRUPTED = 1, 2, 3
PIPE = 141
"""As a shell says it of a tool that SIGPIPE ended."""

_MAIN_RANK_SPEAKS_S = 20.0

_EPILOG = """exit codes: 0 done, 2 error in config, data or arguments, 3 interrupted with a complete checkpoint,
1 anything else. Launchers lose them: `outcome.json` in the run folder has the truth."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Heavy imports happen inside the commands."""
    world = World.from_environment()
    words, overrides = _overrides_apart(sys.argv[1:] if argv is None else argv)
    try:
        with nullcontext() if world.is_main else redirect_stderr(io.StringIO()):  # a wrong argument is said once
            arguments, unknown = _parser().parse_known_args(words)
    except SystemExit as end:
        if end.code:
            _let_main_speak(world)
        raise
    rest = unknown + overrides
    logging.basicConfig(level=logging.WARNING, format="distkd: %(message)s", stream=sys.stderr)
    logging.getLogger("distkd").setLevel(logging.WARNING if world.is_main else logging.ERROR)
    command: Callable[[argparse.Namespace, list[str], World], int] = arguments.command
    try:
        code = command(arguments, rest, world)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return PIPE
    except Interrupted as stop:
        say(world, str(stop))
        return INTERRUPTED
    except KeyboardInterrupt:
        say(world, "stopped at once; the last checkpoint is whole")
        return INTERRUPTED
    except DistkdError as error:
        if arguments.debug:
            traceback.print_exc()
        lost = isinstance(error, LostRankError) and world.local_rank == 0  # the main rank may be the one that is gone
        if world.is_main or error.local or lost:
            prefix = "" if world.is_main else f"rank {world.rank}: "
            print(f"distkd: {prefix}{error}", file=sys.stderr, flush=True)
        else:
            _let_main_speak(world)
        # neither a rank that is gone nor a full disk is in the command: the same one may be started again
        return INTERNAL if isinstance(error, LostRankError | DivergedError | DiskError) else USER


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output, as behind `| head`; then what is left of it goes nowhere."""
    watch = select.poll()
    try:
        watch.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # not a file of the system's
        return False
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _overrides_apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Other words, and the `--section.field VALUE` pairs, wherever they stand; argparse would take VALUE for a file."""
    words: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--\w+\.", word):
            words.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return words, overrides


def _let_main_speak(world: World) -> None:
    """torchrun ends all ranks when the first one ends: the main rank, which has the message, must be that one."""
    if not world.is_main and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_MAIN_RANK_SPEAKS_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distkd",
        description="Distil a teacher that sees everything into a student for the clinic.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distkd {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of user errors too")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", do.train, "train one stage per config, in order; resumes by itself")
    train.add_argument("config", nargs="+", type=Path, help="YAML files, for example a teacher's and a student's")
    train.add_argument("--folds", type=_numbers, help="repeat for these folds, for example 0-14 or 0,3,7")
    train.add_argument("--seeds", type=_numbers, help="repeat for these seeds, for example 0-4")
    train.add_argument("--allow-change", action="store_true", help="go on in a run folder although the config changed")
    train.add_argument("--stage-in", action="store_true", help="only copy to data.scratch, once a machine before a job")
    train.epilog = (
        "Any config value can be given as --section.field VALUE, for example --optim.lr 1e-3 --run.root /scratch/runs."
    )

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

    evaluate = _command(commands, "eval", do.evaluate, "metrics and predictions of a run's student")
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")

    predict = _command(commands, "predict", do.predict, "the student on raw files or shards, as the clinic would")
    predict.add_argument("source", type=Path, help="run folder or export folder")
    predict.add_argument(
        "input", nargs="+", type=Path, help="shard set, image files, .npy or .csv files with one row per item"
    )
    predict.add_argument("--output", type=Path, required=True, help="folder for predictions.csv")

    export = _command(commands, "export", do.export, "the student alone, with its preprocessing and class names")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument(
        "--format", default="safetensors", choices=("safetensors", "pt2", "onnx"), help="default: safetensors"
    )
    export.add_argument("--output", type=Path, help="folder to write (default: export/ of the run)")

    report = _command(commands, "report", do.report, "one HTML page and PNGs of a run or a study")
    report.add_argument("run", nargs="+", type=Path, help="run folders, or folders that contain them")
    report.add_argument("--output", type=Path, help="folder to write (default: report/ of the first argument)")
    report.add_argument("--split", default="test", help="split of the table")
    report.add_argument("--baseline", metavar="METHOD", help="method to compare with instead of the student alone")

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

    config = _command(commands, "config", do.config, "the resolved config")
    config.add_argument("config", nargs="?", type=Path, help="YAML file")
    config.add_argument("--schema", action="store_true", help="print the JSON schema of config files for editors")

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

    _command(commands, "doctor", do.doctor, "what this machine can do; what is missing and the command that fixes it")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],  # pyright: ignore[reportPrivateUsage]
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


if __name__ == "__main__":
    # after a lost rank or a second Ctrl-C other threads may hang in a collective; the outcome is on disk
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(code)
