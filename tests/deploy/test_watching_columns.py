"""Tables that fit: rather a column is missing than a cell cut."""

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from thresher.deploy.watching_columns import Row, fitting


def drawn(rows: list[Row], width: int, title: str = "") -> list[str]:
    console = Console(width=width)
    with console.capture() as printed:
        console.print(fitting(title, rows, console))
    return printed.get().splitlines()


@given(st.integers(80, 200), st.lists(st.integers(1, 12), min_size=5, max_size=12))
def test_no_cell_is_cut_and_the_first_columns_are_there(width: int, lengths: list[int]) -> None:
    row: Row = {f"c{index}": "x" * length for index, length in enumerate(lengths)}
    lines = drawn([row, row], width)
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    assert all(heading in lines[1] for heading in list(row)[:4])


def test_a_wider_screen_shows_more() -> None:
    row: Row = {f"heading {index}": "x" * 8 for index in range(12)}
    assert "heading 11" not in drawn([row], 80)[1]
    assert "heading 11" in drawn([row], 200)[1]


def test_brackets_are_no_markup() -> None:
    row: Row = {"state": "[red]", "where": "[::1]:5000", "c": Text("[b]"), "d": "", "e": ""}
    lines = drawn([row], 80, "run [bold]")
    assert all(part in "".join(lines) for part in ("[red]", "[::1]:5000", "[b]", "run [bold]"))
