"""Options of sbatch that a site adds: which are refused with what to use instead, and which the report is given."""

from __future__ import annotations

import pytest

from distkd.slurm.words import advice_for, for_report, read_options


@pytest.mark.parametrize(
    "text, message",
    [
        ("--array 1-3", "--array is not taken here: use --folds and --seeds"),
        ("-a1-3", "-a1-3 is not taken here: use --folds and --seeds"),
        ("--mail-type=FAIL -o log", "-o is not taken here: use DISTKD_JOBS"),
        ("-d afterok:1", "`distkd submit` itself"),
        ("-D /tmp", "jobs run where `distkd submit` is called"),
        ("-J x", "use --run.name"),
        ("-N2", "use --nodes of `distkd submit`"),
        ("-n 4", "use DISTKD_RANKS_PER_NODE"),
        ("-t 5", "use DISTKD_TIME, or --time of `distkd submit`"),
        ("--tim=5", "--tim is not taken here: use DISTKD_TIME"),
        ("-p gpu", "use DISTKD_PARTITION"),
        ("-A med", "use DISTKD_ACCOUNT"),
        ("-q long", "use DISTKD_QOS"),
        ("-C a100", "use DISTKD_CONSTRAINT"),
        ("-c 8", "use DISTKD_CPUS_PER_TASK"),
        ("--reservation=x", "use DISTKD_RESERVATION"),
        ("--mem=1G", "use DISTKD_MEM"),
        ("--mem-per-gpu=1G", "use DISTKD_MEM_PER_GPU"),
        ("--gpus 2", "use DISTKD_GPUS_PER_NODE"),
        ("-G 2", "use DISTKD_GPUS_PER_NODE"),
        ("--gpus-per-task=1", "it hides all but one GPU from the ranks; use DISTKD_GPUS_PER_NODE"),
        ("--no-requeue", "use DISTKD_MAX_REQUEUES"),
        ("--signal=TERM@30", "use --lead of `distkd submit`"),
        ("--export=NONE", "set variables there or in the site file"),
        ("--wait", "would not come back"),
        ("-W", "would not come back"),
        ("--test-only", "use --dry-run"),
        ("--comment='a", "No closing quotation; close the quotes"),
    ],
)
def test_what_submit_gives_itself_or_jobs_cannot_bear_is_refused(text: str, message: str):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its words are looked at
        read_options(text)
    assert message in str(error.value)


def test_other_options_are_taken_as_bash_takes_them():
    text = "--mail-type=FAIL --comment='my study' -w n1 --gres=nvme:1 --exclude n2 --wait-all-nodes=1 --time-min=5"
    assert read_options(text)[1] == "--comment=my study"
    assert len(read_options(text)) == len(text.split()) - 1


def test_a_report_is_given_what_says_nothing_of_nodes():
    words = ["--gres=gpu:1", "--mail-type", "FAIL", "-L", "x:1", "-w", "n1", "--comment=a b", "--exclusive=user", "-Lx"]
    assert for_report(words) == ("--mail-type", "FAIL", "-L", "x:1", "--comment=a b", "-Lx")


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("--partition", "use DISTKD_PARTITION in slurm/site.env or in the environment"),
        ("-pgpu", "use DISTKD_PARTITION in slurm/site.env or in the environment"),
        ("--gpus-per-node=4", "use DISTKD_GPUS_PER_NODE in slurm/site.env or in the environment"),
        ("--array=1-3", "use --folds and --seeds of `distkd submit`"),
        ("--mail-type=FAIL", "add it to DISTKD_SBATCH_OPTIONS in slurm/site.env or in the environment"),
        ("-w", "add it to DISTKD_SBATCH_OPTIONS in slurm/site.env or in the environment"),
    ],
)
def test_an_option_of_sbatch_given_to_submit_has_another_place(word: str, advice: str):
    assert advice_for(word) == f"{word.partition('=')[0].removesuffix('gpu')} is an option of sbatch: {advice}"


@pytest.mark.parametrize("word", ["--gamma", "fold", "-optim.lr", "--data.output=1", "3"])
def test_other_words_are_no_options_of_sbatch(word: str):
    assert advice_for(word) == ""
