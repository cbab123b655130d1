"""What each method is asked for within a budget, and what it takes."""

import pytest

from benchmarks.papers.contestants import METHODS, Contestant, contested, dgc, training_of
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TASKS, TaskName, Training
from thresher.compression import DGC, parse_feedback


def made(method: str, budget: float, task: TaskName = "images", scale: float = 1.0) -> Training:
    return training_of(Contestant(task, method, budget, 0, "short", scale), TASKS[task](0))


@pytest.mark.usefixtures("tiny_tasks")
@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_what_dgc_leaves_to_the_matrices_fills_the_budget(budget: float) -> None:
    network = TASKS["images"](0).network
    feedback = parse_feedback(dgc(TASKS["images"](0), "short", budget), network.shapes, network.names)
    assert isinstance(feedback, DGC)
    sent = feedback.compress(network.point.clone().normal_()).count
    assert sent == pytest.approx(budget * network.point.numel(), abs=2)


@pytest.mark.usefixtures("tiny_tasks")
def test_a_budget_below_what_dgc_sends_whole_leaves_one_coordinate_of_each_matrix() -> None:
    network = TASKS["images"](0).network
    feedback = parse_feedback(dgc(TASKS["images"](0), "short", 0.001), network.shapes, network.names)
    whole = sum(shape[0] for shape in network.shapes if len(shape) == 1)
    assert feedback.compress(network.point.clone().normal_()).count == whole + 2


@pytest.mark.usefixtures("tiny_tasks")
def test_the_momentum_is_in_one_place_only() -> None:
    assert made("DGC", 0.5).momentum == 0.0
    assert "momentum=0.9" in made("DGC", 0.5).feedback
    assert {made(method, 0.01).momentum for method in METHODS if method != "DGC"} == {None}
    assert [method for method in METHODS if made(method, 0.01).placement == "update"] == ["DEF"]


@pytest.mark.usefixtures("tiny_tasks")
def test_a_scale_asks_for_more() -> None:
    assert made("Top-k", 0.01, scale=2.0).feedback == "ErrorFeedback(TopK(0.02))"
    threshold = LAMBDAS["images"][0.01] / 2
    assert made("hard threshold", 0.01, scale=2.0).feedback == f"ErrorFeedback(HardThreshold({threshold:.4g}))"


@pytest.mark.usefixtures("tiny_tasks")
def test_a_row_says_what_a_worker_sends_in_a_round() -> None:
    (row,) = contested(Contestant("images", "Top-k", 0.01, 0, "short"))
    assert row["up_bytes_per_round"] == float(row["up_bytes"]) / 4
    assert 0 < float(row["up_bytes_per_round"]) < 100
