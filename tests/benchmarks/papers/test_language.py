"""The language task on a made-up text."""

import math

import numpy as np
import pytest
import torch

from benchmarks.papers import language
from benchmarks.papers.data import Addresses


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> language.Language:
    train = torch.from_numpy(np.random.default_rng(0).integers(0, language.WORDS + 1, 8000))
    monkeypatch.setattr(language, "numbered", lambda: (train, train[:1500]))
    monkeypatch.setattr(language, "VALIDATED", (5, 40))
    return language.Language(0)


def test_numbers_are_by_how_common_a_word_is(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Addresses(train=["b", "a", "b", "c", "b", "a"], valid=["a", "d"], test=[])
    monkeypatch.setattr(language, "addresses", lambda: words)
    monkeypatch.setattr(language, "WORDS", 2)
    train, valid = language.numbered.__wrapped__()
    assert train.tolist() == [0, 1, 0, 2, 0, 1]
    assert valid.tolist() == [1, 2]


def test_columns_are_stretches_of_the_text() -> None:
    cut = language.columns(torch.arange(11), 3)
    assert cut.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_network_has_the_parameters_that_are_documented(task: language.Language) -> None:
    assert task.network.point.numel() == 390_225


def test_gradient_is_clipped(task: language.Language) -> None:
    start = task.network.point.clone()
    assert float(task.gradient(0, start, 0).norm()) <= language.CLIP * (1 + 1e-5)
    assert float(task.gradient(0, 20 * start, 0).norm()) == pytest.approx(language.CLIP, rel=1e-4)


def test_gradient_depends_on_worker_point_and_round_alone(task: language.Language) -> None:
    start = task.network.point.clone()
    first = task.gradient(0, start, 0).clone()
    others = [task.gradient(1, start, 0).clone(), task.gradient(0, start, 1).clone(), task.gradient(0, 2 * start, 0)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(task.gradient(0, start, 0), first)


def test_seed_decides_start_and_text(task: language.Language) -> None:
    start = task.network.point.clone()
    again, other = language.Language(0), language.Language(1)
    assert torch.equal(again.network.point, start)
    assert not torch.equal(other.network.point, start)
    assert torch.equal(again.gradient(2, start, 3), task.gradient(2, start, 3))
    assert not torch.equal(other.gradient(2, start, 3), task.gradient(2, start, 3))


def test_perplexity_of_a_network_that_knows_nothing_is_the_number_of_words(task: language.Language) -> None:
    assert task.quality(torch.zeros_like(task.network.point)) == pytest.approx(language.WORDS + 1, rel=1e-4)


def test_perplexity_that_no_float_holds_is_infinite(task: language.Language) -> None:
    point = torch.zeros_like(task.network.point)
    point[0] = 1e9  # the bias of one word: certain of it, and wrong
    assert task.quality(point) == math.inf
