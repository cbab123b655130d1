"""``thresher advise``: the command."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from thresher.deploy.advise.question import Question, read_densities
from thresher.deploy.advise.rates import read_rate
from thresher.deploy.exit_codes import errors_told
from thresher.deploy.watching_commands import Insecure, TlsCa, TlsCert, TlsKey, TokenFile
from thresher.protos.errors import ConfigurationError

_DEFAULT_ROUND_TRIP: Final = 0.001

Where = Annotated[
    str | None,
    typer.Argument(
        envvar="THRESHER_SHARDS",
        help="host:port,… of the shards, ray://NAME, or the folder of a run that is going. Without: see --bandwidth.",
    ),
]


def advise(  # noqa: PLR0913 - one parameter per option
    context: typer.Context,
    where: Where = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="package.module:function or file.py:function that returns the model.")
    ] = None,
    parameters: Annotated[int | None, typer.Option(help="Or how many parameters it has.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of an earlier run: its size, density and seconds.")] = None,
    compute: Annotated[
        float | None, typer.Option(help="Seconds of a forward and backward pass; by default from --run or --model.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Workers; by default as in --run, or else 2.")] = None,
    workers_here: Annotated[int, typer.Option(help="How many of them share a host, its link and its cores.")] = 1,
    densities: Annotated[str, typer.Option(help="Densities to compare, beside that of --run.")] = "0.1,0.01,0.001",
    bandwidth: Annotated[
        str | None, typer.Option(help="Link of a worker's host, such as 100mbit, where no shards are named.")
    ] = None,
    rtt: Annotated[
        float | None, typer.Option(help="Round trip in seconds, beside --bandwidth; by default 0.001.")
    ] = None,
    shard_bandwidth: Annotated[
        str | None, typer.Option(help="Link of a shard's host, where it is faster than it looks from here.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Shards, where none are named; by default as in --run.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to look for the shards.")] = 10.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure link and machine, and predict what a step takes with each setting, and whether compressing pays."""
    with errors_told(Console(stderr=True)):
        source = context.get_parameter_source("where")
        if bandwidth is not None and source is not None and source.name == "ENVIRONMENT":
            where = None  # who describes a link has not named these shards
        _check_link(where, {"--bandwidth": bandwidth, "--rtt": rtt, "--shards": shards})
        question = Question(
            model, parameters, run, compute, workers, workers_here, shards, read_densities(densities),
            None if bandwidth is None else read_rate(bandwidth), _DEFAULT_ROUND_TRIP if rtt is None else rtt,
            None if shard_bandwidth is None else read_rate(shard_bandwidth), timeout,
        )  # fmt: skip
        from thresher.deploy.advise import advice  # noqa: PLC0415 - it takes torch, and `--help` none
        from thresher.deploy.advise.study import study  # noqa: PLC0415
        from thresher.deploy.watching_places import Access, find  # noqa: PLC0415

        place = None
        if where is not None:
            place = find(where, Access(tls_ca, tls_cert, tls_key, token_file, insecure))
        found = study(question, place)
        if as_json:
            typer.echo(json.dumps(advice.document(found)))
        else:
            advice.show(found, Console())


def _check_link(where: str | None, described: Mapping[str, object]) -> None:
    """Refuse options that describe a link or shards beside shards that are measured, and would say nothing.

    Raises:
        ConfigurationError: naming them.
    """
    ignored = " and ".join(option for option, value in described.items() if value is not None)
    if where is not None and ignored:
        raise ConfigurationError(
            f"{ignored} beside the shards {where}: these are counted, and the link to them is measured; leave out the "
            "one or the other"
        )
    if described["--rtt"] is not None and described["--bandwidth"] is None:
        raise ConfigurationError("--rtt says nothing without --bandwidth: name both, or shards that can be measured")
