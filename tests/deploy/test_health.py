"""`thresher health`: what shards say of themselves, and what is said of those that say nothing."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from tests.deploy.test_watching_commands import secured
from typer.testing import CliRunner, Result

from thresher.deploy.certificates import write_certificates
from thresher.deploy.health import health
from thresher.deploy.in_process import in_process
from thresher.protos.credentials import TlsFiles

app = typer.Typer()
app.command()(health)
runner = CliRunner()


def said(result: Result) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


@pytest.fixture
def silent() -> Iterator[str]:
    """An address at which connections are taken, and nothing is ever said."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_shards_that_serve_are_healthy_and_one_that_is_killed_is_not() -> None:
    with in_process(shards=2, workers=1) as cluster:
        where = ",".join(cluster.addresses)
        told = runner.invoke(app, [where])
        assert (told.exit_code, told.stdout) == (0, "".join(f"{one} SERVING\n" for one in cluster.addresses))
        assert runner.invoke(app, [], env={"THRESHER_SHARDS": where}).exit_code == 0
        cluster.kill(1)
        told = runner.invoke(app, [where])
        assert told.exit_code == 1
        first, second = told.stdout.splitlines()
        assert first == f"{cluster.addresses[0]} SERVING"
        assert second.startswith(f"{cluster.addresses[1]} UNAVAILABLE: ")


def test_one_that_says_nothing_is_not_waited_for(silent: str) -> None:
    told = runner.invoke(app, [silent, "--timeout", "0.2"])
    assert told.exit_code == 1
    assert told.stdout.startswith(f"{silent} DEADLINE_EXCEEDED: ") or told.stdout.startswith(f"{silent} UNAVAILABLE: ")


def test_a_shard_with_mtls_is_asked_with_the_certificate_of_a_reader(tmp_path: Path) -> None:
    """In a shard's own container THRESHER_TLS_CERT is the shard's, which is good for servers only."""
    made = write_certificates(tmp_path)
    (ca, _), shard, observer = made["ca"], made["shard"], made["observer"]
    own = {"THRESHER_TLS_CA": str(ca), "THRESHER_TLS_CERT": str(shard[0]), "THRESHER_TLS_KEY": str(shard[1])}
    reader = {"THRESHER_OBSERVER_CERT": str(observer[0]), "THRESHER_OBSERVER_KEY": str(observer[1])}
    with in_process(shards=1, workers=1) as cluster:
        where = secured(cluster, TlsFiles(ca, *shard), None)
        assert runner.invoke(app, [where], env={**own, **reader}).stdout == f"{where} SERVING\n"
        for environment in (own, {}):
            told = runner.invoke(app, [where], env=environment)
            assert told.exit_code == 1
            assert told.stdout.startswith(f"{where} UNAVAILABLE: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["127.0.0.1:1", "--timeout", "0"], "--timeout must be"),
        (["127.0.0.1:1", "--timeout", "nan"], "--timeout must be"),
        (["10.0.0.7:5000"], "would not be encrypted"),
        (["nowhere"], "is not an address"),
        ([","], "no shard is named"),
        (["127.0.0.1:1", "--tls-cert", "missing"], "go together"),
        (["127.0.0.1:1", "--tls-ca", "missing"], "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_bad_usage(arguments: list[str], message: str) -> None:
    told = runner.invoke(app, arguments)
    assert told.exit_code == 2
    assert message in said(told)
