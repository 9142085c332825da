"""Finding and reading run folders, whole and damaged."""

import json

import pytest

from distkd.errors import DataError
from distkd.report.runs import find_runs, load_run
from tests.report.fake import evaluation, fake_run, fake_study


def test_a_run_folder_a_study_and_both_are_found_once(tmp_path):
    fake_study(tmp_path / "deep" / "study", seeds=1)
    study = tmp_path / "deep" / "study"
    assert find_runs([study / "dc-f0-s0"]) == [study / "dc-f0-s0"]
    assert len(find_runs([tmp_path])) == len(find_runs([study, study / "dc-f0-s0"])) == 4


def test_facts_come_from_the_manifest_of_the_shards(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    manifest = {"samples": {"patient": ["a", "a", "b"]}, "split_rule": "by patient", "licence": "CC BY 4.0"}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    about = load_run(fake_run(tmp_path / "run", shards=shards), "test").about_data
    assert (about["n_samples"], about["n_patients"]) == (3, 2)
    assert (about["licence"], about["task"]) == ("CC BY 4.0", "glioma grading")


def test_a_run_that_has_only_started_can_be_read(tmp_path):
    (tmp_path / "config.yaml").write_text("method: {name: supervised}\n")
    run = load_run(tmp_path, "test")
    assert (run.state, run.evaluation, run.records, run.unit) == ("unfinished", None, [], (0, 0))


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"no run found at or below .*: expected a folder with config\.yaml in it; `distkd"
    ):
        find_runs([tmp_path])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"run folder .*nowhere does not exist; name a run folder, or a folder of run"):
        find_runs([tmp_path / "nowhere"])


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file, not a folder; name a run folder"):
        find_runs([tmp_path / "file"])


def test_a_run_that_was_submitted_and_never_began_is_left_out_and_named(tmp_path, caplog):
    begun, waiting = tmp_path / "runs" / "fold-0", tmp_path / "runs" / "fold-1"
    for folder in (begun, waiting):
        folder.mkdir(parents=True)
        (folder / "jobs.jsonl").write_text('{"event": "submitted", "job": "7_1"}\n')
    (begun / "config.yaml").write_text("run: {name: fold-0}")
    assert find_runs([begun, waiting]) == [begun]
    assert f"run {waiting} is left out: it was submitted and never began" in caplog.text
    with pytest.raises(DataError, match="no run that has begun is named"):
        find_runs([waiting])


def test_no_folder_is_refused():
    with pytest.raises(DataError, match="no run that has begun is named"):
        find_runs([])


@pytest.mark.parametrize("content", ["a: [", "\x00"])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(
        DataError, match=r"config\.yaml cannot be read \(.*\); take it from a copy, or leave this run out"
    ):
        load_run(tmp_path, "test")


def test_a_foreign_config_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("- a\n- b\n")
    with pytest.raises(DataError, match=r"config\.yaml holds a list, expected a mapping; it is not of a run of distkd"):
        load_run(tmp_path, "test")


def test_metrics_without_confusion_are_refused_with_the_command(tmp_path):
    whole = evaluation(0.8)
    folder = fake_run(tmp_path / "run", test=whole)
    del whole["confusion"]
    (folder / "eval" / "test.json").write_text(json.dumps(whole))
    with pytest.raises(
        DataError, match=r"test\.json lacks confusion; write it again with `distkd eval .*run --split test`"
    ):
        load_run(folder, "test")
