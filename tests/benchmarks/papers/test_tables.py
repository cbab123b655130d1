"""What docs/papers.md prints is what the recipes' rows say."""

import json

import pytest

from benchmarks.papers import results, tables
from benchmarks.papers.__main__ import NAMES
from benchmarks.papers.recipe import Row, oracle


def test_every_recipe_has_a_table_and_a_place() -> None:
    assert set(tables.TABLES) == set(NAMES)
    page = tables.PAGE.read_text(encoding="utf-8")
    for name in (*NAMES, "oracles"):
        tables.put(page, name, "")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_what_came_out(name: str) -> None:
    """Nobody has mended a number by hand, and no figure is older than its table."""
    if not results.RESULTS.joinpath(f"{name}.csv").exists():
        pytest.skip(f"{name} has not been run yet")
    about = json.loads(results.RESULTS.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.put(page, name, tables.block(name, about, results.rows_of(name))) == page


def test_the_page_has_all_oracles() -> None:
    oracles = json.loads(results.RESULTS.joinpath("oracles.json").read_text(encoding="utf-8"))
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.put(page, "oracles", tables.markdown(tables.of_oracles(oracles))) == page


def test_a_table_is_put_between_its_marks() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb <!-- y -->\n\n<!-- end of y -->\n"
    assert tables.put(page, "x", "| \\1 |") == page.replace("old", "| \\1 |")
    assert "new\n<!-- end of y -->" in tables.put(page, "y", "new")
    with pytest.raises(ValueError, match="no place for z"):
        tables.put(page, "z", "new")


def test_means_and_spreads_are_over_the_seeds() -> None:
    rows: list[Row] = [
        {"task": "images", "target": 0.01, "method": "Top-k", "seed": seed, "density": 0.0125, "quality": quality}
        for seed, quality in enumerate((80.0, 82.0))
    ]
    rows.append({"task": "images", "target": 1.0, "method": "dense", "seed": 0, "density": 1.0, "quality": 90.0})
    assert tables.compared(rows) == [
        ["task", "wanted", "method", "density", "quality", "runs"],
        ["images", "100 %", "dense", "100 %", "90.00", "1"],
        ["images", "1 %", "Top-k", "1.25 %", "81.00 ± 1.41", "2"],
    ]


def test_a_bound_that_is_broken_is_counted() -> None:
    rows: list[Row] = [
        {"theorem": "Theorem 6", "quantity": "squared gradient", "measured": measured, "bound": 2.0}
        for measured in (1.0, 1.9, 2.1)
    ]
    assert tables.theory(rows)[1][2:5] == ["3", "1", "1.1"]


def test_an_oracle_that_fails_is_seen() -> None:
    table = tables.of_oracles([oracle("pi", 3.0, expected=3.14159, tolerance=0.1)])
    assert table[1] == ["pi", "3.14159", "0.1", "3", "**no**"]


def test_markdown() -> None:
    assert tables.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
