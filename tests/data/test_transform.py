"""The transform: fitted on training samples, the same after a trip through JSON, strict about what it is given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distkd.base import InputSpec
from distkd.data.augment import AugmentConfig
from distkd.data.fitted import infinite_rows
from distkd.data.manifest import Modality
from distkd.data.transform import ImageInput, InfiniteRowsError, Preprocess, VectorInput, fit_image, fit_vector
from distkd.errors import CheckpointError, ConfigError, DataError

NAN = float("nan")
IMAGE = Modality(kind="image", dtype="uint8", shape=(8, 6, 3), codec="png")


def preprocess() -> Preprocess:
    vectors = np.array([[1, 5, NAN], [2, 5, 4], [6, 5, 8]], dtype=np.float32)
    image = fit_image(IMAGE, name="slide", crop=0.5, mean=(0.5, 0.4, 0.3), std=(0.2,))
    return Preprocess({"gene": fit_vector(vectors, ["a", "b", "c"]), "slide": image})


def test_gaps_take_the_median_and_columns_are_standardised():
    fitted = fit_vector(np.array([[1, 5, NAN], [2, 5, 4], [6, 5, 8]]))
    assert fitted.median == [2, 5, 6]
    assert fitted.mean == [3, 5, 6]
    assert fitted.std == pytest.approx([np.sqrt(14 / 3), 1, np.sqrt(8 / 3)])
    made = Preprocess({"x": fitted}).apply({"x": np.array([3, 7, NAN])})["x"]
    assert made.tolist() == pytest.approx([0, 2, 0])


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=st.floats(-1e6, 1e6)))
def test_training_vectors_have_mean_zero_and_deviation_one(values: np.ndarray):
    fitted = fit_vector(values)
    made = Preprocess({"x": fitted}).vectors("x", values)
    assert np.isfinite(made).all()
    assert all(std == 1 for std, same in zip(fitted.std, (values == values[0]).all(axis=0), strict=True) if same)
    wide = values.std(axis=0) > 1e-6 * np.maximum(np.abs(values).max(axis=0), 1e-20)
    np.testing.assert_allclose(made.mean(axis=0)[wide], 0, atol=1e-4)
    np.testing.assert_allclose(made.std(axis=0)[wide], 1, atol=1e-4)


def test_a_column_without_any_value_becomes_zero():
    fitted = fit_vector(np.array([[NAN, 1.0], [NAN, 3.0]]))
    assert (fitted.median[0], fitted.mean[0], fitted.std[0]) == (0, 0, 1)
    assert Preprocess({"x": fitted}).apply({"x": np.array([NAN, 2.0])})["x"].tolist() == [0, 0]


def test_a_trip_through_json_changes_nothing():
    before = preprocess()
    after = Preprocess.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
    assert after.inputs == before.inputs
    draws = np.random.default_rng(0)
    raw = {
        "gene": draws.normal(size=3).astype(np.float32),
        "slide": draws.integers(0, 256, size=(8, 6, 3), dtype=np.uint8),
    }
    for name, values in before.apply(raw).items():
        np.testing.assert_array_equal(after.apply(raw)[name], values)


def test_a_damaged_export_is_named():
    with pytest.raises(
        CheckpointError, match=r"preprocessing of the export is damaged: gene\.vector\.std: field required"
    ):
        Preprocess.from_dict({"gene": {"kind": "vector", "median": [], "mean": []}})


def test_it_says_what_the_model_receives():
    assert preprocess().specs == {"gene": InputSpec("vector", (3,)), "slide": InputSpec("image", (3, 4, 3))}
    assert list(preprocess().only(["slide"]).specs) == ["slide"]
    with pytest.raises(DataError, match=r"no preprocessing for modality 'genes'; did you mean 'gene'\?"):
        preprocess().only(["genes"])


def test_it_says_in_words_what_a_model_sees():
    looks = {name: fitted.looks for name, fitted in preprocess().inputs.items()}
    assert looks == {
        "gene": "3 vector",
        "slide": "3 x 4 x 3 image with mean [0.5, 0.4, 0.3] and std [0.2, 0.2, 0.2]",
    }


def test_a_stored_float_image_is_not_written_into():
    modality = Modality(kind="image", dtype="float32", shape=(2, 2, 1), codec="npy")
    raw = np.full((2, 2, 1), 3.0, np.float32)
    raw.flags.writeable = False
    made = Preprocess({"x": fit_image(modality, name="x", crop=1, mean=(1.0,), std=(2.0,))}).image("x", raw)
    assert (made.item(0), raw.item(0)) == (1, 3)


def test_images_are_cropped_scaled_and_normalised_by_channel():
    image = np.random.default_rng(1).integers(0, 256, size=(8, 6, 3), dtype=np.uint8)
    made = preprocess().apply({"slide": image})["slide"]
    # the centre of 8 x 6 cut to 4 x 3: an odd rest rounds up
    expected = (image[2:6, 2:5] / 255 - [0.5, 0.4, 0.3]) / 0.2
    np.testing.assert_allclose(made.transpose(1, 2, 0), expected, atol=1e-6)


def test_a_grey_image_may_come_without_its_channel():
    grey = fit_image(IMAGE.model_copy(update={"shape": (8, 6, 1)}), name="x", crop=1, mean=(0.5,), std=(0.5,))
    image = np.zeros((8, 6), np.uint8)
    assert Preprocess({"x": grey}).apply({"x": image})["x"].shape == (1, 8, 6)


def test_float_images_are_taken_as_they_are():
    modality = Modality(kind="image", dtype="float32", shape=(2, 2, 1), codec="npy")
    fitted = fit_image(modality, name="x", crop=1, mean=(0.0,), std=(2.0,))
    made = Preprocess({"x": fitted}).apply({"x": np.full((2, 2, 1), 3.0, np.float32)})
    assert made["x"].tolist() == [[[1.5, 1.5], [1.5, 1.5]]]


def test_a_view_with_a_key_is_augmented_and_reproducible():
    augment = AugmentConfig(hflip=0.5, brightness=0.5, vector_noise=1)
    raw = {"gene": np.zeros(3, np.float32), "slide": np.full((8, 6, 3), 90, np.uint8)}
    one = preprocess().apply(raw, augment=augment, key_B=torch.tensor([5]))
    again = preprocess().apply(raw, augment=augment, key_B=torch.tensor([5]))
    other = preprocess().apply(raw, augment=augment, key_B=torch.tensor([6]))
    for name in raw:
        np.testing.assert_array_equal(one[name], again[name])
        assert (one[name] != other[name]).any()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("gene", np.zeros(4), r"'gene' has float64 values of shape \(4,\), expected numbers of shape \(3,\)"),
        ("gene", np.array(["a", "b", "c"]), "'gene' has <U1 values"),
        ("gene", np.array([0, np.inf, 0]), r"'gene' holds infinite values; leave a value out \(NaN\)"),
        (
            "slide",
            np.zeros((8, 8, 3), np.uint8),
            r"'slide' is uint8 of shape \(8, 8, 3\), expected an image of shape \(8, 6, 3\)",
        ),
        ("slide", np.full((8, 6, 3), NAN), "'slide' holds values that are not finite"),
        ("sound", np.zeros(1), "no preprocessing for modality 'sound'; available: gene, slide"),
    ],
)
def test_input_that_does_not_fit_is_refused(name: str, values: np.ndarray, words: str):
    with pytest.raises(DataError, match=words):
        preprocess().apply({name: values})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_with_infinite_values_are_told_and_nothing_is_warned_of(dtype: type):
    vectors = np.array([[1, 2, 3], [4, -np.inf, 6], [7, NAN, 9], [np.inf, np.inf, 0]], dtype=dtype)
    for call in (lambda: fit_vector(vectors), lambda: preprocess().vectors("gene", vectors)):
        with pytest.raises(InfiniteRowsError, match="infinite values; leave a value out") as caught:
            call()
        assert caught.value.row_R.tolist() == [1, 3]
    assert infinite_rows(vectors).tolist() == [1, 3]
    assert infinite_rows(vectors[::2]).tolist() == []
    assert infinite_rows(np.full((2, 2), 2**31 - 1)).tolist() == []


def test_values_that_standardising_makes_infinite_are_told():
    vectors = np.array([[1, 2, 3], [4, 5, 1e39], [-1.7e308, 1, 1]])
    with pytest.raises(InfiniteRowsError, match=r"^'gene' holds infinite values") as caught:
        preprocess().vectors("gene", vectors)
    assert caught.value.row_R.tolist() == [1, 2]
    with pytest.raises(InfiniteRowsError, match=r"^2 of 3 vectors hold infinite values"):
        fit_vector(vectors)


def test_settings_that_do_not_fit_the_image_are_refused():
    with pytest.raises(ConfigError, match=r"crop asks for 7 x 7 px of 'slide', which has 8 x 6; use a share"):
        fit_image(IMAGE, name="slide", crop=7, mean=(0.5,), std=(0.5,))
    with pytest.raises(ConfigError, match=r"data\.image_std has 2 values, 'slide' has 3 channels; give 1 or 3"):
        fit_image(IMAGE, name="slide", crop=1, mean=(0.5,), std=(0.5, 0.5))


def test_the_kinds_are_told_apart_by_name():
    kinds = {name: type(fitted) for name, fitted in preprocess().inputs.items()}
    assert kinds == {"gene": VectorInput, "slide": ImageInput}
