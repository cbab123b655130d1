"""Mean and spread over seeds."""

import math

import pytest

from benchmarks.papers import seeds
from benchmarks.papers.recipe import Row


def test_last_row_of_each_run() -> None:
    names = ("method", "seed", "round", "quality")
    rows: list[Row] = [
        dict(zip(names, values, strict=True))
        for values in (("a", 0, 1, 10), ("a", 0, 2, 20), ("a", 1, 3, 30), ("b", 1, 4, 40), ("b", 1, 4, 50))
    ]
    assert [row["quality"] for row in seeds.final(rows)] == [20, 30, 40, 50]
    assert seeds.final([]) == []


def test_mean_and_deviation_of_each_group() -> None:
    rows: list[Row] = [
        {"method": "a", "seed": 0, "quality": 1.0},
        {"method": "b", "seed": 0, "quality": 7.0},
        {"method": "a", "seed": 1, "quality": 3.0},
    ]
    spread = seeds.over_seeds(rows, "quality", by=("method",))
    assert list(spread) == [("a",), ("b",)]
    assert spread["a",] == pytest.approx((2.0, math.sqrt(2), 2))
    assert spread["b",] == (7.0, 0.0, 1)


def test_a_run_that_diverged_is_not_averaged_away() -> None:
    rows: list[Row] = [{"seed": 0, "quality": math.nan}, {"seed": 1, "quality": 3.0}]
    assert math.isnan(seeds.over_seeds(rows, "quality", by=())[()].mean)


def test_pilot_is_none_of_the_seeds() -> None:
    assert list(seeds.seeds("short")) == [0]
    assert list(seeds.seeds("full")) == [0, 1, 2]
    assert seeds.PILOT not in seeds.seeds("full")
