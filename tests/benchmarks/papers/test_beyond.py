"""All methods within one budget, side by side."""

import pytest
from matplotlib.figure import Figure

from benchmarks.papers import beyond
from benchmarks.papers.contestants import METHODS
from benchmarks.papers.recipe import Row
from benchmarks.papers.training import TASKS


def test_a_run_has_the_scale_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "SCALES", {("images", "SIDCo", 0.01): 2.0})
    scaled = [cell for cell in beyond.cells("full") if cell.scale != 1.0]
    assert {(cell.task, cell.method, cell.budget, cell.scale) for cell in scaled} == {("images", "SIDCo", 0.01, 2.0)}
    assert [cell.seed for cell in scaled] == [0, 1, 2]


def test_it_is_drawn_for_each_task_and_method() -> None:
    rows: list[Row] = []
    for cell in beyond.cells("full"):
        run: Row = {"task": cell.task, "method": cell.method, "target": cell.budget, "seed": cell.seed}
        rows.append(run | {"up_bytes_per_round": 1e5 * cell.budget, "quality": 50.0})
    figure = beyond.draw(rows)
    assert isinstance(figure, Figure)
    assert [len(panel.containers) for panel in figure.axes] == [len(METHODS)] * len(TASKS)
