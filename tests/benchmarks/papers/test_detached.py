"""DEF and its relatives: which of them are one at the ends of λ, and what a stable rate is."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.papers import detached
from benchmarks.papers.comparison import Point
from benchmarks.papers.detached import BLOCKS, RATES, Detached, largest_stable_rate
from benchmarks.papers.recipe import Row
from benchmarks.papers.training import Training, trained


@pytest.mark.parametrize(
    ("qualities", "largest"),
    [
        ((60.0, 80.0, 70.0), 0.3),
        ((60.0, 80.0, 12.0), 0.2),
        ((60.0, math.nan, 70.0), 0.1),
        ((10.0, 80.0, 70.0), 0.0),
    ],
)
def test_a_rate_is_stable_if_all_below_it_are(qualities: tuple[float, ...], largest: float) -> None:
    along = [Point(rate, quality, 0.0) for rate, quality in zip((0.1, 0.2, 0.3), qualities, strict=True)]
    assert largest_stable_rate(along) == largest


@pytest.mark.usefixtures("tiny_tasks")
def test_cser_as_in_its_official_runs_is_saef_to_the_bit() -> None:
    saef, cser = (
        trained(Training("images", "x", feedback, 0, "short", "update", nesterov=False, evaluations=1))[-1]
        for feedback in (f"DetachedErrorFeedback({BLOCKS}, 1.0)", f"ErrorReset({BLOCKS})")
    )
    assert saef | {"feedback": ""} == cser | {"feedback": ""}


@pytest.mark.usefixtures("tiny_tasks")
def test_a_run_has_both_points_and_its_rate() -> None:
    rows = detached.run(Detached("DEF", 0.3, 1 / 4, 0, "short"))
    end = rows[-1]
    assert (end["target"], end["rate"], end["coefficient"], end["round"]) == (1 / 4, 0.025, 0.3, 4)
    assert {"quality", "virtual_quality"} < end.keys()


@pytest.mark.usefixtures("tiny_tasks")
def test_what_diverges_has_no_accuracy() -> None:
    end = detached.run(Detached("EF", 0.0, 3e39, 0, "short"))[-1]
    assert math.isnan(float(end["quality"]))
    assert math.isnan(float(end["virtual_quality"]))


def test_it_is_drawn_with_the_sweep_over_all_coefficients() -> None:
    rows: list[Row] = []
    for cell in detached.cells("full"):
        run: Row = {"task": "images", "method": cell.method, "seed": cell.seed, "target": cell.rate}
        run |= {} if cell.coefficient is None else {"coefficient": cell.coefficient}
        end: Row = {"round": 4, "quality": 50.0 + cell.rate, "virtual_quality": 60.0}
        rows.append(run | {"rate": 0.2 * cell.rate} | end)
    figure = detached.draw(rows)
    assert isinstance(figure, Figure)
    at_x, _, sweep = figure.axes
    assert len(at_x.containers) == len(detached.METHODS)
    assert np.asarray(sweep.lines[0].get_xdata()).tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0])


def test_every_method_is_tried_at_the_same_rates() -> None:
    cells = detached.cells("full")
    assert len(set(cells)) == len(cells)
    for method in detached.METHODS:
        assert {cell.rate for cell in cells if cell.method == method} == set(RATES["full"])
