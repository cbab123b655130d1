"""What a recipe leaves behind: a CSV of its rows, a JSON of how they came about, a figure, and all oracles in one."""

import csv
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.papers import tables
from benchmarks.papers.recipe import Form, Recipe, Row

RESULTS: Final = Path(__file__).parent / "results"
IMAGES: Final = Path(__file__).parents[2] / "docs" / "images"


def write(recipe: Recipe, form: Form, cells: Sequence[Any], rows: list[Row], seconds: float) -> None:
    """Write the files of ``recipe``; ``seconds`` is the time of one core that its runs took together."""
    RESULTS.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with RESULTS.joinpath(f"{recipe.name}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    about = {
        "shows": recipe.shows,
        "form": form,
        "runs": [repr(cell) for cell in cells],
        "seeds": sorted({cell.seed for cell in cells if hasattr(cell, "seed")}),
        "core_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy")},
        "oracles": recipe.oracles(rows),
    }
    RESULTS.joinpath(f"{recipe.name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    _save(recipe, rows)
    _gather_oracles()
    print_page(recipe.name)


def rows_of(name: str) -> list[Row]:
    """The table of the recipe ``name`` as it was written."""
    with RESULTS.joinpath(f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return [
            {column: _read(text) for column, text in row.items() if text}  # a row may lack columns of others
            for row in csv.DictReader(file)
        ]


def draw(recipe: Recipe) -> None:
    """Draw the figure of ``recipe`` again, and print its table again, from its rows."""
    _save(recipe, rows_of(recipe.name))
    print_page(recipe.name)


def print_page(name: str) -> None:
    """Print the table of the recipe ``name``, and that of the oracles, into docs/papers.md."""
    about = json.loads(RESULTS.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    oracles = json.loads(RESULTS.joinpath("oracles.json").read_text(encoding="utf-8"))
    page = tables.put(tables.PAGE.read_text(encoding="utf-8"), name, tables.block(name, about, rows_of(name)))
    page = tables.put(page, "oracles", tables.markdown(tables.of_oracles(oracles)))
    tables.PAGE.write_text(page, encoding="utf-8")


def _save(recipe: Recipe, rows: list[Row]) -> None:
    IMAGES.mkdir(exist_ok=True)
    recipe.draw(rows).savefig(IMAGES / f"papers-{recipe.name}.png", dpi=110, metadata={"Software": None})


def _gather_oracles() -> None:
    files = sorted(path for path in RESULTS.glob("*.json") if path.name != "oracles.json")
    oracles = [one for path in files for one in json.loads(path.read_text(encoding="utf-8"))["oracles"]]
    RESULTS.joinpath("oracles.json").write_text(json.dumps(oracles, indent=1) + "\n", encoding="utf-8")


def _read(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
