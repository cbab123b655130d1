"""The image task on made-up images."""

import numpy as np
import pytest
import torch

from benchmarks.papers import data, images
from benchmarks.papers.task import WORKERS


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> images.Images:
    numbers = np.random.default_rng(0)
    train, test = (numbers.integers(0, 256, (size, 28, 28), np.uint8) for size in (600, 250))
    labels = [numbers.integers(0, 10, size, np.uint8) for size in (600, 250)]
    monkeypatch.setattr(images, "fashion_mnist", lambda: data.Images(train, labels[0], test, labels[1]))
    return images.Images(0)


def test_network_has_the_parameters_that_are_documented(task: images.Images) -> None:
    assert task.network.point.numel() == 77_754


def test_gradient_depends_on_worker_point_and_round_alone(task: images.Images) -> None:
    start = task.network.point.clone()
    first = task.gradient(0, start, 0).clone()
    others = [task.gradient(1, start, 0).clone(), task.gradient(0, start, 1).clone(), task.gradient(0, 2 * start, 0)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(task.gradient(0, start, 0), first)


def test_seed_decides_start_and_order(task: images.Images) -> None:
    start = task.network.point.clone()
    again, other = images.Images(0), images.Images(1)
    assert torch.equal(again.network.point, start)
    assert not torch.equal(other.network.point, start)
    assert torch.equal(again.gradient(2, start, 3), task.gradient(2, start, 3))
    assert not torch.equal(other.gradient(2, start, 3), task.gradient(2, start, 3))


def test_workers_share_no_image_in_a_round(task: images.Images, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.update(y.tolist())
        return logits.sum()

    monkeypatch.setattr(images, "cross_entropy", loss)
    task._y = torch.arange(600)  # labels that say which image it is
    for worker in range(WORKERS):
        task.gradient(worker, task.network.point, 0)
    assert len(seen) == WORKERS * images.BATCH


def test_quality_is_the_share_of_right_answers(task: images.Images) -> None:
    network = task.network.at(task.network.point.clone())
    with torch.no_grad():
        answers = network(task._test_x).argmax(1)
    task._test_y = answers.clone()
    task._test_y[:50] = (answers[:50] + 1) % 10
    assert task.quality(task.network.point.clone()) == 80.0


def test_quality_of_nothing_finite_is_no_better_than_chance(task: images.Images) -> None:
    assert task.quality(torch.full_like(task.network.point, torch.nan)) < 20
