"""Augmentation: a function of the key, the same geometry for all images of a sample, colours as a slow form says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distkd.data.augment import (
    CENTRE,
    GREY,
    AugmentConfig,
    ImageDraw,
    crop_image,
    crop_size,
    image_draws,
    jitter_matrix,
    vary_vectors,
)
from distkd.data.manifest import Modality
from distkd.data.transform import Preprocess, fit_image

ALL = AugmentConfig(
    hflip=0.5,
    vflip=0.5,
    crop=0.75,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    vector_noise=0.5,
    vector_dropout=0.2,
)
keys = torch.arange(4000) * 7919


def image_transform(shape: tuple[int, int, int], crop: float | dict[str, float] = 1.0) -> Preprocess:
    modality = Modality(kind="image", dtype="uint8", shape=shape, codec="png")
    return Preprocess({"x": fit_image(modality, name="x", crop=crop, mean=(0.5,), std=(0.5,))})


def test_draws_are_a_function_of_the_key_alone():
    together = image_draws(ALL, keys[:20])
    assert [image_draws(ALL, keys[i : i + 1])[0] for i in range(20)] == together
    assert len(set(together)) == 20


def test_flips_come_as_often_as_asked():
    draws = image_draws(AugmentConfig(hflip=0.5, vflip=0.25), keys)
    assert np.mean([draw.hflip for draw in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([draw.vflip for draw in draws]) == pytest.approx(0.25, abs=0.03)
    assert not any(draw.vflip for draw in image_draws(AugmentConfig(hflip=1), keys[:200]))
    assert all(draw.hflip for draw in image_draws(AugmentConfig(hflip=1), keys[:200]))


def test_amounts_are_the_ends_of_even_draws():
    draws = image_draws(AugmentConfig(brightness=0.3, hue=0.1), keys)
    brightness, hue = np.array([draw.brightness for draw in draws]), np.array([draw.hue for draw in draws])
    assert (brightness.min(), brightness.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.3, abs=0.01))
    assert (hue.min(), hue.max()) == (pytest.approx(-0.1, abs=0.01), pytest.approx(0.1, abs=0.01))
    assert brightness.mean() == pytest.approx(1, abs=0.02)
    assert {draw.contrast for draw in draws} == {1.0}


def test_nothing_is_varied_by_default():
    draw = image_draws(AugmentConfig(), keys[:1])[0]
    assert (draw.hflip, draw.vflip, draw.brightness, draw.contrast, draw.saturation, draw.hue) == (
        False,
        False,
        1,
        1,
        1,
        0,
    )


@pytest.mark.parametrize("bad", [{"hflip": 1.5}, {"crop": 0}, {"brightness": -0.1}, {"hue": 0.6}, {"blur": 1}])
def test_amounts_out_of_range_are_refused(bad: dict[str, float]):
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(bad)


@pytest.mark.parametrize(
    ("crop", "expected"),
    [(1.0, (12, 10)), (0.5, (6, 5)), (8, (8, 8)), ({"x": 4}, (4, 4)), ({"y": 4}, (12, 10)), (0.001, (1, 1))],
)
def test_crops_are_shares_or_pixels(crop: float | dict[str, float], expected: tuple[int, int]):
    assert crop_size(crop, "x", 12, 10) == expected


@given(top=st.floats(0, 1), left=st.floats(0, 1), height=st.integers(1, 12), width=st.integers(1, 10))
def test_a_crop_lies_inside_the_image(top: float, left: float, height: int, width: int):
    draw = ImageDraw(top, left, hflip=False, vflip=False, brightness=1, contrast=1, saturation=1, hue=0)
    image = np.arange(120).reshape(12, 10, 1)
    cut = crop_image(image, (height, width), draw)
    assert cut.shape == (height, width, 1)
    first = int(cut[0, 0, 0])
    assert (cut[:, :, 0] == image[first // 10 : first // 10 + height, first % 10 : first % 10 + width, 0]).all()


def test_evaluation_crops_the_centre():
    image = np.arange(36).reshape(6, 6, 1)
    assert crop_image(image, (2, 2), CENTRE)[:, :, 0].tolist() == [[14, 15], [20, 21]]


def test_a_flip_is_a_mirror_of_the_crop():
    image = np.arange(36).reshape(6, 6, 1)
    draw = ImageDraw(0, 0, hflip=True, vflip=True, brightness=1, contrast=1, saturation=1, hue=0)
    assert crop_image(image, (2, 3), draw)[:, :, 0].tolist() == [[8, 7, 6], [2, 1, 0]]


@given(key=st.integers(0, 10**9))
def test_images_of_a_sample_are_cut_at_one_place(key: int):
    # a fine image whose pixels are the numbers of the coarse pixels that they lie in
    coarse = np.arange(28, dtype=np.uint8)[:, None] + np.zeros(28, np.uint8)
    fine = coarse.repeat(4, axis=0).repeat(4, axis=1)
    draw = image_draws(ALL, torch.tensor([key]))[0]
    cut = crop_image(coarse[:, :, None], (21, 21), draw)[:, 0, 0].astype(float)
    cut_fine = crop_image(fine[:, :, None], (84, 84), draw)[:, 0, 0].astype(float)
    assert np.abs(cut_fine.reshape(21, 4).mean(axis=1) - cut).max() <= 0.625


def slow_jitter(image_HWC: np.ndarray, draw: ImageDraw) -> np.ndarray:
    """Brightness, contrast, saturation one after the other, pixel by pixel, in float64 and without clamping."""
    x = image_HWC / 255 * draw.brightness
    weights = np.array(GREY) if x.shape[2] == 3 else np.ones(1)
    x = draw.contrast * x + (1 - draw.contrast) * (x @ weights).mean()
    if x.shape[2] == 3:
        x = draw.saturation * x + (1 - draw.saturation) * (x @ weights)[:, :, None]
    return x


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_what_the_slow_form_says(channels: int):
    image = np.random.default_rng(0).integers(0, 256, size=(9, 7, channels), dtype=np.uint8)
    transform = image_transform((9, 7, channels))
    for draw in image_draws(AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4), keys[:20]):
        whole = ImageDraw(0.5, 0.5, False, False, draw.brightness, draw.contrast, draw.saturation, 0.0)
        expected = (np.clip(slow_jitter(image, whole), 0, 1) - 0.5) / 0.5
        np.testing.assert_allclose(transform.image("x", image, whole).transpose(1, 2, 0), expected, atol=2e-6)


def test_hue_turns_colours_and_keeps_greys_and_luma():
    draw = ImageDraw(0.5, 0.5, hflip=False, vflip=False, brightness=1, contrast=1, saturation=1, hue=1 / 3)
    matrix, offset = jitter_matrix(draw, 3, 0.5)
    assert offset == 0
    np.testing.assert_allclose(matrix @ np.full(3, 0.4), np.full(3, 0.4), atol=1e-5)
    colour = np.array([0.6, 0.4, 0.3])
    assert np.array(GREY) @ (matrix @ colour) == pytest.approx(np.array(GREY) @ colour, abs=1e-5)
    assert np.abs(matrix @ colour - colour).max() > 0.05
    np.testing.assert_allclose(np.linalg.matrix_power(matrix, 3), np.eye(3), atol=1e-5)


def test_an_image_without_changes_is_only_normalised():
    image = np.random.default_rng(0).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)
    made = image_transform((6, 5, 3)).image("x", image)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made.transpose(1, 2, 0), image / 127.5 - 1, atol=1e-6)


def test_noise_is_normal_with_the_asked_deviation():
    noise = vary_vectors(np.zeros((4000, 25), np.float32), AugmentConfig(vector_noise=0.5), "gene", keys)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(0.5, abs=0.01)
    assert (np.abs(noise) < 0.5).mean() == pytest.approx(0.6827, abs=0.01)


def test_dropout_leaves_the_mean_in_place_of_values():
    kept = vary_vectors(np.ones((4000, 25), np.float32), AugmentConfig(vector_dropout=0.2), "gene", keys)
    assert set(np.unique(kept)) == {0, 1}
    assert kept.mean() == pytest.approx(0.8, abs=0.01)


def test_a_vectors_change_depends_on_its_own_key_and_modality():
    vectors = np.random.default_rng(0).normal(size=(9, 33)).astype(np.float32)
    together = vary_vectors(vectors, ALL, "gene", keys[:9])
    for i in range(9):
        np.testing.assert_array_equal(vary_vectors(vectors[i : i + 1], ALL, "gene", keys[i : i + 1])[0], together[i])
    assert (vary_vectors(vectors, ALL, "other", keys[:9]) != together).any()
