"""The page: its numbers, its honesty, and that it needs nothing but itself."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from distkd.errors import DataError
from distkd.report import make_report
from distkd.report.attention import attention_panels, find_views
from distkd.report.figures import confusion_panel
from distkd.report.html import Safe, details, name_cell, table, tag
from distkd.report.make import families
from distkd.report.page import render_page
from distkd.report.plots import png_figure, wrapped
from distkd.report.provenance import f1_table
from distkd.report.runs import find_runs, load_run
from distkd.report.study import make_study
from tests.report.fake import edit_config, evaluation, fake_maps, fake_run, fake_study


class Reader(HTMLParser):
    """Cells by row, text, attributes, and whether elements are closed in order."""

    VOID = ("meta", "wbr", "br", "path", "circle", "rect", "line", "use")

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data if "small" not in self.open else f" {data}"

    def row(self, start: str, *, nth: int = 0) -> list[str]:
        return [row for row in self.rows if row[0].startswith(start)][nth]


def read(folder: Path, *, baseline: str | None = None) -> Reader:
    """The page of these runs without its drawings, which take the time."""
    study = make_study([load_run(run, "test") for run in find_runs([folder])], "test", baseline)
    families = ("comparison", "loss", "validation", "optimisation", "agreement", "confusion")
    return Reader(render_page(study, dict.fromkeys(families, ())))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, Reader]:
    root = tmp_path_factory.mktemp("study")
    fake_study(root / "runs", seeds=3)
    fake_run(root / "runs" / "dc-stopped", method="dc_distill", seed=7, state="interrupted", message="SIGTERM <9>")
    fake_run(root / "runs" / "dc-new", method="dc_distill", seed=8, state=None)
    fake_run(root / "runs" / "kd-unmeasured", method="logit_kd", seed=9)
    page = make_report([root / "runs"], root / "report")
    return page, Reader(page.read_text())


def test_table_has_means_and_intervals_worked_out_by_hand(study):
    _, page = study
    # accuracies of the student alone: 0.80, 0.81, 0.82; error 0.01 / sqrt(3); 4.302653 of Student with 2 degrees
    assert page.row("student alone")[1] == "0.810 [0.785, 0.835]"
    # of the teacher 0.95, 0.94, 0.93
    assert page.row("teacher")[1] == "0.940 [0.915, 0.965]"
    assert page.row("student alone")[0].split() == ["student", "alone", "path", "n", "=", "3", "seeds"]


def test_differences_are_paired_and_said_in_words(study):
    _, page = study
    # dc_distill minus alone by seed: 0.05, 0.06, 0.05: mean 0.05333, error 0.005774 / sqrt(3) = 0.003333, t = 16
    assert page.row("dc_distill", nth=1)[1] == "+0.053 [+0.039, +0.068] t = 16.00 gain"
    # logit KD minus alone: -0.01, 0, 0.01
    assert page.row("logit KD", nth=1)[1].startswith("+0.000 [-0.025, +0.025] t = ")
    assert page.row("logit KD", nth=1)[1].endswith("no evidence of a gain")
    assert "dc_distill against student alone: gain" in page.text
    assert re.search(r"logit KD against student alone: no evidence of a gain(, nor of a loss)? balanced_acc", page.text)


def test_a_loss_is_called_a_loss(tmp_path):
    for seed in range(3):
        fake_run(tmp_path / f"alone-{seed}", seed=seed, test=evaluation(0.9))
        fake_run(tmp_path / f"kd-{seed}", method="logit_kd", seed=seed, test=evaluation(0.8 + 0.01 * seed))
    page = read(tmp_path)
    assert "logit KD against student alone: loss" in page.text


def test_every_fold_and_seed_is_listed(study):
    _, page = study
    assert page.row("alone-f0-s1")[:6] == ["alone-f0-s1", "student alone", "0", "1", "100", "0.810"]


def test_runs_that_do_not_count_are_named_with_reason_and_command(study):
    _, page = study
    assert "3 runs are not in the tables of results" in page.text
    assert "dc-stopped (fold 0, seed 7): interrupted at step 40: SIGTERM <9>; distkd train" in page.text
    assert (
        "dc-new (fold 0, seed 8): it has not said how it ended (still training, or killed); distkd train" in page.text
    )
    assert "kd-unmeasured (fold 0, seed 9): no metrics of the test split; distkd eval" in page.text
    assert "kd-unmeasured --split test" in page.text


def test_seeds_and_folds_are_told_apart(tmp_path, study):
    assert "not the choice of patients or samples" in study[1].text
    fake_study(tmp_path, seeds=2, folds=3)
    page = read(tmp_path)
    assert "Folds share training patients" in page.text
    assert "n = 3 folds x 2 seeds" in page.text


def test_provenance_is_there(study):
    _, page = study
    assert "the weights with the best balanced_accuracy on the validation split" in page.text
    assert page.row("task")[1] == "glioma grading"
    assert "neither the run folders nor a manifest within reach say" in page.text
    assert "name: dc_distill" in page.text
    assert '"world_size": 2' in page.text
    assert [row[5] for row in page.rows if row[0] == "dc-stopped"] == ["interrupted step 40, attempt 1, SIGTERM <9>"]


def test_the_page_needs_nothing_from_anywhere(study):
    path, page = study
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "data", "srcset")]
    assert all(value is not None and value.startswith("#") for value in links)
    text = path.read_text()
    assert not re.search(r"https?://|@import|<script|<link|<img", text)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_every_reference_inside_a_drawing_is_answered_once(study):
    path, _ = study
    text = path.read_text()
    wanted = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    answers = re.findall(r'id="([^"]+)"', text)
    assert wanted <= set(answers)
    assert len([name for name in answers if name in wanted]) == len(wanted)


def test_pictures_lie_beside_the_page(study):
    path, _ = study
    names = {file.name for file in path.parent.iterdir()}
    pictures = ["agreement", "comparison", "confusion", "loss", "optimisation", "validation"]
    assert names == {"index.html", *(f"{name}.png" for name in pictures)}
    assert all((path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_same_runs_give_the_same_page(tmp_path):
    fake_run(tmp_path / "runs" / "dc", method="dc_distill", test=evaluation(0.8))
    first = make_report([tmp_path / "runs"], tmp_path / "a")
    second = make_report([tmp_path / "runs"], tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_names_from_files_cannot_become_markup(tmp_path):
    names = ["<b>mild</b>", "a & b", '"x"']
    fake_run(tmp_path / "run", message="<script>", test=evaluation(0.8, class_names=names), task="<i>task</i>")
    text = make_report([tmp_path]).read_text()
    assert "<script" not in text
    assert "<i>task" not in text
    assert "<b>mild" not in text
    assert "&lt;b&gt;mild" in text


def test_a_run_without_metrics_says_which_command_makes_them(tmp_path):
    folder = fake_run(tmp_path / "run")
    path = make_report([folder])
    assert path == folder / "report" / "index.html"
    page = Reader(path.read_text())
    assert "No finished run has metrics of the test split yet." in page.text
    assert f"distkd eval {folder} --split test" in page.text


def test_a_run_that_has_only_begun_gives_a_page(tmp_path):
    folder = fake_run(tmp_path / "run", state=None, steps=0)
    page = read(folder)
    assert "No run has logged a step yet." in page.text


def test_one_seed_has_no_interval_and_no_evidence(tmp_path):
    fake_study(tmp_path, seeds=1)
    page = read(tmp_path)
    assert page.row("student alone")[1] == "0.800 no interval"
    assert "dc_distill against student alone: one pair: no interval, no evidence" in page.text


def test_without_a_student_alone_no_gain_is_claimed(tmp_path):
    fake_run(tmp_path / "dc", method="dc_distill", test=evaluation(0.9))
    page = read(tmp_path)
    assert "dc_distill : no student alone with the same data, labels and inputs to compare with" in page.text


def test_a_metric_that_is_undefined_in_some_runs_says_how_many_it_counts(tmp_path):
    for seed in range(3):
        found = evaluation(0.8 + 0.01 * seed)
        if seed == 2:
            found["metrics"]["auc_macro"] = None
            found["levels"]["sample"]["notes"] = ["class 'IV' is absent"]
            found.pop("notes")
        fake_run(tmp_path / f"alone-{seed}", seed=seed, test=found)
    page = read(tmp_path)
    header = next(row for row in page.rows if "auc_macro" in row)
    assert page.row("student alone")[header.index("auc_macro")].endswith(", n = 2")
    assert "Notes of the evaluation: class 'IV' is absent (student alone, 1 of 3 runs)." in page.text


def test_a_note_names_its_roles_and_how_many_of_their_runs(tmp_path):
    found = evaluation(0.8) | {"notes": ["class 'IV' is never predicted: its precision is undefined"]}
    for seed in range(3):
        fake_run(tmp_path / f"alone-{seed}", seed=seed, test=found if seed else evaluation(0.8))
        fake_run(tmp_path / f"kd-{seed}", method="logit_kd", seed=seed, test=found if seed == 1 else evaluation(0.8))
    assert (
        "class 'IV' is never predicted: its precision is undefined (student alone, 2 of 3 runs; logit KD, 1 of 3 runs)"
    ) in read(tmp_path).text


def test_the_head_says_how_much_of_the_split_was_scored(tmp_path):
    assert "1 experiment, test split" in read(fake_run(tmp_path / "a" / "r")).text
    fake_run(tmp_path / "r0", test=evaluation(0.8, n=90))
    assert "test split of 90 samples" in read(tmp_path / "r0").text
    fake_run(tmp_path / "r1", fold=1, test=evaluation(0.8, level="patient"))
    assert "test split of 100 patients" in read(tmp_path / "r1").text
    fake_run(tmp_path / "b" / "r0", test=evaluation(0.8, n=90))
    fake_run(tmp_path / "b" / "r1", fold=1, test=evaluation(0.8))
    assert "test split of 90 to 100 samples" in read(tmp_path / "b").text


COARSE = {"of": "patch", "factor": 4}


@pytest.mark.parametrize("restore, protocol", [(True, "restored"), (False, "native")])
def test_tables_say_what_a_coarse_input_is_and_how_many_labels_there_were(tmp_path, restore, protocol):
    settings = {"modalities": ("coarse",), "degraded": {"coarse": COARSE | {"restore": restore}}, "labelled": 24}
    fake_run(tmp_path / "alone", test=evaluation(0.8), **settings)
    settings |= {"modalities": ("patch",), "labelled": None}
    fake_run(tmp_path / "sharp", method="logit_kd", test=evaluation(0.8), **settings)
    page = read(tmp_path)
    assert page.row("student alone")[0] == f"student alone coarse (patch / 4, {protocol}) 24 labels n = 1 seed"
    assert page.row("logit KD")[0] == "logit KD patch n = 1 seed"
    assert page.row("labels in training")[1] == "all labels; 24 labels"
    assert [row[1:3] for row in page.rows if row[:1] == ["alone"]][-1] == ["student alone", "24"]


def test_without_a_fair_comparison_it_is_said_what_differs(tmp_path):
    native, reference = ({"coarse": COARSE | {"restore": restore}} for restore in (False, True))
    common = {"modalities": ("coarse",), "test": evaluation(0.8)}
    fake_run(tmp_path / "alone", degraded=reference, **common)
    fake_run(tmp_path / "kd", method="logit_kd", degraded=native, **common)
    fake_run(tmp_path / "few", method="at_plus", degraded=reference, labelled=24, **common)
    text = read(tmp_path).text
    want = ": no student alone with the same data, labels and inputs to compare with"
    assert f"logit KD {want} inputs of student alone: coarse (patch / 4, restored)" in text
    assert f"at_plus {want} labels of student alone: all labels" in text


def both_protocols(root: Path) -> Path:
    """Runs whose names are long: a protocol, and a setting of the method with a long value."""
    for restore in (False, True):
        settings = {"modalities": ("coarse",), "degraded": {"coarse": COARSE | {"restore": restore}}, "steps": 10}
        runs = [fake_run(root / f"alone-{restore}", test=evaluation(0.8), **settings)]
        for value in ("a_long_value_of_a_setting", "another"):
            run = fake_run(root / f"at-{restore}-{value}", method="at_plus", test=evaluation(0.9), **settings)
            edit_config(run, "method", "attention_of_the_teacher", value)
            runs.append(run)
        for run in runs:
            fake_maps(run, ["k0", "k1"], modality="coarse", side=16 if restore else 4)
    return root


@pytest.mark.parametrize("family, columns", [("confusion", 2), ("comparison", 2), ("loss", 3), ("attention", 1)])
def test_no_word_of_a_picture_is_cut_or_written_over_another(tmp_path, monkeypatch, family, columns):
    runs = [load_run(run, "test") for run in find_runs([both_protocols(tmp_path)])]
    study = make_study(runs, "test", None)
    panels = (families(study) | {"attention": attention_panels(find_views(study))})[family]
    legend = [(role.title, style) for role, style in study.roles] if family in ("comparison", "loss") else []
    boxes: dict[Text, Bbox] = {}
    draw = Text.draw

    def noted(text: Text, renderer: RendererBase) -> None:
        draw(text, renderer)
        if text.get_text().strip():
            boxes[text] = text.get_window_extent(renderer)

    with png_figure(panels, legend, columns) as figure:
        monkeypatch.setattr(Text, "draw", noted)
        FigureCanvasAgg(figure).draw()
        for text, box in boxes.items():
            assert min(box.x0, box.y0) >= -1, text.get_text()
            assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 1, text.get_text()
    for (first, one), (second, other) in itertools.combinations(boxes.items(), 2):
        overlap = Bbox.intersection(one, other)
        assert overlap is None or min(overlap.size) < 2, (first.get_text(), second.get_text())
    assert len(boxes) > 10
    said = {"".join(text.get_text().split()) for text in boxes}
    titles = {role.title for role, _ in study.roles}
    assert titles == {"student alone (native)", "student alone (reference)"} | {
        f"at_plus ({protocol}, attention_of_the_teacher={value})"
        for protocol in ("native", "reference")
        for value in ("a_long_value_of_a_setting", "another")
    }
    assert {"".join(title.split()) for title in titles} <= said


def test_words_are_broken_between_words_then_at_dots_and_last_between_letters():
    assert wrapped("student alone (native)", 9.0, size=8) == ["student alone (native)"]
    assert wrapped("student alone (native)", 1.0, size=8) == ["student alone", "(native)"]
    assert wrapped("at_plus (data.degraded.coarse.restore=True)", 1.3, size=8) == [
        "at_plus",
        "(data.degraded.",
        "coarse.restore=True)",
    ]
    assert "".join(wrapped("m" * 40, 1.0, size=8)) == "m" * 40
    assert wrapped("", 1.0, size=8) == [""]


def test_another_baseline_can_be_asked_for(tmp_path):
    fake_study(tmp_path, seeds=3)
    page = read(tmp_path, baseline="logit_kd")
    assert "dc_distill against logit KD: gain" in page.text
    assert "logit KD against" not in page.text


def test_a_baseline_that_no_run_has_is_refused(tmp_path):
    fake_run(tmp_path / "run")
    with pytest.raises(DataError, match="no run has the baseline method 'lckd'; these runs have supervised"):
        read(tmp_path, baseline="lckd")


def test_nothing_is_written_when_the_runs_are_refused(tmp_path):
    with pytest.raises(DataError, match="no run found"):
        make_report([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_elements_escape_what_is_not_safe():
    assert tag("p", "<&>", Safe("<b></b>"), class_='"') == '<p class="&quot;">&lt;&amp;&gt;<b></b></p>'
    assert name_cell("a_<b>") == "a_<wbr>&lt;b&gt;"
    assert '<th scope="row">&lt;</th>' in table(["x"], [["<"]])
    assert details("<", "y") == "<details><summary>&lt;</summary>y</details>"


def test_a_task_of_four_classes_shows_f1_of_each_and_kappa_over_all(tmp_path):
    names = ["NC", "G3", "G4", "G5"]
    whole = evaluation(0.9, n=40, class_names=names)  # the first four, one of each class, go to the next class
    for seed in range(2):
        fake_run(tmp_path / f"r{seed}", seed=seed, steps=0, test=whole)
    page = Reader(f1_table(make_study([load_run(run, "test") for run in find_runs([tmp_path])], "test", None)))
    [header, row] = page.rows
    assert header[1:] == ["F1 NC", "F1 G3", "F1 G4", "F1 G5", "balanced_accuracy", "kappa_quadratic"]
    # 9 of 10 found, 10 predicted; squared distances: 1, 1, 1 and 9 seen, 40 x 2.5 by chance
    expected = ["0.900"] * 5 + [f"{1 - 12 / 100:.3f}"]
    assert row[1:] == expected


def read_figure(folder: Path) -> Figure:
    """The confusion matrix of the only role."""
    study = make_study([load_run(run, "test") for run in find_runs([folder])], "test", None)
    [(role, _)] = study.roles
    panel = confusion_panel(role, study.class_names)
    assert panel is not None
    figure = Figure()
    panel.draw(figure.add_subplot())
    return figure


def test_a_confusion_matrix_says_share_and_number_of_every_cell(tmp_path):
    fake_run(tmp_path / "r", steps=0, test=evaluation(0.9, n=40, class_names=["NC", "G3", "G4", "G5"]))
    [axes] = read_figure(tmp_path).axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    full = {(k, k): "90 %\n9" for k in range(4)} | {((k + 1) % 4, k): "10 %\n1" for k in range(4)}
    assert cells == {(column, row): "0" for column in range(4) for row in range(4)} | full
    assert [label.get_text() for label in axes.get_xticklabels()] == ["NC", "G3", "G4", "G5"]
    assert [axes.get_xlabel(), axes.get_ylabel()] == ["predicted", "label"]
