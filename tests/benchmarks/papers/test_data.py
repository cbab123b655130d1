"""Data that is missing is said to be, with what to do; what is there has the shape the recipes rely on."""

import importlib.metadata
import lzma
from pathlib import Path

import pytest

from benchmarks.papers import data


@pytest.fixture(autouse=True)
def usual_folder() -> object:
    before = data._folder
    yield
    data.use(before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    data.use(tmp_path)
    with pytest.raises(data.MissingDataError, match=r"fashion_mnist\.npz is not in .*--data"):
        data.fashion_mnist()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    with pytest.raises(data.MissingDataError, match="pip install --no-deps recbole"):
        data.ratings()


def test_libsvm_files_are_read(tmp_path: Path) -> None:
    with lzma.open(tmp_path / "tiny.xz", "wt") as file:
        file.write("-1 1:2 3:0.5\n+1 2:1\n")
    data.use(tmp_path)
    rows, labels = data.svm("tiny", 3)
    assert rows.tolist() == [[2.0, 0.0, 0.5], [0.0, 1.0, 0.0]]
    assert labels.tolist() == [-1.0, 1.0]


def test_documents_are_split_by_their_number(tmp_path: Path) -> None:
    documents = [f"name_{number}\nword{number} don't, {number}" for number in range(20)]
    with lzma.open(tmp_path / "sotu.txt.xz", "wt") as file:
        file.write("\f".join(documents))
    data.use(tmp_path)
    text = data.addresses()
    assert text.valid == ["word", "9", "don't", ",", "9"]
    assert text.test == ["word", "19", "don't", ",", "19"]
    assert len(text.train) == 18 * 5


def test_the_ratings_are_movielens() -> None:
    try:
        ratings = data.ratings()
    except data.MissingDataError as missing:
        pytest.skip(str(missing))
    assert (len(ratings.user), ratings.user.max() + 1, ratings.item.max() + 1) == (100_000, 943, 1_682)
