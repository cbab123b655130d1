"""``thresher status`` and ``thresher top`` as they are typed."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from thresher.deploy.exit_codes import errors_told
from thresher.protos.errors import ConfigurationError

Where = Annotated[
    str | None,
    typer.Argument(
        help="host:port,… of the shards, ray://NAME, or the folder of a run; by default runs/latest, or else "
        "THRESHER_SHARDS."
    ),
]
TlsCa = Annotated[
    Path | None, typer.Option(envvar="THRESHER_TLS_CA", help="PEM: whose certificates the shards must show.")
]
TlsCert = Annotated[Path | None, typer.Option(envvar="THRESHER_TLS_CERT", help="PEM: the certificate to show.")]
TlsKey = Annotated[Path | None, typer.Option(envvar="THRESHER_TLS_KEY", help="PEM: its private key.")]
TokenFile = Annotated[Path | None, typer.Option(envvar="THRESHER_TOKEN_FILE", help="File of the token to show.")]
Insecure = Annotated[bool, typer.Option(envvar="THRESHER_INSECURE", help="Plain text beyond this machine is fine.")]
Timeout = Annotated[float, typer.Option(help="Seconds after which a shard that has not answered is silent.")]
Seconds = Annotated[float | None, typer.Option(help="End after so many seconds; by default when the run does.")]
Interval = Annotated[float, typer.Option(help="Seconds between two looks.")]


def status(
    where: Where = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    timeout: Timeout = 5.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
) -> None:
    """Show how shards and workers stand. Exit code 1 when a shard does not serve."""
    with errors_told(Console(stderr=True)):
        check_seconds(timeout=timeout)
        from thresher.deploy import status as looking  # noqa: PLC0415 - it takes torch, and `--help` none
        from thresher.deploy.watching_places import Access, find  # noqa: PLC0415

        place = find(where, Access(tls_ca, tls_cert, tls_key, token_file, insecure))
        looks = looking.look_once(place, timeout)
        if as_json:
            typer.echo(json.dumps(looking.document(place, looks)))
        else:
            looking.show(place, looks, Console())
        if not looking.all_serve(looks):
            raise typer.Exit(1)


def top(
    where: Where = None,
    *,
    seconds: Seconds = None,
    interval: Interval = 1.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
) -> None:
    """Watch a run: how fast it goes and what it moves. Ends with it, or by Ctrl-C."""
    with errors_told(Console(stderr=True)):
        check_seconds(interval=interval, **({} if seconds is None else {"seconds": seconds}))
        from thresher.deploy import top as following  # noqa: PLC0415 - it takes torch, and `--help` none
        from thresher.deploy.watching_places import Access, find  # noqa: PLC0415

        place = find(where, Access(tls_ca, tls_cert, tls_key, token_file, insecure))
        until = math.inf if seconds is None else seconds
        if not following.follow(place, Console(), seconds=until, interval=interval):
            raise typer.Exit(1)


def check_seconds(**given: float) -> None:
    """Raise ConfigurationError for an option, by its name, that is no number of seconds."""
    for name, value in given.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"--{name} must be a finite number of seconds > 0, not {value}")
