"""Runs recipes: their cells on a pool of processes, one core each, kept as soon as they are finished."""

import importlib
import json
import os
import re
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.papers import data, results
from benchmarks.papers.recipe import Form, Recipe, Row

KEPT: Final = Path("runs/papers")
FOLDER: Final = Path(__file__).parent


@cache
def recipe_of(name: str) -> Recipe:
    """The recipe of the module ``name``."""
    found: Recipe = importlib.import_module(f"benchmarks.papers.{name}").RECIPE
    return found


def prepare(folder: Path) -> None:
    """Make this process one that runs cells: on one core, with the data in ``folder``, and not without its parent."""
    torch.set_num_threads(1)
    data.use(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool does not notice that its parent was killed, and would go on with what is queued."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def sources(name: str) -> bytes:
    """The source of the module ``name``, and of all of this folder that it imports, when it is first asked for."""
    found: dict[str, bytes] = {}
    wanted = [name]
    while wanted:
        module = wanted.pop()
        path = FOLDER / f"{module}.py"
        if module in found or module == "drawing" or not path.is_file():
            continue  # how figures look changes nothing in the rows
        found[module] = path.read_bytes()
        imported = re.findall(rb"^from benchmarks\.papers\.(\w+)", found[module], re.MULTILINE)
        wanted += [each.decode() for each in imported]
    return b"".join(found[module] for module in sorted(found))


def place_of(name: str, cell: Any) -> Path:  # noqa: ANN401 - a recipe's own
    """Where the rows of one run are kept.

    They belong to the function that makes them, as its source is: recipes that run equal cells by the same one share
    them.
    """
    maker = recipe_of(name).run.__module__.rpartition(".")[2]
    return KEPT / maker / f"{sha256(repr(cell).encode() + sources(maker)).hexdigest()[:16]}.json"


def made(name: str, cell: Any, kept: Path, *, fresh: bool) -> tuple[list[Row], float]:  # noqa: ANN401 - a recipe's own
    """The rows of one run and the core seconds it took, from ``kept`` if they are there, unless ``fresh``.

    Raises:
        RuntimeError: the sources have changed since the parent said where the rows are to be kept.
    """
    if kept.exists() and not fresh:
        rows, seconds = json.loads(kept.read_text(encoding="utf-8"))
        return rows, seconds
    if place_of(name, cell) != kept:
        raise RuntimeError(f"the source of {name} has changed since this command began; begin again")
    begin = time.process_time()
    rows = recipe_of(name).run(cell)
    seconds = time.process_time() - begin
    kept.parent.mkdir(parents=True, exist_ok=True)
    whole = kept.with_suffix(".part")
    whole.write_text(json.dumps([rows, seconds]), encoding="utf-8")
    whole.replace(kept)  # never half a file, wherever this is interrupted
    return rows, seconds


def run(names: list[str], form: Form, *, jobs: int, folder: Path, fresh: bool = False) -> None:
    """Run the recipes ``names``, ``jobs`` cells at a time, and write what they give."""
    cells = {name: recipe_of(name).cells(form) for name in names}
    with ProcessPoolExecutor(jobs, get_context("spawn"), prepare, (folder.resolve(),)) as pool:
        runs = {
            name: [pool.submit(made, name, cell, place_of(name, cell), fresh=fresh) for cell in cells[name]]
            for name in names
        }
        try:
            for name in names:
                finished = [each.result() for each in runs[name]]
                seconds = sum(seconds for _, seconds in finished)
                results.write(
                    recipe_of(name), form, cells[name], [row for rows, _ in finished for row in rows], seconds
                )
                print(f"{name}: {len(finished)} runs, {seconds:.0f} s of one core", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # a failure is told at once, not after all the others
            raise
