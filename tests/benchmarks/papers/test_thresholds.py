"""Which threshold gives which density."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.papers import thresholds
from benchmarks.papers.recipe import Row
from benchmarks.papers.training import TASKS


@pytest.mark.parametrize(
    ("numel", "published"),
    [
        (11_173_962, 4.730e-3),
        (11_260_354, 4.712e-3),
        (6_166_250, 6.367e-3),
        (11_220_132, 4.720e-3),
        (6_258_500, 6.320e-3),
    ],
)
def test_rule_gives_the_thresholds_of_the_paper(numel: int, published: float) -> None:
    assert thresholds.rule(0.001, numel) == pytest.approx(published, rel=2e-4)


@given(st.floats(0.5, 3.0), st.floats(0.001, 0.1))
def test_a_power_law_is_met_between_the_rungs(power: float, density: float) -> None:
    ladder = [0.01, 0.03, 0.1, 0.3, 1.0]
    densities = [0.1 * (threshold / 0.01) ** -power for threshold in ladder]
    if densities[-1] <= density:
        expected = 0.01 * (0.1 / density) ** (1 / power)
        assert thresholds.threshold_for(density, ladder, densities) == pytest.approx(expected, rel=0.051)


@pytest.mark.parametrize("density", [0.2, 0.0001])
def test_nothing_is_said_beyond_the_ladder(density: float) -> None:
    with pytest.raises(ValueError, match="the ladder reaches"):
        thresholds.threshold_for(density, [0.1, 1.0], [0.1, 0.001])


def test_thresholds_rise_as_densities_fall() -> None:
    assert set(thresholds.LAMBDAS) == set(TASKS) == set(thresholds.LADDERS)
    for task, found in thresholds.LAMBDAS.items():
        assert list(found) == [0.01, 0.003, 0.001]
        values = list(found.values())
        assert values == sorted(values)
        assert thresholds.LADDERS[task][0] < values[0]
        assert values[-1] < thresholds.LADDERS[task][-1]


def test_short_form_is_part_of_the_full_one() -> None:
    full = [(pilot.task, pilot.threshold) for pilot in thresholds.cells("full")]
    short = [(pilot.task, pilot.threshold) for pilot in thresholds.cells("short")]
    assert len(full) == 15
    assert len(short) == 9
    assert set(short) < set(full)


def test_drawing_has_a_column_for_each_task() -> None:
    rows: list[Row] = [
        {"threshold": threshold, "numel": 1000, "task": task, "quality": 50.0, "density": 0.01 / threshold}
        for task in ("images", "language")
        for threshold in (0.1, 1.0)
    ]
    figure = thresholds.draw(rows)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 4
