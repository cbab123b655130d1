"""The data sets, read from a folder that is not ours; docs/papers.md says where each comes from."""

import importlib.metadata
import lzma
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RECBOLE_FILE = "recbole/dataset_example/ml-100k/ml-100k.inter"

_folder = Path(__file__).parents[2] / "../shared/data"


class MissingDataError(Exception):
    """A data set is not where it was looked for; the message says what to do."""


def use(folder: Path) -> None:
    """Read from ``folder`` from now on."""
    global _folder  # noqa: PLW0603 - a process reads from one folder; what was read from another is forgotten
    _folder = folder
    for reader in (fashion_mnist, svm, gisette_like, addresses):
        reader.cache_clear()


def path_of(name: str) -> Path:
    """Where the file ``name`` is.

    Raises:
        MissingDataError: it is not there.
    """
    path = _folder / name
    if not path.is_file():
        raise MissingDataError(f"{name} is not in {_folder}: name the folder of the data with --data")
    return path


class Images(NamedTuple):
    """Images, [number, 28, 28] uint8, and their classes, [number] uint8."""

    train_x: npt.NDArray[np.uint8]
    train_y: npt.NDArray[np.uint8]
    test_x: npt.NDArray[np.uint8]
    test_y: npt.NDArray[np.uint8]


@cache
def fashion_mnist() -> Images:
    """Fashion-MNIST: 60,000 images to train on, 10,000 to test on."""
    with np.load(path_of("fashion_mnist.npz")) as arrays:
        return Images(*(arrays[name] for name in Images._fields))


@cache
def svm(name: str, features: int) -> tuple[Doubles, Doubles]:
    """The file ``name`` in LIBSVM's format: rows, [number, features], and labels -1 or +1, [number]."""
    with lzma.open(path_of(f"{name}.xz"), "rt") as lines:
        labels, _, entries = zip(*(line.partition(" ") for line in lines), strict=True)
    columns, values = np.array(" ".join(entries).replace(":", " ").split(), float).reshape(-1, 2).T
    rows = np.zeros((len(labels), features))
    rows[np.repeat(np.arange(len(labels)), [entry.count(":") for entry in entries]), columns.astype(int) - 1] = values
    return rows, np.array(labels, float)


@cache
def gisette_like() -> tuple[Doubles, Doubles]:
    """6,000 rows of 5,000 features with the construction of LIBSVM's gisette_scale, made from other images."""
    make: Any = runpy.run_path(str(path_of("make_gisette_like.py")))["gisette_like"]
    rows, labels, _, _ = make(path_of("fashion_mnist.npz"))
    return rows.astype(float), labels.astype(float)


class Addresses(NamedTuple):
    """The words of the documents to train on, to validate on and to test on, one after another."""

    train: list[str]
    valid: list[str]
    test: list[str]


@cache
def addresses() -> Addresses:
    """The State of the Union addresses, every twentieth document for validation and every twentieth for the test."""
    with lzma.open(path_of("sotu.txt.xz"), "rt", encoding="utf-8", newline="\n") as text:
        documents = [document.split("\n", 1)[1] for document in text.read().split("\f")]
    train = [document for number, document in enumerate(documents) if number % 20 not in {9, 19}]
    return Addresses(*(_words("\n".join(part)) for part in (train, documents[9::20], documents[19::20])))


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+|[0-9]+|[^\sA-Za-z0-9]", text)


class Ratings(NamedTuple):
    """Who rated what: user and item of each rating, numbered from 0, in the order of the file, and when."""

    user: Integers
    item: Integers
    time: Doubles


def ratings() -> Ratings:
    """MovieLens-100K: 100,000 ratings of 943 users and 1,682 items, out of the installed package recbole.

    Raises:
        MissingDataError: the package is not installed.
    """
    try:
        path = importlib.metadata.distribution("recbole").locate_file(RECBOLE_FILE)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDataError("MovieLens-100K is not here: pip install --no-deps recbole==1.2.1") from None
    lines = Path(str(path)).read_text(encoding="utf-8").strip().split("\n")[1:]
    users, items, _, times = zip(*(line.split("\t") for line in lines), strict=True)
    user, item = (np.unique(np.array(column), return_inverse=True)[1] for column in (users, items))
    return Ratings(user.astype(np.int64), item.astype(np.int64), np.array(times, float))
