"""The total error grows by the error of each round."""

import itertools

import pytest
from matplotlib.figure import Figure

from benchmarks.papers import growth
from benchmarks.papers.growth import METHODS, Growth
from benchmarks.papers.training import TASKS, trained


@pytest.mark.usefixtures("tiny_tasks")
@pytest.mark.parametrize("method", ["Top-k", "hard threshold"])
def test_the_total_error_is_the_sum_of_the_errors(method: str) -> None:
    rows = growth.run(Growth("images", method, 0, "short"))
    assert [row["round"] for row in rows] == [1, 2, 3, 4]  # short runs are not thinned
    sums = itertools.accumulate(float(row["error"]) for row in rows)
    assert [row["total_error"] for row in rows] == pytest.approx(list(sums))
    assert "quality" in rows[-1]


@pytest.mark.usefixtures("tiny_tasks")
def test_it_is_the_same_run_as_anywhere_else() -> None:
    cell = Growth("images", "Top-k", 1, "short")
    end, other = growth.run(cell)[-1], trained(cell.training())[-1]
    assert {name: other[name] for name in ("quality", "density", "error", "total_error")} == pytest.approx(
        {name: end[name] for name in ("quality", "density", "error", "total_error")}
    )


@pytest.mark.usefixtures("tiny_tasks")
def test_it_is_drawn_for_each_task() -> None:
    one = growth.run(Growth("images", "Top-k", 0, "short"))
    figure = growth.draw(
        [row | {"task": task, "method": method} for task in TASKS for method in METHODS for row in one]
    )
    assert isinstance(figure, Figure)
    assert [len(panel.lines) for panel in figure.axes] == [len(METHODS)] * 3 * len(TASKS)


def test_full_has_all_of_short_with_more_seeds() -> None:
    short = {(cell.task, cell.method, cell.seed) for cell in growth.cells("short")}
    full = {(cell.task, cell.method, cell.seed) for cell in growth.cells("full")}
    assert short < full
    assert {seed for _, _, seed in full} == {0, 1, 2}
