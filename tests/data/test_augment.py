"""Augmentation: a function of the key, the same geometry for all images of a sample, colours as a slow form says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    jitter_steps,
    normal_noise,
    vary_vectors,
    warp_image,
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


@pytest.mark.parametrize(
    "bad",
    [
        {"hflip": 1.5},
        {"crop": 0},
        {"brightness": -0.1},
        {"hue": 0.6},
        {"blur": 1},
        {"rotation": 181},
        {"scale": [0, 1]},
        {"scale": [1.2, 0.9]},
        {"shift": [1, 0]},
        {"affine_probability": 2},
        {"jitter_probability": -1},
        {"jitter_order": "batch"},
        {"warps": "twice"},
    ],
)
def test_amounts_out_of_range_are_refused(bad: dict[str, Any]):
    with pytest.raises(ValidationError, match=next(iter(bad))):
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


WARPS = AugmentConfig(rotation=45, scale=(0.95, 1.2), shift=(0.05, 0.1), affine_probability=0.5)
still = {"top": 0.5, "left": 0.5, "hflip": False, "vflip": False}
plain = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


def still_draw(**changes: Any) -> ImageDraw:
    return ImageDraw(**{**still, **plain, **changes})


def test_new_changes_move_no_draw_of_the_old_ones():
    config = ALL.model_copy(update={"rotation": 30.0, "jitter_order": "random", "scale": (0.5, 2.0)})
    names = ["top", "left", "hflip", "vflip", "brightness", "contrast", "saturation", "hue"]
    for old, new in zip(image_draws(ALL, keys[:20]), image_draws(config, keys[:20]), strict=True):
        assert [getattr(old, name) for name in names] == [getattr(new, name) for name in names]
        assert not old.warps
        assert new.warps


def test_each_warp_comes_as_often_as_asked_and_by_itself():
    draws = image_draws(WARPS, keys)
    turned = np.array([[draw.angle != 0, draw.scale != 1, draw.shift != (0, 0)] for draw in draws])
    np.testing.assert_allclose(turned.mean(axis=0), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(turned.T) - np.eye(3), 0, atol=0.06)
    angle, scale = np.array([draw.angle for draw in draws]), np.array([draw.scale for draw in draws])
    assert (angle.min(), angle.max()) == (pytest.approx(-45, abs=0.2), pytest.approx(45, abs=0.2))
    assert (scale.min(), scale.max()) == (pytest.approx(0.95, abs=0.01), pytest.approx(1.2, abs=0.01))
    shift = np.array([draw.shift for draw in draws])
    np.testing.assert_allclose(np.abs(shift).max(axis=0), [0.05, 0.1], atol=0.002)


def reference_warp(image_HWC: np.ndarray, draw: ImageDraw) -> np.ndarray:
    """Of a square image: torch's grid and sampler in float64, normalised coordinates throughout."""
    angle, x, y = np.deg2rad(draw.angle), 2 * draw.shift[0], 2 * draw.shift[1]
    steps = {
        "flip": np.diag([-1.0 if draw.hflip else 1.0, -1.0 if draw.vflip else 1.0, 1]),
        "turn": np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]]),
        "scale": np.diag([1 / draw.scale, 1 / draw.scale, 1]),
        "shift": np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1]]),
    }
    whole = steps["flip"] @ steps["turn"] @ steps["scale"] @ steps["shift"]
    made = torch.as_tensor(image_HWC.transpose(2, 0, 1).astype(np.float64))[None]
    for step in steps.values() if draw.successive else [whole]:
        grid = F.affine_grid(torch.as_tensor(step[:2])[None], list(made.shape), align_corners=False)
        made = F.grid_sample(made, grid, align_corners=False)
    return made[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("warps", ["composed", "successive"])
def test_warps_are_what_affine_grid_and_grid_sample_say(warps: str):
    image = np.random.default_rng(0).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    config = WARPS.model_copy(update={"warps": warps, "hflip": 0.5, "vflip": 0.5})
    draws = [draw for draw in image_draws(config, keys[:30]) if draw.warps]
    for draw in draws:
        # 256 grey values, and a step between two of them is sampled to 1e-6 pixels
        np.testing.assert_allclose(warp_image(image, (16, 16), draw), reference_warp(image, draw), atol=2e-2)
    assert len(draws) > 20


def test_one_warp_alone_is_the_same_composed_or_successive_and_all_three_are_not():
    image = np.random.default_rng(0).integers(0, 256, size=(16, 12, 1), dtype=np.uint8)
    for alone in ({"angle": 20.0}, {"scale": 1.1}, {"shift": (0.1, -0.05)}):
        one, other = (warp_image(image, (16, 12), still_draw(successive=s, **alone)) for s in (False, True))
        np.testing.assert_allclose(one, other, atol=1e-3)
    both = {"angle": 20.0, "scale": 1.1, "shift": (0.1, -0.05)}
    one, other = (warp_image(image, (16, 12), still_draw(successive=s, **both)) for s in (False, True))
    assert np.abs(one - other).max() > 5


def test_a_quarter_turn_of_an_oblong_image_keeps_its_pixels_square():
    image = np.zeros((9, 15, 1), np.uint8)
    image[4, 4:11] = 200  # a bar along x
    made = warp_image(image, (9, 15), still_draw(angle=90.0))
    expected = np.zeros((9, 15, 1))
    expected[1:8, 7] = 200
    np.testing.assert_allclose(made, expected, atol=0.01)


def test_a_shift_moves_to_the_right_and_down_and_leaves_zeros():
    image = np.random.default_rng(0).integers(1, 256, size=(8, 10, 2), dtype=np.uint8)
    made = warp_image(image, (8, 10), still_draw(shift=(0.2, 0.25)))
    np.testing.assert_allclose(made[2:, 2:], image[:-2, :-2], atol=1e-3)
    assert not made[:2].any()
    assert not made[:, :2].any()


def test_a_warped_crop_goes_on_where_the_image_does():
    image = np.random.default_rng(0).integers(1, 256, size=(20, 20, 1), dtype=np.uint8)
    moved = {"shift": (0.25, 0.0), "top": 0.5, "left": 0.5}
    made = warp_image(image, (8, 8), still_draw(**moved))
    np.testing.assert_allclose(made, image[6:14, 4:12], atol=1e-3)
    flipped = warp_image(image, (8, 8), still_draw(hflip=True, **moved))
    np.testing.assert_allclose(flipped, image[6:14, 8:16][:, ::-1], atol=1e-3)
    assert not warp_image(image, (8, 8), still_draw(successive=True, **moved))[:, :2].any()


def test_a_draw_without_warps_is_the_crop():
    image = np.random.default_rng(0).integers(0, 256, size=(9, 8, 3), dtype=np.uint8)
    draw = still_draw(top=0.2, left=0.9, hflip=True, vflip=True)
    np.testing.assert_allclose(warp_image(image, (5, 4), draw), crop_image(image, (5, 4), draw), atol=1e-3)


def test_coarse_and_fine_images_are_warped_alike():
    coarse = np.random.default_rng(0).integers(0, 256, size=(12, 12, 1), dtype=np.uint8)
    fine = coarse.repeat(4, axis=0).repeat(4, axis=1)
    draw = still_draw(angle=30.0, scale=1.1, shift=(0.1, 0.05))
    made = warp_image(fine, (48, 48), draw).reshape(12, 4, 12, 4, 1).mean(axis=(1, 3))
    assert np.abs(made - warp_image(coarse, (12, 12), draw)).mean() < 12
    assert np.abs(made - coarse).mean() > 60


def test_warped_and_jittered_images_have_the_same_bits_in_any_thread():
    image = np.random.default_rng(0).integers(0, 256, size=(130, 137, 3), dtype=np.uint8)
    transform = image_transform((130, 137, 3), 0.9)
    config = WARPS.model_copy(update={"brightness": 0.2, "contrast": 0.2, "jitter_order": "random"})
    draws = image_draws(config, keys[:6])
    n_threads, alone = torch.get_num_threads(), [transform.image("x", image, draw) for draw in draws]
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda draw: transform.image("x", image, draw), draws[::-1]))[::-1]
    finally:
        torch.set_num_threads(n_threads)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_jitter_is_left_out_as_often_as_asked():
    config = AugmentConfig(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1, jitter_probability=0.5)
    draws = image_draws(config, keys)
    assert np.mean([draw.jitters for draw in draws]) == pytest.approx(0.5, abs=0.03)
    assert {draw.brightness == 1 for draw in draws if not draw.jitters} == {True}


def test_orders_of_the_jitter_are_drawn_evenly_and_hue_is_last():
    draws = image_draws(AugmentConfig(jitter_order="random"), keys)
    orders, counts = np.unique([draw.order for draw in draws], axis=0, return_counts=True)
    assert len(orders) == 6
    assert set(orders[:, 3]) == {"hue"}
    np.testing.assert_allclose(counts / len(draws), 1 / 6, atol=0.025)
    assert {draw.order for draw in image_draws(AugmentConfig(), keys[:20])} == {()}


def test_jitter_in_an_order_is_clamped_after_each_step():
    image = np.random.default_rng(0).integers(0, 256, size=(9, 7, 3), dtype=np.uint8)
    transform = image_transform((9, 7, 3))
    config = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5, jitter_order="random")
    for draw in image_draws(config, keys[:20]):
        x = image / 255
        for step in jitter_steps(draw):
            x = np.clip(slow_jitter(x * 255, step), 0, 1)
        whole = still_draw(**{name: getattr(draw, name) for name in plain}, order=draw.order)
        np.testing.assert_allclose(transform.image("x", image, whole).transpose(1, 2, 0), 2 * x - 1, atol=4e-6)


def test_without_clamping_the_order_of_the_jitter_makes_no_difference():
    image = np.random.default_rng(0).integers(100, 150, size=(9, 7, 3), dtype=np.uint8)
    transform = image_transform((9, 7, 3))
    factors = {"brightness": 1.1, "contrast": 0.9, "saturation": 1.2}
    at_once = transform.image("x", image, still_draw(**factors))
    for order in (("contrast", "saturation", "brightness", "hue"), ("saturation", "brightness", "contrast", "hue")):
        in_order = transform.image("x", image, still_draw(**factors, order=order))
        np.testing.assert_allclose(in_order, at_once, atol=2e-6)


def test_normal_noise_is_normal_and_a_prefix_of_more():
    noise = normal_noise(torch.tensor(5), 100_001)
    assert noise.dtype == np.float32
    assert (noise.mean(), noise.std()) == (pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))
    assert (np.abs(noise) < 1).mean() == pytest.approx(0.6827, abs=0.01)
    np.testing.assert_array_equal(normal_noise(torch.tensor([5]), 33), noise[:33])
    assert (normal_noise(torch.tensor(6), 33) != noise[:33]).any()
