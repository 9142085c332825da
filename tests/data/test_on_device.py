"""Images made on the device: what the host makes of the same keys, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distkd.base import Batch
from distkd.data.augment import CENTRE, AugmentConfig, image_draws
from distkd.data.dataset import DataConfig, Dataset
from distkd.data.degrade import DegradedConfig
from distkd.data.manifest import Modality
from distkd.data.on_device import PendingImages, StoredImages
from distkd.data.shardset import ShardSet
from distkd.data.splits import patient_folds
from distkd.data.transform import Preprocess, fit_degraded, fit_image
from distkd.data.write import ShardWriter
from distkd.errors import DataError
from tests.data.test_unreadable import damage
from tests.data.toy import DESCRIPTION, toy_arrays, write_toy

CPU = torch.device("cpu")
N, STD = 32, 0.3

CARD: dict[str, Any] = {
    "hflip": 0.5, "rotation": 45, "scale": (0.95, 1.2), "shift": (0.05, 0.0), "affine_probability": 0.5,
    "warps": "successive", "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "jitter_probability": 0.5,
    "jitter_order": "random",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flips": {"hflip": 0.5, "vflip": 0.5},
    "card": CARD,
    "composed": {**CARD, "warps": "composed", "vflip": 0.5, "shift": (0.2, 0.3), "rotation": 180},
    "all of them": {"rotation": 20, "scale": (0.5, 0.8), "shift": (0.2, 0.3), "warps": "successive"},
    "colour": {"brightness": 0.5, "contrast": 0.9, "saturation": 0.9, "hue": 0.5},
    "colour in turn": {"brightness": 0.5, "contrast": 0.9, "saturation": 0.9, "hue": 0.5, "jitter_order": "random"},
    "some colour": {"contrast": 0.5, "jitter_probability": 0.3, "hflip": 0.5},
}
STORED = {
    "uint8 colour": ("uint8", 3, 0, 255),
    "uint8 grey": ("uint8", 1, 0, 255),
    "uint16": ("uint16", 3, 0, 65535),
    "outside of 0..1": ("float32", 3, -0.5, 1.5),
    "two channels": ("float64", 2, 0, 1),
}


def images(dtype: str = "uint8", channels: int = 3, low: float = 0, high: float = 255) -> np.ndarray:
    values = np.random.default_rng(0).uniform(low, high, size=(N, 16, 24, channels))
    return values.astype(dtype)


def preprocess(pixel_BHWC: np.ndarray, crop: float = 1.0) -> Preprocess:
    """A sharp image and coarse copies of it, large and small."""
    shape = pixel_BHWC.shape[1:]
    modality = Modality(kind="image", dtype=pixel_BHWC.dtype.name, shape=shape, codec="npy")  # pyright: ignore[reportArgumentType]
    image = fit_image(modality, name="sharp", crop=crop, mean=(0.4,), std=(STD,))
    inputs: dict[str, Any] = {"sharp": image}
    for name, factor, restore in (("large", 4, True), ("small", 2, False), ("same", 1, True)):
        config = DegradedConfig(of="sharp", factor=factor, restore=restore)
        inputs[name] = fit_degraded(config, name=name, image=image)
    return Preprocess(inputs)


def on_device(
    transform: Preprocess, pixel_BHWC: np.ndarray, draws: list[Any], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    names, place_B = list(transform.inputs), np.arange(len(pixel_BHWC))
    (view,) = StoredImages.of(transform, names, pixel_BHWC, place_B, [draws]).make(CPU, dtype)
    assert {x.dtype for x in view.values()} == {dtype}
    return view


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("crop", [1.0, 8])
def test_it_is_what_the_host_makes(config: str, stored: str, crop: float):
    raw = images(*STORED[stored])
    transform = preprocess(raw, crop)
    draws = image_draws(AugmentConfig.model_validate(CONFIGS[config]), torch.arange(N))
    made, exact = (on_device(transform, raw, draws, dtype) for dtype in (torch.float32, torch.float64))
    host = [transform.images(list(transform.inputs), image, draw) for image, draw in zip(raw, draws, strict=True)]
    for name in transform.inputs:
        expected = np.stack([of_sample[name] for of_sample in host])
        # a share of 0..1: normalised values are larger by 1 / STD
        np.testing.assert_allclose(made[name].numpy() * STD, expected * STD, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(exact[name].numpy() * STD, expected * STD, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("config", ["nothing", "flips"])
@pytest.mark.parametrize("crop", [1.0, 8])
def test_what_is_only_cut_and_mirrored_has_the_hosts_bits(config: str, crop: float):
    raw = images()
    transform = preprocess(raw, crop)
    for draws in (image_draws(AugmentConfig.model_validate(CONFIGS[config]), torch.arange(N)), [CENTRE] * N):
        expected = np.stack([transform.image("sharp", image, draw) for image, draw in zip(raw, draws, strict=True)])
        np.testing.assert_array_equal(on_device(transform, raw, draws)["sharp"].numpy(), expected)


def test_a_larger_image_differs_by_rounding_alone():
    """Places between pixels are rounded to float32 on either side, the coarser the larger the image."""
    raw = np.random.default_rng(1).integers(0, 256, size=(2, 256, 192, 3), dtype=np.uint8)
    transform = preprocess(raw)
    draws = image_draws(AugmentConfig.model_validate({**CARD, "affine_probability": 1}), torch.arange(2))
    exact = on_device(transform, raw, draws, torch.float64)
    single = on_device(transform, raw, draws)
    for place, draw in enumerate(draws):
        host = transform.images(list(transform.inputs), raw[place], draw)
        for name in transform.inputs:
            for found in (single[name][place], torch.as_tensor(host[name])):
                torch.testing.assert_close(found.double(), exact[name][place], atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_sample_is_the_same_in_any_batch(config: str):
    raw = images()
    transform = preprocess(raw)
    draws = image_draws(AugmentConfig.model_validate(CONFIGS[config]), torch.arange(N))
    whole = on_device(transform, raw, draws, torch.float64)
    for rows in (slice(0, 1), slice(7, 8), slice(20, 31)):
        part = on_device(transform, raw[rows], draws[rows], torch.float64)
        for name, made in part.items():
            torch.testing.assert_close(made, whole[name][rows], atol=1e-12, rtol=0)


def test_stored_pixels_are_left_as_they_are():
    raw = images("float32", 1, 0, 1)
    before = raw.copy()
    for draws in ([CENTRE] * N, image_draws(AugmentConfig.model_validate(CARD), torch.arange(N))):
        on_device(preprocess(raw), raw, draws)
    np.testing.assert_array_equal(raw, before)


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Every fourth sample without the coarse image, every third without a vector."""
    folder = tmp_path_factory.mktemp("gaps") / "shards"
    with ShardWriter(folder, DESCRIPTION, shard_bytes=60_000) as writer:
        for number in range(24):
            arrays = toy_arrays(number)
            if number % 4 == 1:
                del arrays["coarse"]
            writer.add(f"s-{number:03d}", arrays, patient=f"p{number}", label=number % 2)
        folds = patient_folds(writer.patients, writer.labels, n_folds=3, val_share=0.25, seed=1)
        writer.split(folds, rule="by patient", seed=1)
    return ShardSet(folder)


AUGMENT: dict[str, Any] = {**CARD, "crop": {"slide": 8}, "vector_noise": 0.1}
DEGRADED = {"pooled": {"of": "slide", "factor": 4}, "tiny": {"of": "slide", "factor": 2, "restore": False}}


def dataset(shard_set: ShardSet, where: str, modalities: tuple[str, ...] = (), **config: Any) -> Dataset:
    content = {"views": 2, "augment": AUGMENT, "degraded": DEGRADED, "transform_on": where, **config}
    names = modalities or ("tiny", "gene", "pooled", "slide", "coarse")
    return Dataset(shard_set, DataConfig.model_validate(content), names, seed=3)


def assert_alike(found: Batch, expected: Batch) -> None:
    assert len(found.views) == len(expected.views)
    for view, expected_view in zip(found.views, expected.views, strict=True):
        assert list(view) == list(expected_view)
        for name, values in view.items():
            torch.testing.assert_close(values, expected_view[name], atol=3e-5, rtol=0)
            assert values.is_contiguous()
            assert (values[~found.present[name]] == 0).all()
    for field in ("label_B", "index_B", "sample_B", "key_B"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("change", [{}, {"threads": 0}, {"cache_mib": 0}])
def test_a_batch_that_has_moved_is_the_hosts(gaps: ShardSet, train: bool, change: dict[str, Any]):
    host, device = dataset(gaps, "host"), dataset(gaps, "device", **change)
    for epoch in range(2):  # the second comes from the cache
        given = device.batch(range(12), epoch=epoch, train=train)
        moved, expected = given.to(CPU, torch.float32), host.batch(range(12), epoch=epoch, train=train)
        assert_alike(moved, expected)
        assert not moved.present["coarse"].all()
        assert list(given.inputs) == ["gene"]
        assert given.present.keys() == expected.present.keys()
        assert moved.to(CPU, torch.float32) is moved
        assert moved.to(CPU, torch.float64).inputs["slide"].dtype == torch.float64


def test_a_stored_image_travels_once_and_as_it_is(gaps: ShardSet):
    pending = dataset(gaps, "device").batch(range(12), epoch=0, train=True).pending
    assert isinstance(pending, PendingImages)
    slide, coarse = pending.modalities
    assert (slide.pixel_PHWC.shape, coarse.pixel_PHWC.shape) == ((12, 12, 10, 3), (9, 6, 5, 1))
    assert slide.pixel_PHWC.dtype == coarse.pixel_PHWC.dtype == np.uint8
    ((inputs, numbers),) = slide.inputs
    assert (list(inputs), len(numbers)) == (["tiny", "pooled", "slide"], 2)


def test_a_batch_without_the_image_has_zeros(gaps: ShardSet):
    made = dataset(gaps, "device").batch([1, 5], epoch=0, train=True).to(CPU, torch.float64)
    assert not made.present["coarse"].any()
    for view in made.views:
        assert torch.equal(view["coarse"], torch.zeros(2, 1, 6, 5, dtype=torch.float64))
        assert view["slide"].abs().sum() > 0


def test_what_is_no_image_stays_on_the_host(gaps: ShardSet):
    host, device = (dataset(gaps, where, ("gene",)).batch([0, 1], epoch=0, train=True) for where in ("host", "device"))
    assert device.pending is None
    assert_alike(device, host)


def test_a_batch_is_looked_at_after_it_has_moved(gaps: ShardSet):
    batch = dataset(gaps, "device").batch([0, 1], epoch=0, train=True)
    moved = batch.to(CPU, torch.float32)
    assert torch.equal(moved.view(1).inputs["slide"], moved.views[1]["slide"])
    with pytest.raises(AssertionError, match="views are complete after `to`"):
        batch.view(1)


def test_damaged_samples_are_replaced_alike(tmp_path: Path):
    write_toy(tmp_path / "shards")
    numbers = dataset(ShardSet(tmp_path / "shards"), "host").split_samples("train")
    damage(tmp_path / "shards", f"s-{numbers[1]:03d}")
    batches = [
        dataset(ShardSet(tmp_path / "shards"), where, on_error="skip", max_skipped=0.1).batch(
            numbers[:4], epoch=0, train=True, spare=lambda place, attempt: int(numbers[4 + place + attempt])
        )
        for where in ("host", "device")
    ]
    assert batches[0].sample_B.tolist() == [numbers[0], numbers[6], *numbers[2:4]]
    assert_alike(batches[1].to(CPU, torch.float32), batches[0])


def test_images_that_do_not_fit_are_refused():
    raw = images()
    transform = preprocess(raw)
    np.testing.assert_array_equal(transform.checked(["sharp", "large"], raw[0]), raw[0])
    with pytest.raises(DataError, match=r"'sharp' is uint8 of shape \(5, 24, 3\), expected an image of shape"):
        transform.checked(["sharp", "large"], raw[0, :5])
    flat = images("float32", 1, 0, 1)
    assert preprocess(flat).checked(["small"], flat[0, :, :, 0]).shape == (16, 24, 1)
    flat[0, 2, 3] = np.nan
    with pytest.raises(DataError, match="'small' holds values that are not finite; mend the image"):
        preprocess(flat).checked(["small"], flat[0])


def test_another_place_is_refused():
    with pytest.raises(ValidationError, match="transform_on"):
        DataConfig.model_validate({"transform_on": "gpu"})
