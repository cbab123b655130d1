"""Tables that have as many of their columns as a screen has room for."""

from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = Mapping[str, str | Text]
"""What a row shows under which heading, that which is needed most first."""

_LEFT: Final = ("state", "where")
_ENDLESS: Final = 10_000
_LEAST_COLUMNS: Final = 4  # they fit into 80 characters


def fitting(title: str, rows: Sequence[Row], console: Console) -> Table:
    """Draw rows, one or more. Of a narrow screen the last columns are left out, so that no cell is cut."""
    endless = console.options.update(width=_ENDLESS)
    tables = [_table(title, rows, columns) for columns in range(_LEAST_COLUMNS, len(rows[0]) + 1)]
    fits = [table for table in tables if console.measure(table, options=endless).maximum <= console.width]
    return fits[-1] if fits else tables[0]


def _table(title: str, rows: Sequence[Row], columns: int) -> Table:
    table = Table(title=Text(title), title_justify="left")
    headings = list(rows[0])[:columns]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[heading]) for heading in headings))
    return table


def _cell(content: str | Text) -> Text:
    return content if isinstance(content, Text) else Text(content)  # or brackets were taken for markup
