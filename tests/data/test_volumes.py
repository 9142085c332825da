"""Volumes: stored numbers as the cards count them, crops as functions of a key, one geometry for a sample."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distkd.base import InputSpec
from distkd.data.manifest import Modality
from distkd.data.transform import Preprocess, VolumeInput, fit_volume
from distkd.data.volumes import (
    STATISTICS,
    VolumeConfig,
    class_map,
    crop_box,
    evaluation_box,
    finish_image,
    finish_target,
    foreground_points,
    normalise_crop,
    read_points,
    volume_statistics,
)
from distkd.errors import ConfigError, DataError
from tests.golden_numbers import golden

REGIONS = {"et": [4], "wt": [1, 2, 4], "tc": [1, 4]}
VALUES = [1, 2, 4]
key = torch.tensor(77)


def hashed(n: int, stream: int) -> np.ndarray:
    """The card's u_k(i), -0.5 <= u < 0.5."""
    word = (1 << 32) - 1
    h = (np.arange(1, n + 1, dtype=np.uint64) * 2654435761 + 1013904223 * stream) & word
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 73244475) & word
    return (h ^ (h >> 16)) / 2**32 - 0.5


def card_volume() -> np.ndarray:
    volume = np.floor((hashed(1000, 40) + 0.5) * 6).astype(np.int16).reshape(10, 10, 10)
    volume[:3] = 0
    volume[9, 9, 9], volume[9, 9, 8] = 60, 59
    return volume


def tumour() -> np.ndarray:
    seg = np.zeros((12, 10, 8), np.uint8)
    seg[3:9, 2:8, 2:6] = 2
    seg[5:7, 4:6, 3:5] = 1
    seg[6, 5, 4] = 4
    return seg


def volume_preprocess(config: VolumeConfig, shape: tuple[int, ...] = (1, 12, 10, 8)) -> Preprocess:
    modality = Modality(kind="volume", dtype="int16", shape=shape, codec="zarr", chunk=shape)
    return Preprocess({"flair": fit_volume(modality, config=config)})


def test_the_cards_statistics_and_normalised_values():
    card = golden("lckd")["normalisation"]
    volume = card_volume()
    statistics = volume_statistics(volume[None])
    assert dict(zip(STATISTICS, statistics.tolist(), strict=True)) == {
        "background": 0,
        "clip": card["clip_value"],
        "mean": pytest.approx(card["mean_nonzero_after_clip"], rel=1e-14),
        "std": pytest.approx(card["std_nonzero_after_clip"], rel=1e-14),
        "maximum": card["max_before"],
    }
    assert statistics.dtype == np.float64
    made = normalise_crop(volume, statistics, "lckd")
    expected = card["output"]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made.reshape(-1)[expected["at"]], expected["val"], atol=1e-6)
    assert (made.astype(np.float64) ** 2).sum() == pytest.approx(expected["sumsq"], rel=1e-6)
    assert (made.max(), made.min()) == (pytest.approx(expected["max"]), pytest.approx(expected["min"]))
    assert (made != 0).sum() == card["n_nonzero"]


def test_a_crop_is_normalised_as_its_volume():
    volume = card_volume()
    statistics = volume_statistics(volume)
    for how in ("lckd", "zscore_nonzero", "none"):
        whole = normalise_crop(volume, statistics, how)
        np.testing.assert_array_equal(normalise_crop(volume[4:8, 2:5], statistics, how), whole[4:8, 2:5])
    assert whole.dtype == np.float32
    bright = normalise_crop(volume, statistics, "zscore_nonzero")
    assert bright.max() == pytest.approx((60 - statistics[2]) / statistics[3], rel=1e-6)
    assert (bright[:3] == 0).all()


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        (np.zeros((3, 3, 3), np.int16), [0, 0, 0, 0, 0]),
        (np.full((3, 3, 3), 7, np.int16), [7, 7, 0, 0, 7]),
        (np.linspace(0, 1, 27, dtype=np.float64).reshape(3, 3, 3), [0, 1, 0.5 + 0.5 / 26, np.nan, 1]),
        (np.arange(-13, 14).reshape(3, 3, 3), [-13, 13, 0.5, np.nan, 13]),
    ],
)
def test_statistics_of_odd_volumes(volume: np.ndarray, expected: list[float]):
    found = volume_statistics(volume)
    inside = volume[volume != volume.flat[0]]
    std = inside.std() if len(inside) else 0
    np.testing.assert_allclose(found, [std if np.isnan(number) else number for number in expected], atol=1e-12)
    assert np.isfinite(normalise_crop(volume, found, "lckd")).all()


def test_values_that_are_not_finite_are_refused():
    volume = np.zeros((2, 2, 2), np.float32)
    volume[0, 0, 1], volume[1, 1, 1] = np.nan, np.inf
    words = r"holds 2 of 8 values that are not finite \(NaN or infinite\); mend the file"
    with pytest.raises(DataError, match=words):
        volume_statistics(volume)
    with pytest.raises(DataError, match="'flair': the volume " + words):
        volume_preprocess(VolumeConfig(normalise="none"), (1, 2, 2, 2)).volume("flair", volume)


def test_points_are_voxels_of_their_value_drawn_by_the_key():
    seg = tumour()
    stored = foreground_points(seg, [1, 2, 4, 9], 5, key)
    assert (stored.dtype, stored.shape) == (np.int32, (4 * 16,))
    np.testing.assert_array_equal(stored, foreground_points(seg[None], [1, 2, 4, 9], 5, key.reshape(1)))
    assert (stored != foreground_points(seg, [1, 2, 4, 9], 5, torch.tensor(78))).any()
    points = read_points(stored, [1, 2, 4, 9])
    for value in (1, 2, 4):
        count, places = points[value]
        assert count == (seg == value).sum()
        assert (seg[tuple(places.T)] == value).all()
        assert len(np.unique(places, axis=0)) == min(5, count)
    assert points[9][0] == 0
    assert (points[9][1] == -1).all()
    # a value's points do not depend on which others are asked for
    np.testing.assert_array_equal(read_points(foreground_points(seg, [2], 5, key), [2])[2][1], points[2][1])


def test_points_of_other_values_are_refused():
    stored = foreground_points(tumour(), VALUES, 5, key)
    with pytest.raises(DataError, match="48 stored numbers are not the foreground points of 5 label values"):
        read_points(stored, [1, 2, 3, 4, 5])
    config = VolumeConfig(crop=(4, 4, 4), foreground=1, regions={"wt": [1, 3]}, anywhere=False)
    with pytest.raises(ConfigError, match=r"regions has the value 3, the stored foreground points are of \[1, 2, 4\]"):
        crop_box(config, (12, 10, 8), (12, 10, 8), read_points(stored, VALUES), key)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@given(
    shape=sizes,
    crop=sizes,
    margin=st.integers(0, 4),
    scale=st.floats(0.5, 1.5),
    number=st.integers(0, 10**9),
    data=st.data(),
)
def test_a_crop_lies_inside_and_is_a_function_of_the_key(
    shape: tuple[int, int, int], crop: tuple[int, int, int], margin: int, scale: float, number: int, data: st.DataObject
):
    config = VolumeConfig(
        crop=crop,
        margin=(margin,) * 3,
        scale=(scale, scale),
        scale_probability=0.5,
        foreground=0.5,
        regions=REGIONS,
    )
    seg = np.zeros(shape, np.uint8)
    seg[tuple(data.draw(st.integers(0, n - 1)) for n in shape)] = data.draw(st.sampled_from([0, 1, 2, 4]))
    points = read_points(foreground_points(seg, VALUES, 3, key), VALUES)
    box = crop_box(config, shape, shape, points, torch.tensor(number))
    assert box == crop_box(config, shape, shape, points, torch.tensor([number]))
    assert box.made == crop
    for first, size, full, n, c in zip(box.start, box.size, box.full, shape, crop, strict=True):
        assert 0 <= first <= first + size <= n
        assert size == min(full, n)
        assert full in (c, max(1, int(c * scale)))
        if margin and full == c and n - 2 * margin >= c and not seg.any():
            assert margin <= first <= n - margin - c
    cut = np.ones((2, *box.size), np.float32)
    assert finish_image(cut, box).shape == (2, *crop)
    assert finish_target(seg[: box.size[0], : box.size[1], : box.size[2]], box).shape == crop


def boxes(config: VolumeConfig, n: int = 600) -> list[Any]:
    points = read_points(foreground_points(tumour(), VALUES, 200, key), VALUES)
    return [crop_box(config, (12, 10, 8), (12, 10, 8), points, torch.tensor(i)) for i in range(n)]


def test_crops_are_centred_on_the_tumour_as_often_as_asked():
    config = VolumeConfig(crop=(1, 1, 1), foreground=0.5, regions=REGIONS)
    seg = tumour()
    found = np.array([seg[box.start] for box in boxes(config)])
    share = (seg > 0).mean()
    # 0.375 are centred on a region, the rest is anywhere
    assert (found > 0).mean() == pytest.approx(0.375 + 0.625 * share, abs=0.06)
    # of the regions, each as often; within one, each voxel as often
    n = {value: (seg == value).sum() for value in VALUES}
    always = np.array([seg[box.start] for box in boxes(config.model_copy(update={"foreground": 1, "anywhere": False}))])
    for value in VALUES:
        rate = np.mean([n[value] / sum(n[v] for v in region) * (value in region) for region in REGIONS.values()])
        assert (always == value).mean() == pytest.approx(rate, abs=0.06)


def test_a_region_that_does_not_occur_and_a_sample_without_a_target_are_cut_anywhere():
    config = VolumeConfig(crop=(2, 2, 2), foreground=1, regions={"et": [4]}, anywhere=False, margin=(1, 2, 3))
    absent = read_points(foreground_points(np.zeros((9, 9, 9)), VALUES, 3, key), VALUES)
    for number in range(20):
        boxes = [crop_box(config, (9, 9, 9), (9, 9, 9), points, torch.tensor(number)) for points in (absent, None)]
        assert boxes[0] == boxes[1]


def test_random_places_are_even_and_reach_both_ends():
    config = VolumeConfig(crop=(4, 4, 4), margin=(1, 0, 0))
    starts = np.array([box.start for box in boxes(config, 900)])
    assert (starts.min(axis=0).tolist(), starts.max(axis=0).tolist()) == ([1, 0, 0], [7, 6, 4])
    np.testing.assert_allclose(starts.mean(axis=0), [4, 3, 2], atol=0.2)


def test_evaluation_takes_the_centre_or_all():
    config = VolumeConfig(crop=(4, 4, 4))
    box = evaluation_box(config, (12, 9, 3), (12, 10, 8))
    assert (box.start, box.size, box.full, box.made) == ((4, 2, 0), (4, 4, 3), (4, 4, 4), (4, 4, 4))
    box = evaluation_box(config.model_copy(update={"evaluate": "whole"}), (12, 9, 3), (12, 10, 8))
    assert (box.start, box.size, box.made) == ((0, 0, 0), (12, 9, 3), (12, 10, 8))


def test_mtcms_slices_and_nearest_size():
    card = golden("mtcm-kd")["preprocess"]
    config = VolumeConfig(slices=tuple(card["depth_slice"]), resize=(128, 128, 128), normalise="none")
    box = evaluation_box(config, (240, 1, 155), (240, 1, 155))
    assert box == crop_box(config, (240, 1, 155), (240, 1, 155), None, key)
    places_XZ = np.arange(240)[:, None] * 1000 + np.arange(155)
    whole = volume_preprocess(config, (1, 240, 1, 155)).volume("flair", places_XZ[None, :, None, :])
    assert whole.shape == (1, 128, 128, 128)
    assert (whole[0, :12, 0, 0] // 1000).tolist() == card["nearest_240_to_128_first12"]
    assert (whole[0, 0, 0, :12] % 1000 - 3).tolist() == card["nearest_144_to_128_first12"]
    cut = places_XZ[:, None, box.start[2] : box.start[2] + box.size[2]]
    np.testing.assert_array_equal(finish_target(cut, box), whole[0])
    assert class_map(np.array([0, 1, 2, 4]), [0, 1, 2, 4]).tolist() == list(card["label_map"].values())


def test_a_scaled_crop_comes_back_as_torch_interpolates_and_labels_as_the_middle_of_voxels():
    config = VolumeConfig(crop=(6, 6, 6), scale=(0.5, 0.5), scale_probability=1)
    box = crop_box(config, (9, 9, 9), (9, 9, 9), None, key)
    assert box.size == (3, 3, 3)
    cut = np.random.default_rng(0).random((2, 3, 3, 3), dtype=np.float32)
    made = finish_image(cut, box)
    expected = torch.nn.functional.interpolate(torch.as_tensor(cut)[None], size=(6, 6, 6), mode="trilinear")[0].numpy()
    np.testing.assert_allclose(made[:, 1:-1, 1:-1, 1:-1], expected[:, 1:-1, 1:-1, 1:-1], atol=1e-5)
    label = np.arange(27).reshape(3, 3, 3)
    np.testing.assert_array_equal(finish_target(label, box), label.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_small_volumes_are_filled_up_with_background():
    box = evaluation_box(VolumeConfig(), (2, 3, 2), (4, 3, 3))
    made = finish_image(np.ones((1, 2, 3, 2), np.float32), box)
    assert made.shape == (1, 4, 3, 3)
    assert made.sum() == 12
    assert made[:, :2, :, :2].all()
    target = finish_target(np.ones((2, 3, 2), np.uint8), box)
    assert (target.dtype, target.sum()) == (np.uint8, 12)


def test_a_label_without_a_class_is_refused():
    assert class_map(np.array([[0, 4], [2, 0]], np.uint8), [4, 0, 2]).tolist() == [[1, 0], [2, 1]]
    with pytest.raises(DataError, match=r"the label map holds \[3, 9\], the values of its classes are \[0, 1, 2, 4\]"):
        class_map(np.array([0, 3, 4, 9]), [0, 1, 2, 4])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": [4, 4, 4], "resize": [2, 2, 2]}, "data.volume has crop and resize"),
        ({"crop": [4, 4, 4], "slices": [1, 2]}, "data.volume has crop and slices"),
        ({"slices": [5, 5]}, r"data\.volume\.slices=\(5, 5\) is empty"),
        ({"scale": [1.1, 0.9]}, r"data\.volume\.scale=\(1\.1, 0\.9\) is empty"),
        ({"crop": [4, 4, 4], "foreground": 0.5}, r"data\.volume\.foreground=0\.5 needs data\.volume\.regions"),
        ({"scale_probability": 0.5}, r"data\.volume\.scale_probability is about crops"),
        ({"crop": [4, 4, 0]}, "crop"),
        ({"foreground": 1.5}, "foreground"),
        ({"normalise": "minmax"}, "normalise"),
        ({"regions": {"wt": []}}, r"regions\.wt"),
        ({"augment": {"blur": 2}}, r"augment\.blur"),
        ({"flips": 1}, "flips"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        VolumeConfig.model_validate(settings)


def test_slices_beyond_the_volume_are_refused():
    with pytest.raises(ConfigError, match=r"slices=\(3, 147\) of a volume of 8 slices; its end can be 8 at most"):
        volume_preprocess(VolumeConfig(slices=(3, 147)))


def test_an_exported_transform_makes_the_same_of_a_raw_volume():
    config = VolumeConfig(crop=(4, 6, 8), normalise="lckd", foreground=0.5, regions=REGIONS)
    before = volume_preprocess(config)
    after = Preprocess.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.inputs == before.inputs
    assert after.specs == {"flair": InputSpec("volume", (1, 4, 6, 8))}
    assert isinstance(after.inputs["flair"], VolumeInput)
    assert after.inputs["flair"].looks == "1 x 4 x 6 x 8 volume, normalised: lckd"
    raw = np.random.default_rng(0).integers(0, 90, size=(12, 10, 8), dtype=np.int16)
    made = after.apply({"flair": raw})["flair"]
    box = evaluation_box(config, (12, 10, 8), (12, 10, 8))
    cut = raw[None, 4:8, 2:8]
    np.testing.assert_array_equal(made, before.volume("flair", cut, box=box, statistics=volume_statistics(raw)))


def test_volumes_that_do_not_fit_are_refused():
    transform = volume_preprocess(VolumeConfig(crop=(4, 4, 4)))
    box = evaluation_box(VolumeConfig(crop=(4, 4, 4)), (12, 10, 8), (12, 10, 8))
    cut = np.zeros((1, 4, 4, 4), np.int16)
    with pytest.raises(DataError, match=r"'flair' is int16 of shape \(1, 4, 4, 3\), expected a volume of shape"):
        transform.volume("flair", cut[..., :3], box=box, statistics=np.zeros(5))
    with pytest.raises(DataError, match=r"expected a volume of \(channels, x, y, z\) with 1 channel"):
        transform.volume("flair", np.zeros((2, 4, 4, 4)))
    with pytest.raises(DataError, match=r"'flair' is <U1 of shape"):
        transform.volume("flair", np.full((1, 4, 4, 4), "a"))
    with pytest.raises(DataError, match=r"'flair': data\.volume\.normalise=zscore_nonzero needs the stored statistics"):
        transform.volume("flair", cut, box=box)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (VolumeConfig(), (1, 12, 10, 8)),
        (VolumeConfig(slices=(2, 6)), (1, 12, 10, 4)),
        (VolumeConfig(slices=(2, 6), resize=(5, 5, 5)), (1, 5, 5, 5)),
        (VolumeConfig(crop=(16, 4, 4)), (1, 16, 4, 4)),
    ],
)
def test_it_says_what_the_model_receives(config: VolumeConfig, shape: tuple[int, ...]):
    transform = volume_preprocess(config)
    assert transform.specs["flair"].shape == shape
    assert transform.volume("flair", np.zeros((12, 10, 8))).shape == shape
