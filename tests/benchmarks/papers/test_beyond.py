"""All methods within one budget: what each is asked for, and what it takes."""

import math

import pytest
from matplotlib.figure import Figure

from benchmarks.papers import beyond
from benchmarks.papers.beyond import METHODS, Beyond, dgc, scale_for, training_of
from benchmarks.papers.recipe import Row
from benchmarks.papers.thresholds import LAMBDAS
from benchmarks.papers.training import TASKS, TaskName, Training
from thresher.compression import DGC, parse_feedback


def made(method: str, budget: float, task: TaskName = "images") -> Training:
    return training_of(Beyond(task, method, budget, 0, "short"), TASKS[task](0))


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


@pytest.mark.parametrize(
    ("power", "offset", "tries"),
    [
        pytest.param(1.0, 0.0, 2, id="one correction"),
        pytest.param(0.8, 0.0, 3, id="two corrections"),
        pytest.param(0.0, 5.0, 3, id="no scale helps"),
    ],
)
def test_the_scale_is_sought_in_a_few_tries(power: float, offset: float, tries: int) -> None:
    asked: list[float] = []

    def bytes_of(scale: float) -> float:
        asked.append(scale)
        return 4.0 * math.pow(scale, power) + offset

    scale = scale_for(bytes_of, 1.0)
    assert len(asked) == tries
    assert abs(bytes_of(scale) - 1.0) == min(abs(bytes_of(other) - 1.0) for other in asked[:tries])
    assert power == 0.0 or bytes_of(scale) == pytest.approx(1.0, rel=0.1)


@pytest.mark.usefixtures("tiny_tasks")
def test_a_scale_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "SCALES", {("images", "Top-k", 0.01): 2.0, ("images", "hard threshold", 0.01): 2.0})
    assert made("Top-k", 0.01).feedback == "ErrorFeedback(TopK(0.02))"
    assert made("hard threshold", 0.01).feedback == f"ErrorFeedback(HardThreshold({LAMBDAS['images'][0.01] / 2:.4g}))"


@pytest.mark.usefixtures("tiny_tasks")
def test_the_pilot_brings_all_to_the_bytes_of_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "METHODS", ("Top-k", "hard threshold", "EF21"))
    scales = beyond.pilot("images", 0.01)
    assert set(scales) == {"hard threshold", "EF21"}
    assert scales["EF21"] == 1.0  # it sends as many coordinates


@pytest.mark.usefixtures("tiny_tasks")
def test_a_row_says_what_a_worker_sends_in_a_round() -> None:
    (row,) = beyond.run(Beyond("images", "Top-k", 0.01, 0, "short"))
    assert row["up_bytes_per_round"] == float(row["up_bytes"]) / 4
    assert 0 < float(row["up_bytes_per_round"]) < 100


def test_it_is_drawn_for_each_task_and_method() -> None:
    rows: list[Row] = []
    for cell in beyond.cells("full"):
        run: Row = {"task": cell.task, "method": cell.method, "target": cell.budget, "seed": cell.seed}
        rows.append(run | {"up_bytes_per_round": 1e5 * cell.budget, "quality": 50.0})
    figure = beyond.draw(rows)
    assert isinstance(figure, Figure)
    assert [len(panel.containers) for panel in figure.axes] == [len(METHODS)] * len(TASKS)
