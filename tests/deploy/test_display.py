"""The live display."""

import io

import pytest
from rich.console import Console

from thresher.deploy.display import COLUMNS, Display, Picture, table_of
from thresher.v1 import aggregation_pb2 as pb


def picture() -> Picture:
    """Two shards, one worker that is in its fifth of ten epochs, and one that has not come."""
    shards = [
        pb.StatisticsResponse(
            shard=index,
            state="training",
            version=40,
            numel=numel,
            update_density=0.05,
            workers=[
                pb.WorkerStatistics(
                    rank=0,
                    state="exchanging",
                    steps=40,
                    push_bytes=1000,
                    pull_bytes=3000,
                    pushed_elements=40,
                    pushable_elements=40 * numel,
                    density=density,
                ),
                pb.WorkerStatistics(rank=1, state="waited for"),
            ],
        )
        for index, numel, density in ((0, 100, 0.04), (1, 300, 0.0))
    ]
    return Picture("title", shards, [{"loss": 0.25, "epochs": 10}, {}], 20.0, {0: (4, 40)})


def test_a_worker_is_summed_over_its_shards() -> None:
    """Density is weighted by slice, bytes add up, the ratio is dense over moved, time left follows the epochs."""
    line = dict(zip(COLUMNS, picture().lines()[0], strict=True))
    assert line == {
        "": "worker 0", "state": "exchanging", "step": "40", "loss": "0.2500", "density": "1.00%", "up": "2 kB",
        "down": "6 kB", "ratio": "16.0", "left": "30 s",
    }  # fmt: skip


def test_there_is_a_line_for_everybody() -> None:
    """Workers first, then shards; a worker that has not come says so."""
    lines = picture().lines()
    assert [line[0] for line in lines] == ["worker 0", "worker 1", "shard 0", "shard 1"]
    assert lines[1][1] == "waited for"
    assert all(len(line) == len(COLUMNS) for line in lines)


def test_before_any_shard_answers() -> None:
    """Nothing is known yet: the workers are starting."""
    assert Picture("title", [], [{}], 0.0, {}).lines()[0][:2] == ("worker 0", "starting")


def test_a_terminal_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the table is drawn in place, and gone at the end."""
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Display(console) as display:
        display.show(picture())
        assert isinstance(console.file, io.StringIO)
        drawn = console.file.getvalue()
    for cell in ("worker 0", "exchanging", "0.2500", "shard 1"):
        assert cell in drawn


@pytest.mark.parametrize(("is_terminal", "kind"), [(False, "xterm-256color"), (True, "dumb")])
def test_no_terminal_no_table(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, kind: str) -> None:
    """Elsewhere, and where nothing can be redrawn, nothing is drawn at once, so that a log stays readable."""
    monkeypatch.setenv("TERM", kind)
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    with Display(console) as display:
        display.show(picture())
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_the_table_has_all_columns() -> None:
    """The table's columns are those the lines are made for."""
    assert [str(column.header) for column in table_of(picture()).columns] == list(COLUMNS)
