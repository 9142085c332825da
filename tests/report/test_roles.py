"""Which runs are averaged, what they are called and what they are compared with."""

from pathlib import Path

import pytest

from distkd.errors import DataError
from distkd.report.roles import assign_roles, check_comparable, find_baseline
from distkd.report.runs import Run, find_runs, load_run
from distkd.report.stats import estimate, units_of
from tests.report.fake import edit_config, evaluation, fake_run, fake_study


def load(root: Path) -> list[Run]:
    return [load_run(folder, "test") for folder in find_runs([root])]


def titles(root: Path) -> dict[str, list[str]]:
    return {role.title: [run.name for run in role.runs] for role in assign_roles(load(root))[0]}


def test_roles_follow_from_method_modalities_and_exports(tmp_path):
    fake_study(tmp_path, seeds=2)
    assert titles(tmp_path) == {
        "teacher": ["teacher-f0-s0", "teacher-f0-s1"],
        "student alone": ["alone-f0-s0", "alone-f0-s1"],
        "logit KD": ["kd-f0-s0", "kd-f0-s1"],
        "dc_distill": ["dc-f0-s0", "dc-f0-s1"],
    }


def test_a_teacher_of_one_modality_is_known_by_who_uses_its_export(tmp_path):
    sharp = fake_run(tmp_path / "sharp", modalities=("10x",))
    fake_run(tmp_path / "alone", modalities=("5x",))
    fake_run(tmp_path / "at", method="at_plus", modalities=("5x",), teacher=sharp)
    assert list(titles(tmp_path)) == ["teacher", "student alone", "at_plus"]


@pytest.mark.parametrize("export", ["teacher", "runs/teacher", "/elsewhere/runs/teacher/export", "teach{seed}r"])
def test_an_export_named_otherwise_is_recognised(tmp_path, export):
    teacher = "teach3r" if "{seed}" in export else "teacher"
    fake_run(tmp_path / "runs" / teacher, modalities=("10x",))
    student = fake_run(tmp_path / "runs" / "kd", method="logit_kd", modalities=("5x",), seed=3)
    edit_config(student, "teacher", "export", export)
    assert titles(tmp_path) == {"teacher": [teacher], "logit KD": ["kd"]}


def test_a_student_of_several_modalities_trained_alone_is_no_teacher(tmp_path):
    teacher = fake_run(tmp_path / "all", modalities=("t1", "t2", "flair"))
    fake_run(tmp_path / "alone", modalities=("t1", "t2"))
    fake_run(tmp_path / "kd", method="logit_kd", modalities=("t1", "t2"), teacher=teacher)
    assert titles(tmp_path) == {"teacher": ["all"], "student alone": ["alone"], "logit KD": ["kd"]}


def test_runs_of_different_settings_are_never_averaged(tmp_path):
    for labelled in (None, 200):
        for seed in range(2):
            fake_run(tmp_path / f"alone-{labelled}-{seed}", seed=seed, labelled=labelled, test=evaluation(0.8))
    assert titles(tmp_path) == {
        "student alone (all labels)": ["alone-None-0", "alone-None-1"],
        "student alone (200 labels)": ["alone-200-0", "alone-200-1"],
    }


def test_a_change_of_any_setting_that_matters_makes_a_variant(tmp_path):
    fake_run(tmp_path / "a", seed=0)
    edit_config(fake_run(tmp_path / "b", seed=1), "run", "epochs", 20)
    edit_config(fake_run(tmp_path / "c", seed=2), "data", "threads", 4)
    assert titles(tmp_path) == {"student alone (run.epochs=20)": ["b"], "student alone (run.epochs=none)": ["a", "c"]}


def test_variants_are_called_by_their_inputs_where_these_tell_them_apart(tmp_path):
    for name in ("2x", "8x"):
        for seed in range(2):
            run = fake_run(tmp_path / f"{name}-{seed}", modalities=(name,), seed=seed)
            edit_config(run, "model", "encoders", {name: {"name": "cnn"}})
    assert titles(tmp_path) == {
        "student alone (sees 2x)": ["2x-0", "2x-1"],
        "student alone (sees 8x)": ["8x-0", "8x-1"],
    }
    edit_config(tmp_path / "8x-1", "run", "epochs", 20)
    assert len(titles(tmp_path)) == 3
    assert any("sees 8x" in title and "run.epochs=20" in title for title in titles(tmp_path))


@pytest.mark.parametrize(
    "copies, names",
    [
        ([(4, True), (4, False)], ["reference", "native"]),
        ([(2, True), (4, True)], ["factor 2", "factor 4"]),
        ([(2, True), (4, True), (4, False)], ["factor 2, reference", "factor 4, reference", "factor 4, native"]),
    ],
)
def test_variants_of_a_coarse_copy_are_called_by_factor_and_protocol(tmp_path, copies, names):
    for (factor, restore), name in zip(copies, names, strict=True):
        copy = {"coarse": {"of": "patch", "factor": factor, "restore": restore}}
        fake_run(tmp_path / name, modalities=("coarse",), degraded=copy)
        fake_run(tmp_path / f"sharp {name}", method="logit_kd", modalities=("patch",), degraded=copy)
    of_alone = [f"student alone ({name})" for name in names]
    of_sharp = [f"logit KD ({', '.join(f'coarse {word}' for word in name.split(', '))})" for name in names]
    assert sorted(titles(tmp_path)) == sorted(of_alone + of_sharp)


def test_a_coarse_and_a_sharp_input_are_told_apart_by_their_names(tmp_path):
    fake_run(tmp_path / "sharp", modalities=("patch",))
    fake_run(tmp_path / "coarse", modalities=("coarse",), degraded={"coarse": {"of": "patch", "factor": 4}})
    assert sorted(titles(tmp_path)) == ["student alone (sees coarse)", "student alone (sees patch)"]


def test_a_copied_run_does_not_count_twice(tmp_path):
    fake_run(tmp_path / "a", test=evaluation(0.8))
    fake_run(tmp_path / "b", test=evaluation(0.8))
    roles, repeated = assign_roles(load(tmp_path))
    assert [run.name for run in roles[0].runs] == ["a"]
    assert repeated == {tmp_path / "b": "same experiment, fold and seed as a, which counts"}


def test_an_unfinished_run_leaves_the_place_to_its_finished_repeat(tmp_path):
    fake_run(tmp_path / "a", state="failed")
    fake_run(tmp_path / "b", test=evaluation(0.8))
    roles, repeated = assign_roles(load(tmp_path))
    assert [run.name for run in roles[0].counted] == ["b"]
    assert not repeated


def test_the_baseline_shares_data_labels_and_inputs(tmp_path):
    for labelled in (None, 200):
        fake_run(tmp_path / f"alone-{labelled}", labelled=labelled, test=evaluation(0.8))
        fake_run(tmp_path / f"dc-{labelled}", method="dc_distill", labelled=labelled, test=evaluation(0.9))
    fake_run(tmp_path / "dc-50", method="dc_distill", labelled=50, test=evaluation(0.9))
    roles = assign_roles(load(tmp_path))[0]
    bases = {role.runs[0].name: find_baseline(role, roles, None) for role in roles}
    named = {name: base.runs[0].name if base else None for name, base in bases.items()}
    assert named == {
        "alone-None": None,
        "dc-None": "alone-None",
        "alone-200": None,
        "dc-200": "alone-200",
        "dc-50": None,
    }


def test_another_method_can_be_the_baseline(tmp_path):
    roles = assign_roles(load(fake_study(tmp_path, seeds=1)))[0]
    bases = {role.title: find_baseline(role, roles, "logit_kd") for role in roles}
    assert {title: base.title if base else None for title, base in bases.items()} == {
        "teacher": "logit KD",
        "student alone": "logit KD",
        "logit KD": None,
        "dc_distill": "logit KD",
    }


def test_values_of_a_role_are_those_of_its_finished_runs(tmp_path):
    fake_run(tmp_path / "a", seed=0, test=evaluation(0.8))
    fake_run(tmp_path / "b", seed=1, test=evaluation(0.9))
    fake_run(tmp_path / "c", seed=2, test=evaluation(0.1), state="interrupted")
    role = assign_roles(load(tmp_path))[0][0]
    assert role.values("accuracy", "sample") == {(0, 0): 0.8, (0, 1): 0.9}
    found = estimate(units_of(role.values("accuracy", "sample")))
    assert found is not None
    assert found.mean == pytest.approx(0.85)


def test_other_class_names_are_refused(tmp_path):
    fake_run(tmp_path / "a", test=evaluation(0.8))
    fake_run(tmp_path / "b", seed=1, test=evaluation(0.8, class_names=["no", "yes"]))
    with pytest.raises(
        DataError, match=r"different class names: .*a has \['II', 'III', 'IV'\], .*b has \['no', 'yes'\]; "
    ):
        check_comparable(load(tmp_path))


def test_another_task_is_refused(tmp_path):
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", task="lung tiles")
    with pytest.raises(
        DataError, match=r"different task: .*a has glioma grading, .*b has lung tiles; make one report for"
    ):
        check_comparable(load(tmp_path))


def test_another_level_is_refused(tmp_path):
    fake_run(tmp_path / "a", test=evaluation(0.8))
    fake_run(tmp_path / "b", test=evaluation(0.8, level="group"))
    with pytest.raises(DataError, match=r"different evaluation level: .*a has sample, .*b has group"):
        check_comparable(load(tmp_path))
