"""The predictions file: what is written reads back bit for bit, and damage is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.errors import DataError, ShapeError
from distkd.metrics.predictions import Predictions, read_predictions, write_predictions

NAMES = ["grade II", 'odd, "name"', "IV"]


def predictions(n: int, seed: int) -> Predictions:
    draws = np.random.default_rng(seed)
    return Predictions(
        key=[f"tile-{row:04d}" for row in range(n)],
        patient=[f"P,{row % 3}" for row in range(n)],
        group=[None if row % 4 == 0 else f"roi {row % 2}" for row in range(n)],
        label_N=draws.integers(-1, 3, size=n),
        probability_NC=draws.dirichlet(np.ones(3), size=n).reshape(n, 3),
        class_names=NAMES,
    )


@settings(deadline=None)
@given(n=st.integers(0, 20), seed=st.integers(0, 20))
def test_what_is_written_reads_back_bit_for_bit(tmp_path_factory, n, seed):
    path = tmp_path_factory.mktemp("eval") / "test.predictions.csv"
    written = predictions(n, seed)
    write_predictions(path, written)
    read = read_predictions(path)
    assert (read.key, read.patient, read.group) == (written.key, written.patient, written.group)
    assert read.label_N.tolist() == written.label_N.tolist()
    assert read.probability_NC.tobytes() == written.probability_NC.tobytes()
    assert read.class_names == NAMES


def test_the_file_is_the_same_in_any_order_and_leaves_nothing_beside_it(tmp_path):
    p = predictions(6, 0)
    backwards = Predictions(
        p.key[::-1], p.patient[::-1], p.group[::-1], p.label_N[::-1], p.probability_NC[::-1], p.class_names
    )
    write_predictions(tmp_path / "a.csv", p)
    write_predictions(tmp_path / "b.csv", backwards)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.csv", "b.csv"]


def test_columns_and_names_are_those_of_the_contract(tmp_path):
    one = Predictions(["k"], ["P"], [None], np.array([1]), np.array([[0.75, 0.25]]), ["a", "b"])
    write_predictions(tmp_path / "test.predictions.csv", one)
    assert (tmp_path / "test.predictions.csv").read_text() == (
        "key,patient,group,label,predicted,p_a,p_b\nk,P,,b,a,0.75,0.25\n"
    )


def test_a_missing_file_names_the_command_that_writes_it(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv does not exist; `distkd eval RUN` writes it"):
        read_predictions(tmp_path / "none.csv")


def test_foreign_columns_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("id,score\n1,2\n")
    with pytest.raises(DataError, match=r"has the columns id,score; expected key,patient,group,label,predicted,p_"):
        read_predictions(tmp_path / "x.csv")


@pytest.mark.parametrize("line", ["k,P,,a", "k,P,,nobody,a,0.5,0.5", "k,P,,a,a,half,0.5", "k,P,,a,a,0.5"])
def test_a_damaged_line_is_refused(tmp_path, line):
    (tmp_path / "x.csv").write_text(f"key,patient,group,label,predicted,p_a,p_b\n{line}\n")
    with pytest.raises(DataError, match=r"x\.csv has a damaged line"):
        read_predictions(tmp_path / "x.csv")


def test_columns_of_different_length_are_refused():
    with pytest.raises(ShapeError, match="predictions of 1 keys and 2 classes have 1 patients, 1 groups, labels"):
        Predictions(["k"], ["P"], [None], np.array([0, 1]), np.full((1, 2), 0.5), ["a", "b"])


def test_a_sample_evaluated_twice_is_our_own_fault():
    with pytest.raises(AssertionError, match="1 samples were evaluated more than once"):
        Predictions(["k", "k"], ["P", "P"], [None, None], np.array([0, 0]), np.full((2, 2), 0.5), ["a", "b"])
