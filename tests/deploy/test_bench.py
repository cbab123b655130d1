"""``thresher bench``: what it measures comes out as a table for people or as JSON for programs."""

import json
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from typer.testing import CliRunner

from thresher.deploy.cli import app
from thresher.deploy.ray_cluster import requirement

SMALL = {
    "compress": ["--elements", "20000", "--densities", "1e-2", "--threads", "1"],
    "wire": ["--elements", "20000", "--densities", "1e-2"],
    "transport": ["--sizes", "20000", "--repetitions", "2"],
}
FIELDS = {
    "compress": [
        "elements", "density", "threads", "method", "seconds", "bandwidth_ratio_to_add", "peak_extra_bytes",
    ],
    "wire": [
        "elements", "density", "coding", "index_bits_per_element", "entropy_bits_per_element", "bytes_per_element",
        "encode_elements_per_second", "decode_elements_per_second",
    ],
    "transport": ["transport", "bytes", "microseconds_per_exchange", "megabytes_per_second"],
}  # fmt: skip


@pytest.mark.parametrize("command", ["compress", "wire"])
def test_json_has_the_promised_fields(command: str) -> None:
    """A list of objects with exactly these fields, and nothing else on standard output."""
    result = CliRunner().invoke(app, ["bench", command, *SMALL[command], "--json"])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert rows
    assert all(list(row) == FIELDS[command] for row in rows)
    assert all(row["elements"] == 20000 for row in rows)


def test_a_table_for_people() -> None:
    """Without --json, one row per measurement."""
    result = CliRunner().invoke(app, ["bench", "wire", *SMALL["wire"]], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "20,000" in result.stdout


def test_what_was_not_measured_is_told_beside_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, standard output still holds JSON alone."""
    monkeypatch.setattr(requirement, "version", _nothing_is_installed)
    result = CliRunner().invoke(app, ["bench", "transport", *SMALL["transport"], "--json"])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert [(row["transport"], row["bytes"]) for row in rows] == [("gRPC stream", 20000)]
    assert all(list(row) == FIELDS["transport"] for row in rows)
    assert "pip install 'thresher[ray]'" in result.stderr


def _nothing_is_installed(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize("wrong", ["", "many", "0", "1e-2,-1"])
def test_numbers_that_are_none(wrong: str) -> None:
    """Bad usage: exit code 2, and what would have been right."""
    result = CliRunner().invoke(app, ["bench", "wire", "--densities", wrong])
    assert result.exit_code == 2
    assert "no list of numbers above 0" in " ".join(result.output.split())
