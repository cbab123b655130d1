"""The commands as they are typed: what they say and how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from thresher.deploy.cli import app
from thresher.deploy.ray_cluster.cluster import ShardStatus
from thresher.deploy.ray_cluster.commands import show

pytestmark = pytest.mark.xdist_group("ray")

runner = CliRunner()


@pytest.mark.parametrize("command", [[], ["up"], ["status"], ["down"], ["targets"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    told = runner.invoke(app, ["ray", *command, "--help"])
    assert told.exit_code == 0
    assert "Usage" in told.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "two words", "--state-dir", "/shared", "--density", "0.1"], "is no name of a run"),
        (["up", "digits", "--density", "0.1"], "name --state-dir"),
        (["up", "digits", "--density", "0.1", "--durability", "none", "--state-dir", "/shared"], "keeps nothing"),
        (["up", "digits", "--state-dir", "/shared"], "exactly one of threshold, density, budget and precision"),
        (["up", "digits", "--state-dir", "/shared", "--density", "2"], "density must be in (0, 1]"),
        (["up", "digits", "--state-dir", "/shared", "--density", "0.1", "--shards", "0"], "at least one shard"),
        (["up", "digits", "--state-dir", "/shared", "--density", "0.1", "--tls-cert", "x"], "go together"),
        (["up", "digits", "--state-dir", "/shared", "--density", "0.1", "--mode", "chaos"], "is not one of"),
        (["status", "digits", "--address", "127.0.0.1:1"], "ray start --head"),
        (["down", "digits", "--address", "127.0.0.1:1"], "ray start --head"),
        (["targets", "digits", "--address", "127.0.0.1:1"], "ray start --head"),
    ],
)
def test_what_makes_no_sense_is_bad_usage(arguments: list[str], message: str) -> None:
    """Exit code 2, and what is wrong."""
    told = runner.invoke(app, ["ray", *arguments])
    assert told.exit_code == 2
    assert message in " ".join(re.sub(r"\x1b\[[0-9;]*m", "", told.output).split())


def test_the_table_shows_what_is_known_and_why_the_rest_is_not() -> None:
    """A row for each shard; a dash where nothing is known, and why below the table."""
    one = ShardStatus(
        0, "SERVING", "training", "10.0.0.1", "10.0.0.1:5000", "10.0.0.1:9000", 7, 1234, 4, 56789, 4321, 1.5
    )  # fmt: skip
    other = ShardStatus(1, "SILENT", "has not answered", "10.0.0.2")
    lines = shown([one, other], width=200)
    known, unknown = (next(line for line in lines if word in line) for word in ("SERVING", "SILENT"))
    for part in ("10.0.0.1:5000", "1,234", "56,789", "4,321", "1.5 s ago", "SERVING: training"):
        assert part in known
    assert "10.0.0.2" in unknown
    assert unknown.count("–") == 5
    assert lines[-1] == "shard 1 is SILENT: has not answered"


def shown(shards: list[ShardStatus], width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as printed:
        show("digits", shards, console)
    return printed.get().splitlines()


@given(st.integers(80, 200), st.integers(0, 10**7), st.integers(0, 10**15))
def test_no_state_is_cut_and_no_number(width: int, version: int, count: int) -> None:
    """On no screen, nor in a pipe, which is 80 characters wide: rather a column is missing."""
    address = "100.100.100.100:50000"
    reason = "has not answered in 5 s: it is starting, recovering, or waiting for a node"
    one = ShardStatus(0, "SERVING", "training", "", address, "", 7, version, 64, count, count, 3.0)
    lines = shown([one, ShardStatus(1, "SILENT", reason, "100.100.100.101")], width)
    assert "…" not in "".join(lines)
    (row,) = (line for line in lines if address in line)
    assert "SERVING: training" in row
    assert f"{version:,}" in row
    assert (f"{count:,}" in row) or not any("bytes" in line for line in lines)
    assert lines[-1] == f"shard 1 is SILENT: {reason}"
    assert all(len(line) <= width for line in lines[:-1])


@pytest.mark.slow
def test_a_run_from_up_to_down(one_node: str, tmp_path: Path) -> None:
    """Typed one after the other, each in a process of its own: the run outlives them."""

    def typed(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "thresher.deploy", "ray", *arguments, "--address", one_node]
        wide = {**os.environ, "COLUMNS": "160"}
        ended = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=100, check=False)
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    begin = ("up", "digits", "--shards", "2", "--density", "0.1", "--state-dir", str(tmp_path), "--deadline", "90")
    typed(*begin, code=2)  # plain text beyond this machine was not asked for
    typed(*begin, "--insecure")
    typed(*begin, "--insecure", code=2)
    shown = json.loads(typed("status", "digits", "--json"))
    assert [(one["shard"], one["state"], one["version"]) for one in shown] == [(0, "SERVING", 0), (1, "SERVING", 0)]
    assert "SERVING" in typed("status", "digits")
    shards, workers = json.loads(typed("targets", "digits"))
    assert (len(shards["targets"]), workers["targets"]) == (2, [])
    typed("targets", "digits", "--output", str(tmp_path / "targets.json"))
    assert json.loads((tmp_path / "targets.json").read_text(encoding="utf-8")) == [shards, workers]
    listening = [sys.executable, "-m", "thresher.deploy", "ray", "targets", "digits", "--address", one_node]
    with subprocess.Popen([*listening, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        where = json.loads(process.stdout.readline())["address"]
        with urllib.request.urlopen(f"http://{where}", timeout=60) as answer:
            assert json.load(answer) == [shards, workers]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    typed("down", "digits")
    typed("status", "digits", code=2)
    typed("down", "digits", code=2)
