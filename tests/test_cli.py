"""The command line: exit codes, one message on standard error, help, and the order of stages."""

# the parser and the order of stages are looked at from inside
# pyright: reportPrivateUsage=false

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distkd import __version__, cli, config
from distkd.arguments import parser
from distkd.base import World
from distkd.cli import DONE, INTERNAL, INTERRUPTED, USER, main
from distkd.errors import ConfigError, DataError, DivergedError, Interrupted, LostRankError
from distkd.stages import in_order
from distkd.train import loop
from distkd.train.settings import Settings
from tests.data.toy import write_toy
from tests.small import Small

CONFIGS = Path(__file__).parent.parent / "configs"
COMMANDS = ("train", "submit", "status", "top", "eval", "predict", "export", "report", "shards", "config", "doctor")

Capture = pytest.CaptureFixture[str]


def left(argv: list[str]) -> int:
    """The exit code where argparse ends the process."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert isinstance(end.value.code, int)
    return end.value.code


# help


def test_help_lists_every_command_and_the_exit_codes(capsys: Capture):
    assert left(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} +\w", text, re.MULTILINE) for command in COMMANDS)
    assert "exit codes: 0 done, 2 error in config, data or arguments, 3 interrupted" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(command: str, capsys: Capture):
    assert left([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: distkd {command}" in text


def test_no_argument_is_left_unexplained():
    [commands] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    bare = {
        f"{name} {action.dest}"
        for name, of_command in commands.choices.items()
        for action in of_command._actions
        if not action.help
    }
    assert bare == set()


def test_version_is_that_of_the_package(capsys: Capture):
    assert left(["--version"]) == 0
    assert capsys.readouterr().out == f"distkd {__version__}\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: config"),
        (["eval", "x", "--split", "tset"], "invalid choice: 'tset'"),
        (["predict", "x", "y"], "the following arguments are required: --output"),
        (["export", "x", "--format", "pickle"], "invalid choice: 'pickle'"),
        (["train", "x.yaml", "--folds", "a"], "argument --folds: cannot read 'a' in 'a'; expected numbers such as 0-4"),
        (["train", "x.yaml", "--seeds", "0,,1"], "argument --seeds: cannot read '' in '0,,1'"),
        (["train", "x.yaml", "--folds", "4-0"], "argument --folds: cannot read '4-0'"),
    ],
)
def test_wrong_arguments_are_refused_with_code_two(argv: list[str], words: str, capsys: Capture):
    assert left(argv) == USER
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "distkd.cli", "train", "absent.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == USER
    assert done.stderr == "distkd: config absent.yaml cannot be read: No such file or directory; name a YAML file\n"
    assert done.stdout == ""


# errors and exit codes


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(*_: Any, **__: Any) -> Settings:
        raise error

    monkeypatch.setattr(config, "load", load)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(World, "from_environment", classmethod(lambda cls: World(rank, 2, rank)))


ENDINGS: list[tuple[BaseException, int, str]] = [
    (ConfigError("config is wrong"), USER, "distkd: config is wrong\n"),
    (DataError("shard is gone"), USER, "distkd: shard is gone\n"),
    (LostRankError("rank 1 is gone"), INTERNAL, "distkd: rank 1 is gone\n"),
    (DivergedError("ranks differ"), INTERNAL, "distkd: ranks differ\n"),
    (Interrupted("stopped after step 3"), INTERRUPTED, "distkd: stopped after step 3\n"),
    (KeyboardInterrupt(), INTERRUPTED, "distkd: stopped at once; the last checkpoint is whole\n"),
]


@pytest.mark.parametrize("error, code, text", ENDINGS, ids=lambda value: type(value).__name__)
def test_every_ending_has_its_code_and_one_message(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    fails(monkeypatch, error)
    assert main(["config", "x.yaml"]) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("error, code, _", ENDINGS, ids=lambda value: type(value).__name__)
def test_other_ranks_keep_silent(
    error: BaseException, code: int, _: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    fails(monkeypatch, error)
    as_rank(monkeypatch, 1)
    assert main(["config", "x.yaml"]) == code
    assert capsys.readouterr().err == ""


def test_a_wrong_argument_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    as_rank(monkeypatch, 1)
    assert left(["train"]) == USER
    assert capsys.readouterr().err == ""


def test_the_main_rank_is_given_time_to_speak(monkeypatch: pytest.MonkeyPatch):
    """torchrun ends all ranks when the first one ends with an error."""
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, waits in ((0, 0), (1, 2)):
        as_rank(monkeypatch, rank)
        assert main(["config", "absent.yaml"]) == left(["trian"]) == USER
        assert left(["train", "--help"]) == 0
        assert len(slept) == waits
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert main(["config", "absent.yaml"]) == USER
    assert len(slept) == 2


def test_a_rank_that_is_alone_with_its_error_speaks(monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    error = DataError("sample 's-001' is cut off")
    error.local = True
    fails(monkeypatch, error)
    as_rank(monkeypatch, 1)
    assert main(["config", "x.yaml"]) == USER
    assert capsys.readouterr().err == "distkd: rank 1: sample 's-001' is cut off\n"


def test_our_own_mistake_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    fails(monkeypatch, AssertionError("step 3 is not step 4"))
    with pytest.raises(AssertionError, match="step 3"):
        main(["config", "x.yaml"])


@pytest.mark.parametrize("argv", [["--debug", "config", "x.yaml"], ["config", "x.yaml", "--debug"]])
def test_debug_shows_where_an_error_comes_from(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    fails(monkeypatch, ConfigError("config is wrong"))
    assert main(argv) == USER
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert "in load" in text
    assert text.endswith("distkd: config is wrong\n")


@pytest.mark.parametrize("command", ["predict", "export", "report", "shards", "doctor", "top"])
def test_a_command_without_a_config_takes_no_override(command: str, capsys: Capture):
    arguments = {"predict": ["a", "b", "--output", "c"], "shards": ["info", "a"], "doctor": []}.get(command, ["a"])
    assert main([command, *arguments, "--run.seed", "3"]) == USER
    assert capsys.readouterr().err == "distkd: unknown argument '--run.seed'; see --help\n"


def test_config_wants_a_file(capsys: Capture):
    assert main(["config"]) == USER
    assert capsys.readouterr().err == "distkd: name a config file, or pass --schema\n"


# overrides and studies


class Recorded(list[Settings]):
    """What would have been trained, in order."""

    @property
    def names(self) -> list[str]:
        return [settings.run.name for settings in self]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()

    def train(settings: Settings, world: World, *, allow_change: bool = False, followed: bool = False) -> Path:
        found.append(settings)
        return settings.folder

    monkeypatch.setattr(loop, "train", train)
    return found


@pytest.mark.parametrize(
    "place",
    [
        lambda files, words: [*files, *words],
        lambda files, words: [*words, *files],
        lambda files, words: [files[0], *words, files[1]],
    ],
)
def test_overrides_may_stand_anywhere(trained: Recorded, place: Callable[[list[str], list[str]], list[str]]):
    files = [str(CONFIGS / "tiny" / f"{name}.yaml") for name in ("teacher", "dc_distill")]
    assert (
        main(["train", *place(files, ["--run.root", "/scratch/runs", "--run.seed", "-1", "--optim.lr=1e-3"])]) == DONE
    )
    assert trained.names == ["tiny-teacher", "tiny-dc_distill"]
    for settings in trained:
        assert settings.run.root == Path("/scratch/runs")
        assert (settings.run.seed, settings.optim.lr) == (-1, 1e-3)


def test_an_option_is_not_abbreviated(capsys: Capture):
    """`--seed 3` once meant `--seeds 3`, a study of one."""
    assert main(["train", str(CONFIGS / "tiny" / "teacher.yaml"), "--seed", "3"]) == USER
    assert "cannot read argument '--seed'; overrides are --section.field VALUE" in capsys.readouterr().err


def test_a_study_trains_every_fold_and_seed(trained: Recorded):
    path = CONFIGS / "tiny" / "teacher.yaml"
    assert main(["train", str(path), "--folds", "0-1,4", "--seeds", "7,9"]) == DONE
    assert [(settings.data.fold, settings.run.seed) for settings in trained] == [
        (fold, seed) for fold in (0, 1, 4) for seed in (7, 9)
    ]
    assert trained.names[0] == "tiny-teacher-fold0-seed7"
    assert len(set(trained.names)) == 6


# the order of stages


@pytest.mark.parametrize("folder", ["glioma_tcga", "uci_mfeat", "tiny", "lc25000", "sicapv2"])
def test_a_stage_comes_after_its_teacher(trained: Recorded, folder: str):
    files = sorted(str(path) for path in (CONFIGS / folder).glob("*.yaml"))
    assert main(["train", *files, "--folds", "0-2"]) == DONE
    assert len(trained) == 3 * len(files)
    place = {name: number for number, name in enumerate(trained.names)}
    for settings in trained:
        if settings.teacher.export is not None:
            assert settings.teacher.export.endswith(f"-fold{settings.data.fold}")
            assert place[settings.teacher.export] < place[settings.run.name]
    folds = [settings.data.fold for settings in trained]
    assert folds == sorted(folds)  # a fold is finished before the next begins


def stage(small: Small, name: str, teacher: str | None = None, **run: Any) -> Settings:
    kind = "alone" if teacher is None else "student"
    return small.settings(kind, run={"name": name, **run}, teacher={"export": teacher})


def ordered(stages: list[Settings]) -> list[str]:
    return [settings.run.name for settings in in_order(stages)]


def test_an_order_that_is_right_is_kept(small: Small):
    stages = [
        stage(small, "z"),
        stage(small, "b", "z"),
        stage(small, "y"),
        stage(small, "a", "y"),
        stage(small, "c", "z"),
    ]
    assert ordered(stages) == ["z", "b", "y", "a", "c"]


def test_only_what_is_waited_for_moves_forward(small: Small):
    stages = [
        stage(small, "a"),
        stage(small, "b", "t2"),
        stage(small, "c"),
        stage(small, "t1"),
        stage(small, "t2", "t1"),
    ]
    assert ordered(stages) == ["a", "t1", "t2", "b", "c"]


def test_a_teacher_that_is_none_of_the_stages_changes_nothing(small: Small):
    assert ordered([stage(small, "b", "teacher"), stage(small, "a", "elsewhere")]) == ["b", "a"]


@pytest.mark.parametrize("form", ["{root}/t", "{root}/t/export", "{root}/../runs/t", "t"])
def test_a_teacher_is_known_by_name_and_by_path(small: Small, form: str):
    assert ordered([stage(small, "s", form.format(root=small.root)), stage(small, "t")]) == ["t", "s"]


def test_a_name_means_a_run_of_the_same_root(small: Small, tmp_path: Path):
    elsewhere = stage(small, "t", root=str(tmp_path))
    assert ordered([stage(small, "s", "t"), elsewhere]) == ["s", "t"]


def test_stages_that_wait_for_each_other_are_refused(small: Small):
    with pytest.raises(ConfigError, match=r"stages wait for each other as teachers: a -> b -> c -> a; mend"):
        ordered([stage(small, "x"), stage(small, "a", "b"), stage(small, "b", "c"), stage(small, "c", "a")])
    with pytest.raises(ConfigError, match=r"wait for each other as teachers: a -> a"):
        ordered([stage(small, "a", "a")])


def test_two_stages_of_one_folder_are_refused_before_the_first_is_trained(
    trained: Recorded, small: Small, tmp_path: Path
):
    one = small.write(tmp_path, "alone", run={"name": "same"})
    other = small.write(tmp_path, "picture", run={"name": "same"})
    assert main(["train", str(one), str(other)]) == USER
    assert trained == []
    assert ordered([stage(small, "a"), stage(small, "a")]) == ["a"]  # the same stage twice is one


def test_stages_in_alphabetical_order_train(small: Small, tmp_path: Path):
    student = small.write(tmp_path, "student", teacher={"export": "teacher"})
    teacher = small.write(tmp_path, "teacher")
    assert main(["train", str(student), str(teacher)]) == DONE
    for name in ("student", "teacher"):
        ours, theirs = (
            load_file(root / name / "export" / "student.safetensors") for root in (tmp_path / "runs", small.root)
        )
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key


# a polite stop


def stops_at(monkeypatch: pytest.MonkeyPatch, step: int, signals: list[int]) -> None:
    original = loop.train_step

    def watched(job: loop.Job, passes: Any, watch: Any) -> Any:
        if passes[0].step == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return original(job, passes, watch)

    monkeypatch.setattr(loop, "train_step", watched)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_whole_checkpoint_and_code_three(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, number: int
):
    path, folder = small.write(tmp_path, "alone"), tmp_path / "runs" / "alone"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stops_at(patch, 1, [number])
        assert main(["train", str(path)]) == INTERRUPTED
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err.endswith("distkd: stopped as asked after step 2 of 6; start again to go on\n")
    outcome = json.loads((folder / "outcome.json").read_text())
    assert (outcome["state"], outcome["kind"], outcome["step"]) == ("interrupted", None, 2)
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert main(["train", str(path)]) == DONE
    whole, resumed = (
        load_file(root / "alone" / "export" / "student.safetensors") for root in (small.root, tmp_path / "runs")
    )
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_second_ctrl_c_does_not_wait(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture):
    path, folder = small.write(tmp_path, "alone"), tmp_path / "runs" / "alone"
    stops_at(monkeypatch, 4, [signal.SIGINT, signal.SIGINT])
    assert main(["train", str(path)]) == INTERRUPTED
    assert capsys.readouterr().err.endswith("distkd: stopped at once; the last checkpoint is whole\n")
    assert json.loads((folder / "outcome.json").read_text())["state"] == "interrupted"
    assert [item.name for item in (folder / "checkpoints").glob("step-*")] == ["step-00000003"]


# shards


def test_shards_info_counts_what_is_there(small: Small, capsys: Capture):
    assert main(["shards", "info", str(small.shards)]) == DONE
    text = capsys.readouterr().out
    assert "task 'toy', classes low, high" in text
    assert "54 samples of 27 patients" in text
    assert re.search(r"^slide +image +12 x 10 x 3 +uint8 +png", text, re.MULTILINE)
    assert "outcome: it is known only after the label" in text


def test_shards_info_for_scripts_is_json(small: Small, capsys: Capture):
    assert main(["shards", "info", str(small.shards), "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["task"], found["samples"], found["patients"]) == ("toy", 54, 27)
    assert found["modalities"]["slide"]["shape"] == [12, 10, 3]


def test_shards_verify_reads_every_byte(tmp_path: Path, capsys: Capture):
    write_toy(tmp_path / "shards")
    assert main(["shards", "verify", str(tmp_path / "shards"), "--threads", "1"]) == DONE
    text = capsys.readouterr().out
    assert re.match(r"checked \d+ files, \d+\.\d kB, 48 samples with \d+ values in .*/s, 1 thread\n", text)
    assert text.endswith("every byte is as the manifest says\n")
    tar = min((tmp_path / "shards").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert main(["shards", "verify", str(tmp_path / "shards")]) == USER
    text = capsys.readouterr().err
    assert f"shard {tar.name!r} has SHA-256" in text
    assert text.count("distkd: ") == 1


@pytest.mark.slow
def test_shards_show_draws_a_picture(small: Small, tmp_path: Path, capsys: Capture):
    picture = tmp_path / "samples.png"
    assert main(["shards", "show", str(small.shards), "--output", str(picture)]) == DONE
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "--fold", "0"], "--fold is an option of `shards show`, not of `shards info`"),
        (["show", "--json"], "--json is an option of `shards info`, not of `shards show`"),
        (["show", "--threads", "2"], "--threads is an option of `shards verify`, not of `shards show`"),
        (["show", "--fold", "9"], "fold 9 is not in"),
        (["show", "--samples", "nobody"], "has no sample 'nobody'"),
    ],
)
def test_shards_options_that_do_not_fit_are_refused(words: list[str], message: str, small: Small, capsys: Capture):
    assert main(["shards", words[0], str(small.shards), *words[1:]]) == USER
    assert message in capsys.readouterr().err
    assert not (small.shards / "samples.png").exists()


@pytest.mark.parametrize("words", [["verify", "--threads", "0"], ["show", "--per-class", "-1"]])
def test_shards_counts_are_one_or_more(words: list[str], capsys: Capture):
    assert left(["shards", words[0], "a", *words[1:]]) == USER
    assert f"cannot read {words[2]!r}; expected a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["info", "verify", "show"])
def test_what_is_no_shard_set_is_refused(action: str, tmp_path: Path, capsys: Capture):
    assert main(["shards", action, str(tmp_path)]) == USER
    assert f"no manifest.json in {str(tmp_path)!r}, so it is not a shard set; make one" in capsys.readouterr().err


# reports


@pytest.mark.slow
def test_a_report_is_a_page_with_a_baseline_of_choice(small: Small, tmp_path: Path, capsys: Capture):
    runs = [str(small.root / name) for name in ("teacher", "picture", "student")]
    assert main(["report", *runs, "--output", str(tmp_path), "--baseline", "logit_kd"]) == DONE
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"
    assert "logit_kd" in (tmp_path / "index.html").read_text()
    assert main(["report", *runs, "--output", str(tmp_path / "other"), "--baseline", "lckd"]) == USER
    assert "no run has the baseline method 'lckd'; these runs have " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: Capture):
    assert main(["report", str(tmp_path)]) == USER
    assert str(tmp_path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# the other commands' refusals


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_run_must_be_one(command: str, tmp_path: Path, capsys: Capture):
    assert main([command, str(tmp_path)]) == USER
    text = capsys.readouterr().err
    assert str(tmp_path) in text
    assert "distkd train" in text or "train the teacher first" in text


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_format_that_is_not_there_yet_says_what_is(kind: str, small: Small, capsys: Capture):
    assert main(["export", str(small.root / "alone"), "--format", kind]) == USER
    assert "is not available yet; use --format safetensors" in capsys.readouterr().err
