"""A run twice, on a network that is small enough for a test."""

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.papers import through_shards
from benchmarks.papers.recipe import Row
from benchmarks.papers.through_shards import Twice
from benchmarks.papers.training import TASKS


@pytest.mark.usefixtures("tiny_tasks")
@pytest.mark.parametrize("feedback", ["ErrorFeedback(HardThreshold(0.1))", "ErrorFeedback(TopK(0.3))"])
def test_the_simulator_is_what_shards_do(feedback: str) -> None:
    """Bit for bit in parameters, quality and elements, and something is sent and left out."""
    numel = TASKS["images"](0).network.point.numel()
    rows = through_shards.run(Twice("method", feedback, seed=0, rounds=8, workers=3, shards=2))
    assert [row["round"] for row in rows] == list(range(1, 9))
    assert all(row["difference"] == 0.0 for row in rows)
    assert all(row["elements_sent"] == row["elements_simulated"] for row in rows)
    assert 0 < sum(int(row["elements_sent"]) for row in rows) < 8 * 3 * numel
    judged = [row for row in rows if "quality" in row]
    assert [row["round"] for row in judged] == [2, 4, 6, 8]
    assert all(row["quality"] == row["quality_simulated"] for row in judged)


@pytest.mark.usefixtures("tiny_tasks")
def test_workers_share_data_and_start_but_no_network() -> None:
    """What one does to its network, neither the others nor the task itself see."""
    task = TASKS["images"](0)
    start = task.network.point.clone()
    one, other = through_shards.of_each_worker(task, 2)
    one.gradient(0, torch.zeros_like(start), 0)
    assert not torch.equal(one.network.point, start)
    assert torch.equal(other.network.point, start)
    assert torch.equal(task.network.point, start)


def test_a_difference_is_found_and_drawn() -> None:
    """A bit that differs, or an element too many, is not ok; the figure takes rounds with and without quality."""

    def row(number: int, difference: float, sent: int) -> Row:
        named: Row = {"method": "Top-k", "seed": 0, "round": number, "elements_simulated": 7}
        return {**named, "elements_sent": sent, "difference": difference}

    same = [row(1, 0.0, 7), row(2, 0.0, 7) | {"quality": 50.0, "quality_simulated": 50.0}]
    assert [one["ok"] for one in through_shards.oracles(same)] == [True, True]
    assert [one["ok"] for one in through_shards.oracles([*same, row(3, 1e-9, 8)])] == [False, False]
    assert isinstance(through_shards.draw(same), Figure)


def test_both_methods_run_in_both_forms() -> None:
    """With one seed and with three."""
    assert len(through_shards.cells("short")) == 2
    assert len(through_shards.cells("full")) == 6
