"""`thresher advise` as it is typed."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from thresher.deploy.advise.command import advise
from thresher.deploy.in_process import in_process

app = typer.Typer()
app.command()(advise)
runner = CliRunner()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers that need not be exact."""
    monkeypatch.setattr("thresher.deploy.advise.link._MOST_BYTES", 1 << 20)


def test_it_explains_itself() -> None:
    told = runner.invoke(app, ["--help"])
    assert told.exit_code == 0
    assert "host:port,…" in told.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "how large is the model"),
        (["--parameters", "5", "--model", "a:b"], "not both"),
        (["--model", "nothing"], "names no function"),
        (["--parameters", "5", "--bandwidth", "fast"], "is no bandwidth"),
        (["--parameters", "5", "--densities", "few"], "--densities are numbers"),
        (["--parameters", "5", "--densities", "2"], "density"),
        (["--parameters", "5", "--run", "."], "no folder of a run"),
        (["nowhere", "--parameters", "5"], "neither a folder here nor host:port"),
        (["127.0.0.1:1", "--parameters", "5", "--bandwidth", "1mbit"], "--bandwidth beside the shards 127.0.0.1:1"),
        (["127.0.0.1:1", "--parameters", "5", "--shards", "2", "--rtt", "1"], "--rtt and --shards beside the shards"),
        (["--parameters", "5", "--rtt", "1"], "--rtt says nothing without --bandwidth"),
        (["10.0.0.7:5000", "--parameters", "5"], "would not be encrypted"),
    ],
)
def test_what_makes_no_sense_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = runner.invoke(app, arguments)
    assert told.exit_code == 2
    assert message in " ".join(re.sub(r"\x1b\[[0-9;]*m", "", told.output).split())


def test_shards_that_are_not_there_end_it_with_their_names() -> None:
    told = runner.invoke(app, ["127.0.0.1:1", "--parameters", "5", "--timeout", "0.2"])
    assert told.exit_code == 1
    assert "shard 0 at 127.0.0.1:1" in told.output


def test_json_is_one_object() -> None:
    """Measured through a real shard."""
    with in_process(shards=1, workers=1) as cluster:
        arguments = [cluster.addresses[0], "--parameters", "1000", "--densities", "0.1", "--compute", "0.05", "--json"]
        told = runner.invoke(app, arguments)
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found.keys() >= {"link", "machine", "model", "predictions", "break_even_bandwidth", "advice"}
    assert [one["seconds"] > 0.05 for one in found["predictions"]] == [True] * 5
    assert [one["bytes"] for one in found["delays"]["up"]] == [0, 16 << 10, 64 << 10, 256 << 10]


def test_a_described_link_needs_no_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment names some."""
    monkeypatch.setenv("THRESHER_SHARDS", "127.0.0.1:1")
    told = runner.invoke(app, ["--parameters", "100000", "--bandwidth", "1mbit", "--densities", "0.01"])
    assert told.exit_code == 0
    assert "Compressing pays" in told.output


def test_shards_that_the_environment_names_are_not_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRESHER_SHARDS", "127.0.0.1:1")
    told = runner.invoke(app, ["--parameters", "5", "--shards", "3"])
    assert told.exit_code == 2
    assert "--shards beside the shards" in told.output
