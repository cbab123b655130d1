"""What has been run is kept, goes on after an interruption, and is written down whole."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.papers import __main__ as command
from benchmarks.papers import results, running, tables
from benchmarks.papers.drawing import panels
from benchmarks.papers.recipe import Form, Oracle, Recipe, Row, oracle


@dataclass(frozen=True)
class Draw:
    seed: int


def drawn(rows: list[Row]) -> Figure:
    figure, (axes,) = panels(1)
    axes.plot([float(row["x"]) for row in rows])
    return figure


def known(rows: Sequence[Row]) -> list[Oracle]:
    return [oracle("sum", sum(float(row["x"]) for row in rows), expected=1.0, tolerance=0.0)]


class Counting:
    """A recipe that counts how often it is run."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def cells(self, form: Form) -> list[Draw]:
        return [Draw(seed) for seed in range(2 if form == "full" else 1)]

    def run(self, cell: Draw) -> list[Row]:
        self.runs.append(cell.seed)
        return [{"seed": cell.seed, "x": cell.seed / 3}]

    def recipe(self) -> Recipe:
        return Recipe("counting", "Fig. 0", self.cells, self.run, drawn, known)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()
    monkeypatch.setattr(running, "recipe_of", lambda name: {"counting": made.recipe()}[name])
    monkeypatch.setattr(running, "KEPT", tmp_path / "kept")
    return made


def made(seed: int, *, fresh: bool = False) -> tuple[list[Row], float]:
    return running.made("counting", Draw(seed), running.place_of("counting", Draw(seed)), fresh=fresh)


def test_a_finished_run_is_not_made_again(counting: Counting) -> None:
    first = made(1)
    assert made(1) == first
    made(2)
    assert counting.runs == [1, 2]


def test_fresh_runs_are(counting: Counting) -> None:
    made(1)
    made(1, fresh=True)
    assert counting.runs == [1, 1]


def test_an_interrupted_run_is_made_again(counting: Counting) -> None:
    """What it may have left is half a file, under another name."""
    made(1)
    (kept,) = running.KEPT.glob("*/*.json")
    kept.with_suffix(".part").write_text("[[")
    kept.unlink()
    made(1)
    assert counting.runs == [1, 1]


def test_a_run_is_kept_for_the_sources_it_came_from(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    made(1)
    monkeypatch.setattr(running, "sources", lambda name: b"changed")
    made(1)
    assert counting.runs == [1, 1]


def test_nothing_is_made_by_another_source_than_was_said(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = running.place_of("counting", Draw(1))
    monkeypatch.setattr(running, "sources", lambda name: b"changed")
    with pytest.raises(RuntimeError, match="the source of counting has changed"):
        running.made("counting", Draw(1), kept, fresh=False)
    assert counting.runs == []


PARENT = """
import multiprocessing, time
from pathlib import Path
from benchmarks.papers import running

def child(folder):
    running.prepare(folder)
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child, args=(Path("."),)).start()
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(running.FOLDER.parents[1])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(child)


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_sources_are_those_that_make_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "FOLDER", tmp_path)
    tmp_path.joinpath("a.py").write_text("from benchmarks.papers.b import x\nfrom benchmarks.papers.drawing import y\n")
    tmp_path.joinpath("b.py").write_text("from benchmarks.papers.a import z\nB = 1\n")
    tmp_path.joinpath("c.py").write_text("C = 1\n")
    tmp_path.joinpath("drawing.py").write_text("D = 1\n")
    sources = running.sources.__wrapped__  # what it has remembered is of other folders
    assert [name in sources("a") for name in (b"B = 1", b"C = 1", b"D = 1")] == [True, False, False]


def test_the_files_of_a_recipe(counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "papers.md")
    monkeypatch.setitem(tables.TABLES, "counting", lambda rows: [["x"], *([str(row["x"])] for row in rows)])
    places = "".join(f"<!-- {name} -->\n\n<!-- end of {name} -->\n" for name in ("counting", "oracles"))
    tables.PAGE.write_text(places)
    cells = counting.cells("full")
    rows = [row for cell in cells for row in counting.run(cell)]
    results.write(counting.recipe(), "full", cells, rows, 1.25)
    with (tmp_path / "results" / "counting.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"seed": "0", "x": "0.0"}, {"seed": "1", "x": "0.3333333333333333"}]
    about: dict[str, Any] = json.loads((tmp_path / "results" / "counting.json").read_text())
    assert (about["form"], about["seeds"], about["core_seconds"]) == ("full", [0, 1], 1.2)
    assert about["versions"].keys() == {"python", "torch", "numpy"}
    oracles = json.loads((tmp_path / "results" / "oracles.json").read_text())
    assert oracles == about["oracles"]
    assert [(one["name"], one["ok"]) for one in oracles] == [("sum", False)]
    page = tables.PAGE.read_text()
    assert "| 0.0 |\n| 0.3333333333333333 |\n\n*Full form, 1 core seconds" in page
    assert "| sum | 1 | 0 | 0.3333333333 | **no** |" in page
    image = tmp_path / "images" / "papers-counting.png"
    first = image.read_bytes()
    assert first.startswith(b"\x89PNG")
    image.unlink()
    results.draw(counting.recipe())
    assert image.read_bytes() == first


@pytest.mark.parametrize("name", command.NAMES)
def test_every_recipe_is_whole(name: str) -> None:
    """Its name is its module's, its runs are told apart, and the short form is the smaller one."""
    recipe = running.recipe_of(name)
    assert recipe.name == name
    for form in ("short", "full"):
        cells = [repr(cell) for cell in recipe.cells(form)]
        assert cells
        assert len(set(cells)) == len(cells)
    assert len(recipe.cells("short")) <= len(recipe.cells("full"))


def test_an_unknown_recipe_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["papers", "densty"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no recipe is called densty" in capsys.readouterr().err
