"""The rates that are tried lie around the one in use, and send everything."""

import numpy as np

from benchmarks.papers.rates import RECIPE, cells
from benchmarks.papers.recipe import Row
from benchmarks.papers.seeds import PILOT, seeds


def test_only_the_dense_run_is_tuned_on_a_seed_of_its_own() -> None:
    chosen = [cell.training for cell in cells("full")]
    assert {training.method for training in chosen} == {"dense"}
    assert {training.seed for training in chosen} == {PILOT}
    assert PILOT not in seeds("full")
    for task in {training.task for training in chosen}:
        assert sorted(training.rate for training in chosen if training.task == task) == [0.5, 1.0, 2.0]


def test_the_figure_has_a_panel_for_each_task() -> None:
    rows: list[Row] = [
        {"task": task, "rate": rate, "quality": 80.0 + rate} for task in ("images", "language") for rate in (0.1, 0.2)
    ]
    figure = RECIPE.draw(rows)
    assert [axes.get_title() for axes in figure.axes] == ["images", "language"]
    assert np.array_equal(figure.axes[1].lines[0].get_ydata(), [80.1, 80.2])
