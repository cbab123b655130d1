"""`thresher status` and `thresher top` as they are typed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from tests.deploy.test_watching import one_step
from typer.testing import CliRunner

from thresher.deploy.certificates import write_certificates
from thresher.deploy.in_process import InProcess, in_process
from thresher.deploy.watching_commands import status, top
from thresher.protos.credentials import TlsFiles

app = typer.Typer()
app.command()(status)
app.command()(top)
runner = CliRunner()


@pytest.mark.parametrize("command", ["status", "top"])
def test_every_command_explains_itself(command: str) -> None:
    told = runner.invoke(app, [command, "--help"])
    assert told.exit_code == 0
    assert "host:port,…" in told.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere"], "neither a folder here nor host:port"),
        (["status", "."], "no folder of a run"),
        (["status"], "nothing to look at"),
        (["top"], "nothing to look at"),
        (["status", "127.0.0.1:1", "--timeout", "0"], "--timeout must be"),
        (["status", "127.0.0.1:1", "--timeout", "nan"], "--timeout must be"),
        (["top", "127.0.0.1:1", "--interval", "-1"], "--interval must be"),
        (["top", "127.0.0.1:1", "--seconds", "inf"], "--seconds must be"),
        (["top", "127.0.0.1:1", "--tls-cert", "missing"], "go together"),
        (["top", "127.0.0.1:1", "--tls-ca", "missing"], "cannot be read"),
        (["status", "127.0.0.1:1", "--token-file", "missing"], "cannot be read"),
        (["status", "10.0.0.7:5000"], "would not be encrypted"),
    ],
)
def test_what_makes_no_sense_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = runner.invoke(app, arguments)
    assert told.exit_code == 2
    assert message in " ".join(re.sub(r"\x1b\[[0-9;]*m", "", told.output).split())


def test_a_run_that_serves_is_shown_with_exit_code_0() -> None:
    with in_process(shards=2, workers=1) as cluster:
        cluster.run(one_step)
        where = ",".join(cluster.addresses)
        table, asked = runner.invoke(app, ["status", where]), runner.invoke(app, ["status", where, "--json"])
        by_environment = runner.invoke(app, ["top", "--seconds", "5"], env={"THRESHER_SHARDS": where})
    assert (table.exit_code, asked.exit_code, by_environment.exit_code) == (0, 0, 0)
    assert table.output.count("SERVING: finished") == 2
    assert [shard["state"] for shard in json.loads(asked.output)["shards"]] == ["SERVING", "SERVING"]
    assert "has ended. 1 iterations" in by_environment.output


def test_a_run_that_does_not_serve_is_shown_with_exit_code_1() -> None:
    table = runner.invoke(app, ["status", "127.0.0.1:1"])
    asked = runner.invoke(app, ["status", "127.0.0.1:1", "--json"])
    watched = runner.invoke(app, ["top", "127.0.0.1:1", "--seconds", "0.2", "--interval", "0.1"])
    assert (table.exit_code, asked.exit_code, watched.exit_code) == (1, 1, 1)
    assert "shard 0 is SILENT" in table.output
    assert json.loads(asked.output)["shards"][0]["state"] == "SILENT"
    assert "shard 0 is SILENT" in watched.output


def test_tls_and_token_are_shown_and_their_lack_is_told(tmp_path: Path) -> None:
    """With an observer's certificate or token it is let in; without, or with nonsense, there is a row that says so."""
    pairs = write_certificates(tmp_path)
    token, wrong, tokens = (tmp_path / name for name in ("token", "wrong", "tokens"))
    for path, text in ((token, "a" * 40), (wrong, "b" * 40), (tokens, f"observer {'a' * 40}")):
        path.touch(mode=0o600)
        path.write_text(text, encoding="ascii")
    ca = ["--tls-ca", str(pairs["ca"][0])]
    pair = [*ca, "--tls-cert", str(pairs["observer"][0]), "--tls-key", str(pairs["observer"][1])]
    with in_process(shards=1, workers=1) as cluster:
        certified = TlsFiles(pairs["ca"][0], *pairs["shard"])
        for tls, needed, options, state in (
            (certified, None, pair, "SERVING"),
            (certified, None, ca, "SILENT"),  # the handshake fails, as with a shard that is no shard
            (certified, None, [], "SILENT"),
            (certified, tokens, pair, "FAILED"),
            (certified, tokens, [*pair, "--token-file", str(token)], "SERVING"),
            (None, tokens, ["--token-file", str(token)], "SERVING"),
            (None, tokens, ["--token-file", str(wrong)], "FAILED"),
            (None, tokens, [], "FAILED"),
        ):
            where = secured(cluster, tls, needed)
            assert said(where, options) == state, options
        watched = runner.invoke(app, ["top", *cluster.addresses])  # it would go on for good: nobody is let in
        assert watched.exit_code == 1
        assert "has failed: " in watched.output


def secured(cluster: InProcess, tls: TlsFiles | None, tokens: Path | None) -> str:
    """Start the shard again, with these."""
    cluster.kill(0)
    cluster._configs[0] = replace(cluster._configs[0], tls=tls, tokens=tokens)
    cluster.start(0)
    return cluster.addresses[0]


def said(where: str, options: list[str]) -> str:
    told = runner.invoke(app, ["status", where, "--json", *options])
    (shard,) = json.loads(told.output)["shards"]
    assert told.exit_code == (0 if shard["state"] == "SERVING" else 1)
    assert "a" * 40 not in told.output
    return str(shard["state"])
