"""Maps laid over images: role beside role, the same sample in a row, and files that are not what they should be."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distkd.errors import DataError
from distkd.report import make_report
from distkd.report.attention import Views, about_views, attention_panels, find_views, overlay, read_attention
from distkd.report.plots import Panel
from distkd.report.runs import find_runs, load_run
from distkd.report.study import Study, make_study
from tests.report.fake import evaluation, fake_maps, fake_run
from tests.report.test_page import Reader

KEYS = ["k0", "k1", "k2"]


def study_of(folder: Path) -> Study:
    return make_study([load_run(run, "test") for run in find_runs([folder])], "test", None)


def views_of(folder: Path) -> Views:
    views = find_views(study_of(folder))
    assert views is not None
    return views


def drawn(panel: Panel) -> Axes:
    axes = Figure().add_subplot()
    panel.draw(axes)
    return axes


def words(axes: Axes) -> list[list[str]]:
    """What is written above the pictures and below them, from left to right; the two ends of the scale apart."""
    texts = sorted(axes.texts, key=lambda text: text.get_position()[0])
    above = [text.get_text().replace("\n", " ") for text in texts if text.get_position()[1] < 0]
    below = [text.get_text().replace("\n", " ") for text in texts if text.get_position()[1] > 1]
    return [above, below]


def three_roles(root: Path, *, seeds: int = 1, teacher_seeds: int | None = None) -> Path:
    """A teacher that sees `sharp`, a student alone and one with logit KD that see `coarse`; with maps."""
    for seed in range(seeds):
        teacher = root / f"teacher-{seed % (teacher_seeds or seeds)}"
        if not teacher.exists():
            one(teacher, "sharp", 16, seed=seed)
        one(root / f"alone-{seed}", "coarse", 4, seed=seed)
        one(root / f"kd-{seed}", "coarse", 4, seed=seed, method="logit_kd", teacher=teacher)
    return root


def one(folder: Path, modality: str, side: int, *, keys: list[str] = KEYS, seed: int = 0, **settings) -> Path:
    run = fake_run(folder, modalities=(modality,), seed=seed, test=evaluation(0.8), steps=0, **settings)
    fake_maps(run, keys, modality=modality, side=side)
    return run


def test_a_row_is_a_sample_and_the_columns_are_roles_in_the_order_of_the_tables(tmp_path):
    views = views_of(three_roles(tmp_path))
    panels = attention_panels(views)
    assert [panel.title for panel in panels] == [
        "label II, sample k0",
        "label III, sample k1",
        "label IV, sample k2",
    ]
    above, below = words(drawn(panels[0]))
    assert above == ["input sharp 16 x 16 px", "teacher", "input coarse 4 x 4 px", "student alone", "logit KD"]
    right = ["", "\N{CHECK MARK} II 0.50 map 4 x 4"]
    assert below == [*right, *right, right[1]]
    assert words(drawn(panels[1]))[1][1] == "\N{BALLOT X} IV 0.70 map 4 x 4"


def test_a_picture_is_the_input_or_the_map_of_the_labels_class_over_it(tmp_path):
    views = views_of(three_roles(tmp_path))
    for n, panel in enumerate(attention_panels(views)):
        teacher, alone = views.shown[0][2], views.shown[1][2]
        pictures = [np.asarray(image.get_array()) for image in drawn(panel).images]
        assert len(pictures) == 6  # the last one is the scale
        np.testing.assert_allclose(pictures[0], np.broadcast_to(teacher.image[n][:1, :1] / 255, pictures[0].shape))
        np.testing.assert_array_equal(pictures[1], overlay(teacher.image[n], teacher.maps_NChw[n, n]))
        np.testing.assert_array_equal(pictures[3], overlay(alone.image[n], alone.maps_NChw[n, n]))


@pytest.mark.parametrize("shape", [(12, 12), (9, 12, 3), (300, 200)])
def test_the_tint_grows_lighter_with_the_map_on_any_image(shape):
    image = np.full(shape, 128, dtype=np.uint8)
    ramp = np.repeat(np.linspace(0, 1, 8)[None], 8, axis=0)
    made = overlay(image, ramp)
    height, width = made.shape[:2]
    assert max(height, width) == 192
    assert height / width == pytest.approx(shape[0] / shape[1], abs=0.02)
    lightness = (made @ [0.2126, 0.7152, 0.0722])[height // 2]
    assert (np.diff(lightness) > -1e-4).all()
    assert lightness[-1] - lightness[0] > 0.3


def test_the_lowest_seed_that_all_roles_have_is_shown(tmp_path):
    three_roles(tmp_path, seeds=3)
    (tmp_path / "alone-0" / "eval" / "test.attention.npz").unlink()
    views = views_of(tmp_path)
    assert [run.name for _, run, _ in views.shown] == ["teacher-1", "alone-1", "kd-1"]
    assert about_views(views, study_of(tmp_path))[-1] == "Runs: fold 0, seed 1."


def test_a_teacher_of_another_seed_stands_beside_its_students(tmp_path):
    three_roles(tmp_path, seeds=3, teacher_seeds=1)
    for name in ("alone-0", "kd-0"):
        (tmp_path / name / "eval" / "test.attention.npz").unlink()
    views = views_of(tmp_path)
    assert [run.name for _, run, _ in views.shown] == ["teacher-0", "alone-1", "kd-1"]
    last = about_views(views, study_of(tmp_path))[-1]
    assert last == "Runs: teacher teacher-0, student alone alone-1, logit KD kd-1."


def test_a_role_without_maps_is_named(tmp_path):
    three_roles(tmp_path)
    fake_run(tmp_path / "crd", method="crd", modalities=("coarse",), test=evaluation(0.8), steps=0)
    views, study = views_of(tmp_path), study_of(tmp_path)
    assert len(views.shown) == 3
    assert about_views(views, study)[-1].endswith("No maps: crd (no pooled head on an image, or not evaluated since it "
                                                  "has one).")  # fmt: skip


def test_a_model_of_several_inputs_says_whose_map_it_is(tmp_path):
    three_roles(tmp_path)
    run = fake_run(tmp_path / "both", modalities=("sharp", "omics"), seed=0, test=evaluation(0.9), steps=0)
    fake_maps(run, KEYS, modality="sharp", side=16)
    text = " ".join(about_views(views_of(tmp_path), study_of(tmp_path)))
    assert "A model of several inputs predicts from all of them; its map is that of its image's own head." in text


def test_only_samples_that_all_have_are_shown(tmp_path):
    one(tmp_path / "alone", "coarse", 4, keys=["k0", "k1", "k2"])
    one(tmp_path / "kd", "coarse", 4, keys=["k2", "k5", "k1"], method="logit_kd")
    views = views_of(tmp_path)
    assert views.keys == ["k1", "k2"]
    # each role's own order
    [panel, _] = attention_panels(views)
    assert words(drawn(panel))[1] == ["", "\N{BALLOT X} IV 0.70 map 4 x 4", "\N{CHECK MARK} IV 0.90 map 4 x 4"]


@pytest.mark.parametrize(
    "keys, fold, note",
    [
        (["k7"], 0, "The runs' maps are of different samples, so there is nothing to compare."),
        (KEYS, 1, "No fold has maps of all roles, so there are no common samples to show."),
    ],
)
def test_without_common_samples_a_note_stands_in(tmp_path, keys, fold, note):
    one(tmp_path / "alone", "coarse", 4)
    one(tmp_path / "kd", "coarse", 4, keys=keys, method="logit_kd", fold=fold)
    page = make_report([tmp_path], tmp_path / "report")
    assert note in Reader(page.read_text()).text
    assert not (page.parent / "attention.png").exists()


def test_the_page_has_the_section_and_stands_alone(tmp_path):
    three_roles(tmp_path / "runs")
    page = make_report([tmp_path / "runs"], tmp_path / "report")
    text, read = page.read_text(), Reader(page.read_text())
    assert "It shows the evidence that the linear head uses; it is no segmentation" in read.text
    assert "0 and 1 are the least and the largest value over all classes and places of the picture" in read.text
    assert text.count('<svg role="img" aria-label="label II, sample k0"') == 1
    links = [value for name, value in read.attributes if name in ("href", "src", "xlink:href")]
    assert any(link and link.startswith("data:image/png;base64,") for link in links)
    assert all(link and link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"https?://|@import|<script|<link|<img", text)
    picture = page.parent / "attention.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for path in (tmp_path / "runs").rglob("*.npz"):
        path.unlink()
    later = make_report([tmp_path / "runs"], tmp_path / "report")
    assert "Attention" not in Reader(later.read_text()).text
    assert not picture.exists()


def test_long_names_are_cut_to_the_width_of_a_picture(tmp_path):
    names = ["squamous_cell_carcinoma", "b", "c"]
    run = one(tmp_path / "a", "a_modality_with_a_name_that_does_not_end_soon", 4)
    fake_maps(run, KEYS, class_names=names, modality="long " * 60)
    above, below = words(drawn(attention_panels(views_of(tmp_path))[0]))
    assert below[1] == "\N{CHECK MARK} squamous_ce... 0.50 map 4 x 4"
    assert above[0].startswith("input long long long")
    assert above[0].endswith("... 8 x 8 px")


def test_no_file_no_section(tmp_path):
    fake_run(tmp_path / "a", test=evaluation(0.8), steps=0)
    assert find_views(study_of(tmp_path)) is None
    assert attention_panels(None) == []


def test_what_is_read_is_what_was_written(tmp_path):
    run = one(tmp_path / "a", "coarse", 4)
    found = read_attention(run / "eval" / "test.attention.npz")
    assert (found.key, found.class_names, found.modality, found.size) == (KEYS, ["II", "III", "IV"], "coarse", (4, 4))
    assert found.maps_NChw.shape == (3, 3, 4, 4)
    assert found.predicted_N.tolist() == [0, 2, 2]


@pytest.mark.parametrize("damage", ["cut", "other", "pickle", "empty"])
def test_a_damaged_file_is_refused_with_the_command(tmp_path, damage):
    path = one(tmp_path / "a", "coarse", 4) / "eval" / "test.attention.npz"
    whole = path.read_bytes()
    if damage == "pickle":
        fake_maps(tmp_path / "a", KEYS, key=np.array([{}, {}, {}], dtype=object))
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "other": b"no zip", "empty": b""}[damage])
    with pytest.raises(
        DataError,
        match=r"test\.attention\.npz cannot be read \(.+\); write it again with `distkd eval .*a --split test`, or",
    ):
        find_views(study_of(tmp_path))


def test_a_flipped_bit_is_refused(tmp_path):
    path = one(tmp_path / "a", "coarse", 4) / "eval" / "test.attention.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"image.npy") + 40] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test\.attention\.npz cannot be read"):
        read_attention(path)


def test_a_file_that_lacks_something_is_refused(tmp_path):
    path = fake_maps(one(tmp_path / "a", "coarse", 4), KEYS, maps=None, key=None)
    with pytest.raises(DataError, match=r"test\.attention\.npz lacks key, maps; write it again with `distkd eval"):
        read_attention(path)


def test_a_newer_file_is_refused(tmp_path):
    path = fake_maps(one(tmp_path / "a", "coarse", 4), KEYS, format=2)
    with pytest.raises(DataError, match=r"npz has format 2, this version reads up to 1; update distkd"):
        read_attention(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"label": [0, 1, 3]},
        {"predicted": [0, -1, 1]},
        {"probability": [0.5]},
        {"image": np.zeros((3, 4, 4), dtype=np.float32)},
        {"image": np.zeros((3, 4, 4, 2), dtype=np.uint8)},
        {"image": np.zeros((2, 4, 4), dtype=np.uint8)},
        {"maps": np.zeros((3, 2, 4, 4), dtype=np.float16)},
        {"maps": np.zeros((3, 3, 4), dtype=np.float16)},
        {"size": [4]},
        {"class_names": "II"},
        {"label": ["a", "b", "c"]},
    ],
)
def test_fields_that_do_not_fit_are_refused(tmp_path, changes):
    path = fake_maps(one(tmp_path / "a", "coarse", 4), KEYS, **changes)
    with pytest.raises(DataError, match=r"holds .*, which do not fit together; write it again with `distkd eval"):
        read_attention(path)
