"""Bytes are brought together in a few tries."""

import math

import pytest

from benchmarks.papers import scales
from benchmarks.papers.contestants import Contestant
from benchmarks.papers.recipe import Row
from benchmarks.papers.scales import scale_for


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

    scale = scale_for(bytes_of)
    assert len(asked) == tries
    assert abs(bytes_of(scale) - 1.0) == min(abs(bytes_of(other) - 1.0) for other in asked[:tries])
    assert power == 0.0 or bytes_of(scale) == pytest.approx(1.0, rel=0.1)


@pytest.mark.usefixtures("tiny_tasks")
def test_every_try_has_a_row_and_the_nearest_is_found() -> None:
    rows = scales.run(Contestant("images", "hard threshold", 0.01, 0, "short"))
    assert 1 <= len(rows) <= scales.TRIES
    assert rows[0]["scale"] == 1.0
    nearest = min(rows, key=lambda row: abs(float(row["used"]) - 1.0))
    assert scales.found(rows).get(("images", "hard threshold", 0.01), 1.0) == nearest["scale"]


@pytest.mark.usefixtures("tiny_tasks")
def test_what_sends_as_many_coordinates_needs_no_scale() -> None:
    for method in scales.EXACT - {"DEF"}:
        (row,) = scales.run(Contestant("images", method, 0.5, 0, "short"))
        assert row["used"] == pytest.approx(1.0, abs=scales.NEAR)


def test_the_figure_has_a_line_for_each_method_and_budget() -> None:
    rows: list[Row] = [
        {"task": "images", "method": method, "target": budget, "scale": scale, "used": scale / 2}
        for method in ("DGC", "SIDCo")
        for budget in (0.01, 0.001)
        for scale in (1.0, 2.0)
    ]
    (panel,) = scales.draw(rows).axes
    assert len(panel.lines) == 4
