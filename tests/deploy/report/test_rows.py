"""Rows as columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.deploy.report.written import write_lines

from thresher.deploy.report.rows import Sparse, read_rows
from thresher.protos.errors import ConfigurationError

numbers = st.floats(allow_nan=False, allow_infinity=False)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


@in_one_folder
@given(st.lists(st.fixed_dictionaries({"a": numbers, "b": st.none() | numbers, "text": st.text()}), max_size=9))
def test_columns_are_what_the_lines_said(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Null is NaN; fields that are not asked for are passed over."""
    read = read_rows(write_lines(tmp_path / "rows.jsonl", rows), ("a",), ("b",))
    assert read.columns["a"].tolist() == [row["a"] for row in rows]
    assert np.array_equal(read.columns["b"], [np.nan if row["b"] is None else row["b"] for row in rows], equal_nan=True)
    assert read.columns.keys() == {"a", "b"}
    assert not read.is_torn


@in_one_folder
@given(st.lists(st.fixed_dictionaries({"a": numbers}), min_size=1, max_size=9), st.data())
def test_a_torn_end_costs_its_own_row_only(tmp_path: Path, rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """Cut anywhere in the last line, all others are read, and it is said."""
    path = write_lines(tmp_path / "rows.jsonl", rows)
    text = path.read_bytes()
    last = len(json.dumps(rows[-1]))
    path.write_bytes(text[: len(text) - 1 - data.draw(st.integers(1, last - 1))])
    read = read_rows(path, ("a",))
    assert read.is_torn
    assert read.columns["a"].tolist() == [row["a"] for row in rows[:-1]]


def test_a_row_is_shown_with_its_position(tmp_path: Path) -> None:
    """For what no column holds."""
    seen: list[tuple[int, object]] = []
    path = write_lines(tmp_path / "rows.jsonl", [{"a": 1, "of": ["x"]}, {"a": 2, "of": []}])
    read_rows(path, ("a",), take=lambda position, row: seen.append((position, row["of"])))
    assert seen == [(0, ["x"]), (1, [])]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{}", "the field 'a' is missing"),
        ('{"a": "1"}', "must be real number"),
        ('{"a": null}', "must be real number"),
        ('{"a": 1' + "0" * 400 + "}", "too large"),
        ("[1]", "list indices"),
        ("7", "not subscriptable"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("\x00\x00", "Expecting value"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, why: str) -> None:
    """File and line, and what to do."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=rf"rows\.jsonl, line 2 is no row .*{why}.*move the file away"):
        read_rows(path, ("a",))


def test_bytes_that_are_no_text_are_no_row(tmp_path: Path) -> None:
    """A binary file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\xfd\n")
    with pytest.raises(ConfigurationError, match="line 1 is no row"):
        read_rows(path, ("a",))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A folder in its place."""
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_rows(tmp_path, ("a",))


@given(st.dictionaries(st.integers(0, 30), numbers), st.integers(0, 5))
def test_sparse_columns_have_a_value_where_one_was_put(values: dict[int, float], more: int) -> None:
    """NaN elsewhere, also at the end."""
    sparse = Sparse()
    for position in sorted(values):
        sparse.put(position, "a", values[position])
    length = max(values, default=-1) + 1 + more
    expected = [values.get(position, np.nan) for position in range(length)]
    assert np.array_equal(sparse.columns(length).get("a", np.full(length, np.nan)), expected, equal_nan=True)
