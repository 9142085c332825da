"""Random changes of volumes: functions of the key, one geometry for a sample, amounts as the card has them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage

from distkd.data.volume_augment import VolumeAugmentConfig, vary_volumes

SIZE = (14, 12, 10)
CHANGES = ["elastic", "rotation", "zoom", "noise", "blur", "multiply", "add", "contrast", "low_resolution", "gamma"]
MOVES = ["elastic", "rotation", "zoom"]
ALL = VolumeAugmentConfig(
    **dict.fromkeys(CHANGES, 0.5), elastic_sigma=(1, 2), elastic_amplitude=(1, 5), flip=(0.5,) * 3
)
key = torch.tensor(5)


def always(change: str, **more: Any) -> VolumeAugmentConfig:
    return VolumeAugmentConfig.model_validate({change: 1.0, **more})


def smooth(seed: int = 0, channels: int = 1, size: tuple[int, int, int] = SIZE) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(channels, *size))
    return ndimage.gaussian_filter(noise, (0, 2, 2, 2)).astype(np.float32) * 8


def one(values: np.ndarray, config: VolumeAugmentConfig, number: int = 5) -> np.ndarray:
    return vary_volumes({"flair": values}, {}, config, torch.tensor(number))[0]["flair"]


def test_nothing_is_changed_by_default_nor_at_probability_0():
    images, targets = {"flair": smooth()}, {"seg": np.arange(np.prod(SIZE)).reshape(SIZE)}
    made, labels = vary_volumes(images, targets, VolumeAugmentConfig(), key)
    np.testing.assert_array_equal(made["flair"], images["flair"])
    np.testing.assert_array_equal(labels["seg"], targets["seg"])
    assert not np.shares_memory(made["flair"], images["flair"])


@pytest.mark.parametrize("interpolation", ["linear", "spline"])
def test_bits_are_a_function_of_the_key_in_any_order_and_thread(interpolation: str):
    config = ALL.model_copy(update={"interpolation": interpolation})
    # large enough for torch to share the work among threads
    images = {"flair": smooth(0, 1, (40, 36, 30)), "t1": smooth(1, 1, (40, 36, 30))}
    targets = {"seg": (smooth(2, 1, (40, 36, 30))[0] > 0).astype(np.uint8)}

    def make(number: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return vary_volumes(images, targets, config, torch.tensor(number))

    n_threads, alone = torch.get_num_threads(), [make(number) for number in range(5)]
    before = {name: values.copy() for name, values in images.items()}
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(make, reversed(range(5))))[::-1]
    finally:
        torch.set_num_threads(n_threads)
    for (made, labels), (again, labels_again) in zip(alone, together, strict=True):
        for name, values in images.items():
            np.testing.assert_array_equal(made[name], again[name])
            np.testing.assert_array_equal(values, before[name])
        np.testing.assert_array_equal(labels["seg"], labels_again["seg"])
        assert labels["seg"].dtype == np.uint8
    assert (alone[0][0]["flair"] != alone[1][0]["flair"]).any()


def test_a_modality_does_not_depend_on_which_others_there_are():
    images = {"flair": smooth(0), "t1": smooth(1)}
    for number in range(6):
        both = vary_volumes(images, {}, ALL, torch.tensor(number))[0]
        np.testing.assert_array_equal(both["flair"], one(images["flair"], ALL, number))


@pytest.mark.parametrize("change", [*MOVES, "flip"])
def test_modalities_and_target_of_a_sample_move_alike(change: str):
    config = always(change) if change != "flip" else VolumeAugmentConfig(flip=(1, 0, 1))
    if change == "elastic":
        config = always(change, elastic_sigma=(2, 3), elastic_amplitude=(5, 10))
    truth = smooth()[0] > 0
    image = truth[None].astype(np.float32)
    made, labels = vary_volumes({"flair": image, "t1": 2 * image}, {"seg": truth.astype(np.uint8) * 4}, config, key)
    np.testing.assert_allclose(made["t1"], 2 * made["flair"], atol=1e-6)
    assert set(np.unique(labels["seg"])) == {0, 4}
    assert ((labels["seg"] == 4) == (made["flair"][0] > 0.5)).mean() > 0.9
    assert (labels["seg"] != truth * 4).any()


def test_flips_are_exact_and_as_often_as_asked():
    values = smooth()
    np.testing.assert_array_equal(one(values, VolumeAugmentConfig(flip=(1, 0, 0))), values[:, ::-1])
    np.testing.assert_array_equal(one(values, VolumeAugmentConfig(flip=(0, 1, 1))), values[:, :, ::-1, ::-1])
    mark = np.zeros((1, 2, 2, 2), np.float32)
    mark[0, 0, 0, 0] = 1
    found = [np.argwhere(one(mark, VolumeAugmentConfig(flip=(0.5, 0.25, 1)), i))[0][1:] for i in range(800)]
    np.testing.assert_allclose(np.mean(found, axis=0), [0.5, 0.25, 1], atol=0.06)


@pytest.mark.parametrize("interpolation", ["linear", "spline"])
def test_a_zoom_is_about_the_centre_as_scipy_samples(interpolation: str):
    values = smooth()
    config = always("zoom", zoom_range=(0.8, 1.0), interpolation=interpolation)
    made = next(made for number in range(20) if (made := one(values, config, number)).tobytes() != values.tobytes())
    order = 3 if interpolation == "spline" else 1

    def zoomed(factor: float) -> np.ndarray:
        place = [(np.arange(n) - (n - 1) / 2) * factor + (n - 1) / 2 for n in SIZE]
        return ndimage.map_coordinates(values[0], np.meshgrid(*place, indexing="ij"), order=order)

    errors = {factor: np.abs(zoomed(factor) - made[0]).max() for factor in np.arange(0.8, 1.0, 0.002)}
    factor = min(errors, key=errors.__getitem__)
    assert errors[factor] < 0.02 * np.ptp(values)
    assert 0.8 <= factor < 0.999


def test_a_turn_leaves_the_centre_in_its_place():
    values = smooth(size=(9, 9, 9))
    config = always("rotation", rotation_degrees=1e-4)
    np.testing.assert_allclose(one(values, config), values, atol=1e-3)
    turned = one(values, always("rotation", rotation_degrees=90))
    centre = (slice(None), 4, 4, 4)
    np.testing.assert_allclose(turned[centre], values[centre], atol=1e-4)
    assert np.abs(turned - values).max() > 0.5


def test_outside_of_the_volume_is_zero():
    ones = np.ones((1, *SIZE), np.float32)
    made = [one(ones, always("zoom", zoom_range=(1.0, 4.0)), number) for number in range(10)]
    assert min(values[0, 0, 0, 0] for values in made) == 0
    for values in made:
        assert values[0, 7, 6, 5] == pytest.approx(1)


def test_elastic_deformation_moves_voxels_by_the_smoothed_noise():
    ramp = np.broadcast_to(np.arange(30, dtype=np.float32)[:, None, None], (30, 30, 30))[None]
    made = one(ramp, always("elastic", elastic_sigma=(4, 4), elastic_amplitude=(60, 60)))
    moved = (made - ramp)[0, 8:-8, 8:-8, 8:-8]
    # standard deviation of U(-1, 1) after a Gaussian of 4 voxels, times the amplitude
    expected = 60 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 4) ** 1.5
    assert 0.4 * expected < moved.std() < 1.6 * expected
    # smooth: its slope has a deviation of 1 / (sqrt(2) 4 voxels) of its own
    assert np.diff(moved, axis=1).std() == pytest.approx(expected / np.sqrt(2) / 4, rel=0.4)


def test_noise_has_its_own_values_in_each_modality_and_a_bounded_deviation():
    zero = np.zeros((1, *SIZE), np.float32)
    found = []
    for number in range(30):
        made = vary_volumes({"flair": zero, "t1": zero}, {}, always("noise"), torch.tensor(number))[0]
        assert np.corrcoef(made["flair"].ravel(), made["t1"].ravel())[0, 1] == pytest.approx(0, abs=0.15)
        assert made["flair"].std() == pytest.approx(made["t1"].std(), rel=0.15)
        found.append(made["flair"].std())
    assert max(found) < 0.11
    assert min(found) < 0.03
    assert np.mean(found) == pytest.approx(0.05, abs=0.02)


def test_half_of_the_channels_are_blurred_or_coarsened_or_moved():
    values = np.random.default_rng(0).normal(size=(1, 6, 6, 6)).astype(np.float32)
    for change in ("blur", "low_resolution", "add"):
        changed = [(one(values, always(change), number) != values).any() for number in range(200)]
        assert np.mean(changed) == pytest.approx(0.5, abs=0.13), change


def test_blur_is_scipys():
    values = np.random.default_rng(0).normal(size=(1, *SIZE)).astype(np.float32)
    config = always("blur", blur_sigma=(0.7, 0.7))
    made = next(made for number in range(20) if ((made := one(values, config, number)) != values).any())
    np.testing.assert_allclose(made[0], ndimage.gaussian_filter(values[0], 0.7), atol=1e-6)


def test_brightness_and_contrast_are_in_their_ranges():
    values = smooth() + 3
    ratios = [np.mean(one(values, always("multiply"), number) / values) for number in range(100)]
    assert (min(ratios), max(ratios)) == (pytest.approx(0.76, abs=0.02), pytest.approx(1.24, abs=0.02))
    moved = [np.mean(one(values, always("add"), number) - values) for number in range(300)]
    assert np.std([m for m in moved if m]) == pytest.approx(0.1, abs=0.02)
    spread = []
    for number in range(100):
        made = one(values, always("contrast"), number)
        assert made.min() >= values.min()
        assert made.max() <= values.max()
        spread.append(made.std() / values.std())
    assert min(spread) == pytest.approx(0.76, abs=0.02)
    assert max(spread) > 1.1
    assert np.mean(np.array(spread) < 1) == pytest.approx(0.5, abs=0.15)


def test_gamma_keeps_mean_deviation_and_order():
    values = smooth()
    for number in range(20):
        made = one(values, always("gamma"), number)
        assert made.mean() == pytest.approx(values.mean(), abs=1e-4)
        assert made.std() == pytest.approx(values.std(), rel=1e-4)
        order = np.argsort(values.ravel())
        assert (np.diff(made.ravel()[order]) >= -1e-6).all()
    # the power itself, up to scale: a straight line of values shows it
    line = np.linspace(0, 1, 125, dtype=np.float32).reshape(1, 5, 5, 5)
    made = one(line, always("gamma", gamma_range=(0.5, 1.0)), 3).ravel().astype(np.float64)
    unit = (made - made[0]) / (made[-1] - made[0])
    powers = np.log(unit[1:-1]) / np.log(line.ravel()[1:-1])
    assert np.ptp(powers) < 1e-2
    assert 0.5 <= powers.mean() <= 1.00001


def test_a_constant_volume_survives_everything():
    config = VolumeAugmentConfig(**dict.fromkeys(CHANGES, 1.0), flip=(1, 1, 1))
    for number in range(5):
        assert np.isfinite(one(np.zeros((2, *SIZE), np.float32), config, number)).all()


def test_low_resolution_is_coarser_and_stays_in_range():
    values = np.random.default_rng(0).normal(size=(1, *SIZE)).astype(np.float32)
    for interpolation in ("linear", "spline"):
        config = always("low_resolution", low_resolution_range=(0.5, 0.5), interpolation=interpolation)
        made = next(made for number in range(20) if ((made := one(values, config, number)) != values).any())
        assert made.min() >= values.min()
        assert made.max() <= values.max()
        assert np.abs(np.diff(made[0], axis=0)).mean() < 0.7 * np.abs(np.diff(values[0], axis=0)).mean()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"elastic": 1.5}, "elastic"),
        ({"rotation_degrees": 200}, "rotation_degrees"),
        ({"zoom_range": [1.25, 0.85]}, r"data\.volume\.augment\.zoom_range=\(1\.25, 0\.85\); give the lower end first"),
        ({"gamma_range": [1.1, 1.5]}, r"gamma_range=\(1\.1, 1\.5\); give the lower end first, and 1 inside"),
        ({"blur_sigma": [1, 0.5]}, r"blur_sigma=\(1\.0, 0\.5\); give the lower end first"),
        ({"low_resolution_range": [0.5, 1.5]}, "low_resolution_range"),
        ({"flip": 0.5}, "flip"),
        ({"shear": 1}, "shear"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        VolumeAugmentConfig.model_validate(settings)
