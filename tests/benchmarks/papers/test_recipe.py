"""A known number is met within its tolerance, or it is not."""

import pytest

from benchmarks.papers.recipe import no_oracles, oracle, oracle_at_most


@pytest.mark.parametrize(("measured", "ok"), [(1.0, True), (1.25, True), (0.75, True), (1.26, False), (0.74, False)])
def test_an_oracle_holds_within_its_tolerance(measured: float, ok: bool) -> None:
    found = oracle("pi", measured, expected=1.0, tolerance=0.25)
    assert found == {"name": "pi", "expected": 1.0, "tolerance": 0.25, "measured": measured, "ok": ok}


@pytest.mark.parametrize(("measured", "ok"), [(0.0, True), (4.0, True), (4.001, False), (-0.1, False)])
def test_a_bound_is_an_interval_from_zero(measured: float, ok: bool) -> None:
    assert oracle_at_most("bound", measured, most=4.0)["ok"] is ok


def test_what_is_no_number_meets_no_oracle() -> None:
    assert not oracle("lost", float("nan"), expected=1.0, tolerance=1.0)["ok"]


def test_most_recipes_know_nothing_beforehand() -> None:
    assert no_oracles([{"x": 1}]) == []
