"""Degraded copies: the card's numbers, the same bits with any threads, the same after a trip through an export."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from distkd.base import InputSpec
from distkd.data.augment import AugmentConfig, image_draws
from distkd.data.degrade import DegradedConfig, degrade
from distkd.data.manifest import Modality
from distkd.data.transform import DegradedInput, Preprocess, fit_degraded, fit_image
from distkd.errors import CheckpointError, ConfigError, DataError
from tests.golden_numbers import golden

IMAGE = Modality(kind="image", dtype="uint8", shape=(16, 24, 3), codec="png")
raw = np.random.default_rng(0).integers(0, 256, size=(16, 24, 3), dtype=np.uint8)


def preprocess(factor: int = 4, *, restore: bool = True, crop: float = 1.0) -> Preprocess:
    image = fit_image(IMAGE, name="sharp", crop=crop, mean=(0.5, 0.4, 0.3), std=(0.2,))
    config = DegradedConfig(of="sharp", factor=factor, restore=restore)
    return Preprocess({"sharp": image, "coarse": fit_degraded(config, name="coarse", image=image)})


def test_the_cards_numbers():
    card = golden("inter-resolution-at-plus")["image_degradation"]
    image = np.array(card["image_8x8"])[None]
    small = degrade(image, card["factor"], restore=False)
    np.testing.assert_allclose(small[0], card["pooled_2x2"], rtol=0, atol=1e-15)
    back = degrade(image, card["factor"], restore=True)
    assert back.dtype == np.float64
    np.testing.assert_allclose(back[0], card["upsampled_8x8"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("restore", [True, False])
def test_it_is_torchs_pool_and_interpolation(factor: int, restore: bool):
    image = np.random.default_rng(1).random((3, 16, 24), dtype=np.float32)
    expected = F.avg_pool2d(torch.tensor(image)[None], factor)
    if restore:
        expected = F.interpolate(expected, size=(16, 24), mode="bilinear", align_corners=True)
    made = degrade(image, factor, restore=restore)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected[0].numpy(), atol=2e-6)


def test_bits_do_not_depend_on_the_number_of_threads():
    image = np.random.default_rng(1).random((3, 500, 508), dtype=np.float32)
    n_threads, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(degrade(image, 4, restore=True))
    finally:
        torch.set_num_threads(n_threads)
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


def test_values_may_be_normalised_before_or_after():
    image = np.random.default_rng(1).random((3, 16, 24), dtype=np.float32)
    one, other = degrade((image - 0.3) / 0.2, 4, restore=True), (degrade(image, 4, restore=True) - 0.3) / 0.2
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("restore", [True, False])
def test_sharp_and_coarse_are_made_of_one_image_after_the_same_changes(restore: bool):
    transform = preprocess(restore=restore, crop=8)
    config = AugmentConfig(hflip=0.5, crop=8, brightness=0.2, rotation=20)
    for draw in image_draws(config, torch.arange(8)):
        both = transform.images(["sharp", "coarse"], raw, draw)
        np.testing.assert_array_equal(both["sharp"], transform.image("sharp", raw, draw))
        np.testing.assert_array_equal(both["coarse"], transform.image("coarse", raw, draw))
        np.testing.assert_array_equal(both["coarse"], degrade(both["sharp"], 4, restore=restore))
        assert both["coarse"].shape == transform.specs["coarse"].shape


def test_it_says_what_the_model_receives():
    assert preprocess().specs["coarse"] == InputSpec("image", (3, 16, 24))
    assert preprocess(restore=False).specs["coarse"] == InputSpec("image", (3, 4, 6))
    assert preprocess(2, restore=False, crop=8).specs["coarse"] == InputSpec("image", (3, 4, 4))
    looks = preprocess(restore=False).inputs["coarse"].looks
    assert looks.startswith("3 x 4 x 6 of 3 x 16 x 24 image with mean [0.5, 0.4, 0.3]")
    assert looks.endswith("averaged by 4")


def test_an_exported_student_degrades_raw_images_by_itself():
    before = preprocess().only(["coarse"])
    after = Preprocess.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.inputs == before.inputs
    assert isinstance(after.inputs["coarse"], DegradedInput)
    assert after.source("coarse") == "sharp"
    expected = preprocess().image("coarse", raw)
    np.testing.assert_array_equal(after.apply({"coarse": raw})["coarse"], expected)
    np.testing.assert_array_equal(after.apply({"sharp": raw})["coarse"], expected)
    assert list(after.apply({"sharp": raw})) == ["coarse"]
    assert list(preprocess().apply({"sharp": raw})) == ["sharp", "coarse"]


@pytest.mark.parametrize("restore", [True, False])
def test_an_image_that_was_scanned_coarsely_is_taken_as_it_is(restore: bool):
    transform = preprocess(restore=restore)
    blocks = raw.reshape(4, 4, 6, 4, 3).mean(axis=(1, 3))
    scanned = np.rint(blocks).astype(np.uint8)
    made, expected = (transform.image("coarse", image) for image in (scanned, raw))
    # whole grey values instead of means: half a step of 1 / 255, in standard deviations
    np.testing.assert_allclose(made, expected, atol=0.5 / 255 / 0.2 + 1e-5)


def test_a_factor_that_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"data\.degraded\.coarse\.factor=5 does not divide 'sharp' of 16 x 24 px; .* 15 x 20, or use another",
    ):
        preprocess(5)
    with pytest.raises(ValidationError, match="factor"):
        DegradedConfig(of="sharp", factor=0)
    with pytest.raises(ValidationError, match="of"):
        DegradedConfig(of="../sharp", factor=2)


def test_raw_images_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"'coarse' is uint8 of shape \(5, 6, 3\), expected an image of shape"):
        preprocess().apply({"coarse": raw[:5, :6]})
    with pytest.raises(DataError, match="no preprocessing for modality 'other'"):
        preprocess().apply({"sharp": raw, "other": raw})
    content = preprocess().to_dict()
    del content["coarse"]["image"]
    with pytest.raises(CheckpointError, match=r"coarse\.degraded\.image: field required"):
        Preprocess.from_dict(content)
