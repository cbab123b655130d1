"""Runs side by side: means over the seeds, what a line shows, and each point judged by itself."""

import math

import pytest
from matplotlib.figure import Figure

from benchmarks.papers.comparison import Compared, compared, draw_by_task, lines, qualities
from benchmarks.papers.recipe import Row
from benchmarks.papers.training import Run, Training


def row(method: str, seed: int, quality: float, *, target: float = 0.1, density: float = 0.1) -> Row:
    return {
        "target": target,
        "task": "images",
        "method": method,
        "seed": seed,
        "round": 5,
        "quality": quality,
        "density": density,
    }


def test_a_point_is_the_mean_over_the_seeds_with_their_deviation() -> None:
    rows = [row("Top-k", 0, 80.0, density=0.1), row("Top-k", 1, 84.0, density=0.3)]
    assert lines(rows) == {"Top-k": [pytest.approx((0.2, 82.0, math.sqrt(8.0)))]}


def test_a_line_goes_from_small_to_large() -> None:
    rows = [row("Top-k", 0, 80.0, target=0.1, density=0.1), row("Top-k", 0, 70.0, target=0.01, density=0.01)]
    assert [point.x for point in lines(rows)["Top-k"]] == [0.01, 0.1]


def test_a_run_that_diverged_is_not_averaged_away() -> None:
    (point,) = lines([row("Top-k", 0, 80.0), row("Top-k", 1, math.nan)])["Top-k"]
    assert math.isnan(point.quality)


def test_a_variant_is_dashed_in_the_colour_of_its_method() -> None:
    figure = draw_by_task([row("Top-k", 0, 80.0), row("Top-k, entire model", 0, 79.0)])
    assert isinstance(figure, Figure)
    (whole, *_), (variant, *_) = figure.axes[0].containers
    assert (whole.get_linestyle(), variant.get_linestyle()) == ("-", "--")
    assert whole.get_color() == variant.get_color()


@pytest.mark.usefixtures("tiny_tasks")
def test_the_end_of_a_run_is_one_row_with_its_target() -> None:
    training = Training("images", "Top-k", "ErrorFeedback(TopK(0.1))", seed=0, form="short", evaluations=3)
    (end,) = compared(Compared(training, 0.1))
    assert (end["target"], end["round"]) == (0.1, 4)
    assert Compared(training, 0.1).seed == 0


@pytest.mark.usefixtures("tiny_tasks")
def test_a_point_is_judged_by_itself_wherever_gradients_were_taken() -> None:
    feedback = "DetachedErrorFeedback(RandomBlocks(1/4), 1.0)"
    run = Run(Training("images", "SAEF", feedback, 0, "short", "update", evaluations=1))
    run.rows()
    found = qualities(run)
    for worker in range(30):  # batch norm learns of a quite different point
        run.task.gradient(worker, 2.0 * run.simulator.synced, 0)
    assert qualities(run) == pytest.approx(found, abs=3.0)
