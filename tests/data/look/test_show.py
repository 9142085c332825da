"""What people see of a shard set: a picture that is one, of its samples."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from distkd.cli import main
from distkd.data.look import show as show_module
from distkd.data.look.cards import CardMaker
from distkd.data.look.info import info
from distkd.data.look.sheet import Card, Curve, Legend, Panel, Picture, Sheet, Words, draw
from distkd.data.look.show import show
from distkd.data.look.slices import PLANES, Plane, class_numbers, colour_map, overlay, view_of, window
from distkd.data.look.summary import summary
from distkd.data.manifest import Description, Fold, Modality, Space
from distkd.data.raw.nifti import write_map
from distkd.data.shardset import ShardSet
from distkd.data.write import ShardWriter
from distkd.errors import DataError
from tests.data.look.scans import SHAPE, lesion, placeless, space_of, volume, words
from tests.data.remote.serve import Server
from tests.data.toy import open_toy

# Shapes: XYZ voxels in the order of the file, H W pixels

AXIAL, CORONAL, SAGITTAL = PLANES


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Sheet]:
    """What `show` would have drawn."""
    found: list[Sheet] = []
    monkeypatch.setattr(show_module, "draw", lambda sheet, out: found.append(sheet))
    return found


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_the_order_of_the_voxels_does_not_change_the_picture(plane: Plane):
    base = nibabel.Nifti1Image(volume("flair", 0), np.diag([1.0, 2.0, 3.0, 1.0]))
    weight = nibabel.Nifti1Image(lesion(0), base.affine)
    expected = None
    for axes, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = [[axis, sign] for axis, sign in zip(axes, signs, strict=True)]
        image, mask = base.as_reoriented(turned), weight.as_reoriented(turned)
        array, mask_XYZ = np.asarray(image.dataobj), np.asarray(mask.dataobj)
        view = view_of(space_of(np.asarray(image.affine), array.shape))
        start, size = view.box(plane, view.slice_number(plane, mask_XYZ))
        x, y, z = (slice(a, a + n) for a, n in zip(start, size, strict=True))
        picture = view.turn(plane, array[x, y, z])
        expected = picture if expected is None else expected
        np.testing.assert_array_equal(picture, expected)
        aspects = {"axial": 2 / 1, "coronal": 3 / 1, "sagittal": 3 / 2}
        assert view.pixel_aspect(plane) == aspects[plane.name]
        assert view.picture_aspect(plane) == aspects[plane.name] * picture.shape[0] / picture.shape[1]


def test_pictures_are_radiological():
    axes_RAS = np.zeros((4, 5, 6))
    axes_RAS[3, :, :], axes_RAS[:, 4, :], axes_RAS[:, :, 5] = 1, 2, 3  # the rightmost, the foremost, the uppermost
    view = view_of(space_of(np.eye(4), axes_RAS.shape))
    axial = view.turn(AXIAL, axes_RAS[:, :, :1])
    assert axial.shape == (5, 4)
    assert (axial[0] == 2).all()
    assert (axial[1:, 0] == 1).all()
    coronal = view.turn(CORONAL, axes_RAS[:, :1])
    assert coronal.shape == (6, 4)
    assert (coronal[0] == 3).all()
    assert (coronal[1:, 0] == 1).all()
    sagittal = view.turn(SAGITTAL, axes_RAS[:1])
    assert sagittal.shape == (6, 5)
    assert (sagittal[0] == 3).all()
    assert (sagittal[1:, 0] == 2).all()


def test_without_an_affine_slices_are_those_of_the_array():
    array = volume("flair", 0)
    view = view_of(Space(shape=SHAPE))
    assert [plane.at(3) for plane in view.planes] == ["axis 0, 3", "axis 1, 3", "axis 2, 3"]
    for axis, plane in enumerate(view.planes):
        start, size = view.box(plane, 3)
        x, y, z = (slice(a, a + n) for a, n in zip(start, size, strict=True))
        np.testing.assert_array_equal(view.turn(plane, array[x, y, z]), array.take(3, axis=axis))
        assert plane.letters == ("", "")
        assert view.pixel_aspect(plane) == 1


def test_slices_go_through_most_of_the_target_or_the_middle():
    view = view_of(space_of(np.eye(4), SHAPE))
    assert [view.slice_number(plane, lesion(0) > 0) for plane in PLANES] == [7, 4, 9]
    for weight in (None, np.zeros(SHAPE)):
        assert [view.slice_number(plane, weight) for plane in PLANES] == [5, 6, 7]


def test_the_window_leaves_background_and_outliers_out():
    values = np.concatenate([np.zeros(5000), np.arange(1, 1000), [1e6, np.nan]])
    low, high = window([values])
    assert 1 < low < 20
    assert 980 < high < 1000
    assert window([np.zeros((3, 3))]) == (0.0, 1.0)
    assert window([np.full((3, 3), 7)]) == (6.5, 7.5)


def test_the_target_is_painted_by_class():
    raw = np.array([[0, 0, 4, 4, 4], [0, 0, 4, 4, 4], [0, 0, 4, 4, 4], [9, 0, 0, 0, 1]])
    classes = class_numbers(raw, [0, 4, 1])
    assert classes.tolist()[3] == [-1, 0, 0, 0, 2]
    colours = colour_map(3)
    painted = overlay(classes, colours)
    assert (painted[classes == 0] == 0).all()
    np.testing.assert_allclose(painted[0, 2, :3], colours[1], rtol=1e-6)
    assert painted[0, 4, 3] < painted[0, 2, 3]  # inside a tint, at the edge a line
    assert painted[3, 0, :3].tolist() == [1, 1, 1]  # a value that no class has


@pytest.mark.parametrize("n_classes", [2, 6, 7, 40])
def test_every_class_has_a_colour_of_its_own(n_classes: int):
    colours = colour_map(n_classes)
    assert colours.shape == (n_classes, 3)
    assert len(np.unique(colours.round(3), axis=0)) == n_classes


def test_the_picture_is_a_png(tmp_path: Path):
    shard_set = open_toy(tmp_path / "shards", unlabelled=True)
    shown = show(shard_set, tmp_path / "samples.png", per_class=2, fold=0)
    assert shown.path == tmp_path / "samples.png"
    assert len(shown.samples) == 6  # two classes, and those without one
    assert shown.left_out == []
    with Image.open(shown.path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert max(image.size) < 4000


def test_the_picture_of_volumes_has_the_colours_of_the_target(brains: ShardSet, tmp_path: Path):
    show(brains, tmp_path / "samples.png", keys=["case-0"])
    with Image.open(tmp_path / "samples.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in colour_map(3)[1:] * 255:
        assert (np.abs(pixels - colour).max(axis=1) <= 1).sum() > 50  # the legend's square at least
    assert (pixels.max(axis=1) - pixels.min(axis=1) > 60).sum() > 2000  # and over the slices


def test_of_volumes_only_the_slices_are_read(brains: ShardSet, sheets: list[Sheet], monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    cropped: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    true_read, true_crop = brains.read, brains.crop
    monkeypatch.setattr(brains, "read", lambda s, names: read.extend(names) or true_read(s, names))

    def crop(sample: int, name: str, start: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
        cropped.append((name, start, size))
        return true_crop(sample, name, start, size)

    monkeypatch.setattr(brains, "crop", crop)
    show(brains, Path("unused.png"), keys=["case-1"])
    assert read == ["seg"]
    x, y, z = SHAPE
    expected = [((0, 0, 7), (x, y, 1)), ((0, 4, 0), (x, 1, z)), ((9, 0, 0), (1, y, z))]
    assert cropped == [(name, *box) for name in ("flair", "t1") for box in expected]


def test_a_card_of_volumes_has_a_row_for_each_plane(brains: ShardSet):
    maker = CardMaker(brains, fold=0)
    assert maker.panels == (2, 3)
    cards = maker.cards([0, 3, 4, 5])
    assert cards[0].title == ["case-0", "patient p0, fold 0: train"]
    assert cards[0].row_names == ["axial 7", "coronal 4", "sagittal 9"]
    panel = cards[0].rows[0][1]
    assert panel.caption == "t1"
    assert isinstance(panel.content, Picture)
    # voxels of the file run to the left and to posterior, as the picture does
    axial = volume("t1", 0)[:, :, 7].T
    order = np.argsort(axial, axis=None, kind="stable")
    assert (np.diff(panel.content.pixels.ravel()[order]) >= 0).all()
    assert panel.content.overlay is not None
    np.testing.assert_array_equal(panel.content.overlay[:, :, 3] > 0, (lesion(0)[:, :, 7] > 0).T)
    assert [row[1].content for row in cards[3].rows] == [Words(["missing"], centred=True)] * 3
    assert cards[4].title[1].endswith("fold 0: test, no seg")
    assert cards[4].row_names == ["axial 5", "coronal 6", "sagittal 7"]
    assert cards[5].title[1] == "patient p5, fold 0: not used"
    thick = cards[5].rows[1][0].content
    assert isinstance(thick, Picture)
    assert (thick.pixel_aspect, thick.letters) == (3, ("R", "S"))
    assert [name for name, _ in maker.legend().entries] == ["oedema", "core"]
    assert maker.row_heights([0]) == pytest.approx([12 / 14, 10 / 14, 10 / 12])
    assert maker.row_heights([0, 5])[1:] == [1.4, 1.4]  # as high as a panel may be
    assert "not drawn, as no model is given them: age" in maker.notes()
    assert not any("no class" in note for note in maker.notes())


def test_a_page_with_many_classes_of_voxels_is_no_wider(tmp_path: Path):
    card = Card(["key"], [[Panel(Words(["missing"]), "flair")]])
    widths: list[int] = []
    for n_classes in (1, 60):
        legend = Legend([(f"structure_{number}", (0.5, 0.5, 0.5)) for number in range(n_classes)])
        draw(Sheet("title", [[card]], [1.0], legend, []), tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as image:
            widths.append(image.size[0])
    assert widths[0] == widths[1]


def test_values_that_no_class_has_are_told(brains: ShardSet):
    maker = CardMaker(brains, fold=None)
    maker.cards([1])
    assert "white: values of seg that no class has (9)" in maker.notes()


def test_a_card_shows_images_curves_and_gaps(toy: ShardSet):
    maker = CardMaker(toy, fold=None)
    cards = maker.cards([0, 1, 2])
    title, rows = cards[0].title, cards[0].rows
    assert title == ["s-000", "low, patient p0"]
    assert [panel.caption for panel in rows[0]] == ["gene", "slide", "coarse"]
    gene, slide, coarse = (panel.content for panel in rows[0])
    assert isinstance(gene, Words)  # few and named
    assert gene.lines[1] == "b missing"
    assert isinstance(slide, Picture)
    np.testing.assert_allclose(slide.pixels, toy.read(0, ["slide"])["slide"] / 255, rtol=1e-6)
    assert isinstance(coarse, Picture)
    assert coarse.pixels.shape == (6, 5)
    assert cards[2].rows[0][0].content == Words(["missing"], centred=True)


def test_long_vectors_are_curves_of_one_scale(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    values[1, 3] = np.nan
    values[2] = np.nan
    description = Description(
        task="genes",
        class_names=["a", "b"],
        modalities={"rna": Modality(kind="vector", dtype="float32", shape=(20,), codec="npy")},
        source="made by the tests",
        licence="none",
    )
    with ShardWriter(tmp_path / "shards", description) as writer:
        for number, row in enumerate(values):
            writer.add(f"g{number}", {"rna": row}, patient=f"g{number}", label=0)
        writer.split([Fold(train=["g0", "g1", "g2"], val=[], test=[])], rule="all", seed=None)
    cards = CardMaker(ShardSet(tmp_path / "shards"), fold=None).cards([0, 1, 2])
    first, second, third = (cards[number].rows[0][0] for number in range(3))
    assert isinstance(first.content, Curve)
    assert isinstance(second.content, Curve)
    assert first.content.limits == second.content.limits == pytest.approx(np.nanpercentile(values, (1, 99)))
    assert second.caption == "rna, 1 of 20 missing"
    assert third.content == Words(["all values missing"], centred=True)
    assert cards[0].title == ["g0", "a"]  # the patient's name is the key


def test_a_target_image_lies_on_images_of_its_size(tmp_path: Path):
    modalities = {
        "photo": Modality(kind="image", dtype="uint8", shape=(8, 6, 3), codec="png"),
        "thumb": Modality(kind="image", dtype="uint8", shape=(4, 3, 3), codec="png"),
        "mask": Modality(kind="image", dtype="uint8", shape=(8, 6, 1), codec="png", role="target"),
    }
    for name in ("photo", ""):
        described = {key: modality for key, modality in modalities.items() if name or key != "photo"}
        description = Description(
            task="wounds",
            problem="segmentation",
            class_names=["skin", "wound"],
            modalities=described,
            source="made by the tests",
            licence="none",
        )
        folder = tmp_path / f"shards{name}"
        with ShardWriter(folder, description) as writer:
            arrays = {key: np.ones(modality.shape, np.uint8) for key, modality in described.items()}
            writer.add("w", arrays, patient="w", label=None)
            writer.split([Fold(train=["w"], val=[], test=[])], rule="all", seed=None)
        (row,) = CardMaker(ShardSet(folder), fold=None).cards([0])[0].rows
        tints = {panel.caption: panel.content.overlay for panel in row if isinstance(panel.content, Picture)}
        tinted = [name for name, tint in tints.items() if tint is not None]
        assert [panel.caption for panel in row] == (["photo", "thumb"] if name else ["thumb", "mask"])
        assert tinted == (["photo"] if name else ["mask"])


def test_samples_are_of_different_patients_and_each_combination_is_among_them(toy: ShardSet, sheets: list[Sheet]):
    samples = toy.manifest.samples
    for per_class, gaps in ((1, [False]), (3, [False, False, True])):  # complete ones first
        shown = show(toy, Path("unused.png"), per_class=per_class)
        for label in (0, 1):
            members = [number for number in shown.samples if samples.label[number] == label]
            assert len({samples.patient[number] for number in members}) == per_class
            assert [samples.bytes["gene"][number] is None for number in members] == gaps
    every = show(toy, Path("unused.png"), per_class=24)
    assert len(every.samples) <= 48
    assert len(set(every.samples)) == len(every.samples)
    assert [len(row) for row in sheets[1].cards] == [3, 3]  # a row a class


def test_keys_are_shown_in_the_order_given_and_once(toy: ShardSet, sheets: list[Sheet]):
    shown = show(toy, Path("unused.png"), keys=["s-007", "s-002", "s-007"])
    assert shown.samples == [7, 2]
    assert [card.title[0] for row in sheets[0].cards for card in row] == ["s-007", "s-002"]


def test_what_does_not_fit_on_the_page_is_said(tmp_path: Path, sheets: list[Sheet]):
    description = Description(
        task="plants",
        class_names=[f"c{number}" for number in range(150)],
        modalities={"leaf": Modality(kind="image", dtype="uint8", shape=(2, 2, 1), codec="png")},
        source="made by the tests",
        licence="none",
    )
    with ShardWriter(tmp_path / "shards", description) as writer:
        for number in range(300):
            image = np.full((2, 2, 1), number % 256, np.uint8)
            writer.add(f"s{number:03d}", {"leaf": image}, patient=f"p{number}", label=number // 2)
        writer.split([Fold(train=writer.patients, val=[], test=[])], rule="all", seed=None)
    shard_set = ShardSet(tmp_path / "shards")
    shown = show(shard_set, Path("unused.png"))
    assert shown.samples == list(range(0, 288, 2))
    assert shown.left_out == [
        "without 6 classes (c144, c145, c146, c147, c148, ...): the page is full; name samples by their keys",
        "only 1 of each class instead of 2: the page is full; name others by their keys",
    ]
    assert sheets[0].notes[:2] == shown.left_out
    shown = show(shard_set, Path("unused.png"), keys=shard_set.manifest.samples.key)
    assert len(shown.samples) == 144
    assert shown.left_out == ["only 144 of 300 samples: the page is full; name the others in a second call"]


def test_one_outlier_does_not_flatten_the_curves(tmp_path: Path):
    values = np.linspace(0, 1, 2000, dtype=np.float32)
    values[7] = 1e6
    description = Description(
        task="genes",
        class_names=["a", "b"],
        modalities={"rna": Modality(kind="vector", dtype="float32", shape=(2000,), codec="npy")},
        source="made by the tests",
        licence="none",
    )
    with ShardWriter(tmp_path / "shards", description) as writer:
        writer.add("g", {"rna": values}, patient="g", label=0)
        writer.split([Fold(train=["g"], val=[], test=[])], rule="all", seed=None)
    shard_set = ShardSet(tmp_path / "shards")
    content = CardMaker(shard_set, fold=None).cards([0])[0].rows[0][0].content
    assert isinstance(content, Curve)
    assert content.limits[1] < 1
    show(shard_set, tmp_path / "samples.png")


def test_anatomy_that_is_not_known_is_not_claimed(tmp_path: Path, sheets: list[Sheet]):
    shard_set = placeless(tmp_path / "shards")
    lines = words(info(shard_set))
    assert ["2", "14", "x", "12", "x", "10", "unknown", "unknown"] in lines
    assert "spaces: 1 shape 14 x 12 x 10 voxels, spacing unknown" in info(shard_set)
    space = json.loads(summary(shard_set).to_json())["spaces"][0]
    assert (space["spacing"], space["orientation"]) == (None, None)
    show(shard_set, Path("unused.png"))
    card = sheets[0].cards[0][0]
    assert list(card.row_names)[:3] == ["axis 0, 7", "axis 1, 6", "axis 2, 5"]
    for row in card.rows[:3]:
        assert isinstance(row[0].content, Picture)
        assert row[0].content.letters == ("", "")
    assert not any("radiological" in note for note in sheets[0].notes)
    with pytest.raises(DataError, match=r"the sample has no affine, as its volumes came as \.npy"):
        write_map(tmp_path / "map.nii", np.zeros(SHAPE, np.uint8), Space(shape=SHAPE))


@pytest.mark.parametrize(
    ("name", "written", "kind"),
    [("x.jpg", "x.jpg", "JPEG"), ("x.PNG", "x.PNG", "PNG"), ("x", "x.png", "PNG")],
)
def test_the_name_says_the_kind_of_the_picture(toy: ShardSet, tmp_path: Path, name: str, written: str, kind: str):
    assert show(toy, tmp_path / name, per_class=1).path == tmp_path / written
    with Image.open(tmp_path / written) as image:
        assert image.format == kind


def test_sets_are_looked_at_by_url(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    with Server(toy_folder) as server:
        assert main(["shards", "info", server.url]) == 0
        assert f"{server.url}: task 'toy'" in capsys.readouterr().out
        assert main(["shards", "show", f"{server.url}/manifest.json", "--per-class", "1"]) == 0
        assert (tmp_path / "samples.png").is_file()
        capsys.readouterr()
        assert main(["shards", "verify", server.url]) == 2
    assert "is remote: each shard is compared with its SHA-256 when it is fetched" in capsys.readouterr().err


def test_an_unknown_kind_of_picture_is_refused(toy: ShardSet, tmp_path: Path):
    with pytest.raises(DataError, match=r"unknown kind '\.gif', expected \.png, \.jpg, \.jpeg; choose another name"):
        show(toy, tmp_path / "x.gif")


def test_unknown_samples_are_named_with_the_closest(toy: ShardSet, tmp_path: Path):
    with pytest.raises(
        DataError,
        match=r"has no sample 's-0007', 'x'; did you mean 's-007'\?; it has 48 samples, such as 's-000', 's-001', 's-",
    ):
        show(toy, tmp_path / "samples.png", keys=["s-001", "s-0007", "x"])


@pytest.mark.parametrize("fold", [-1, 3])
def test_an_unknown_fold_is_refused(toy: ShardSet, tmp_path: Path, fold: int):
    with pytest.raises(DataError, match=rf"fold {fold} is not in .*, which has folds 0\.\.2"):
        show(toy, tmp_path / "samples.png", fold=fold)


def test_a_picture_that_cannot_be_written_is_a_data_error(toy: ShardSet, tmp_path: Path):
    for out in (tmp_path / "nowhere" / "samples.png", tmp_path):
        with pytest.raises(DataError, match=r"cannot write the picture .*choose another place with --output"):
            show(toy, out, per_class=1)


def test_damage_in_what_is_drawn_names_the_sample(toy_folder: Path, tmp_path: Path):
    shard_set = ShardSet(toy_folder)
    samples = shard_set.manifest.samples
    place = samples.bytes["slide"][4]
    assert place is not None
    path = toy_folder / shard_set.manifest.shards[samples.shard[4]].file
    content = bytearray(path.read_bytes())
    content[place[0] + place[1] // 2] ^= 8
    path.write_bytes(content)
    with pytest.raises(DataError, match="'slide' of sample 's-004'"):
        show(ShardSet(toy_folder), tmp_path / "samples.png", keys=["s-004"])
    assert not (tmp_path / "samples.png").exists()
