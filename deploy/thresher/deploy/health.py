"""``thresher health``: whether shards serve, for whoever starts them again or sends them work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from thresher.deploy.exit_codes import errors_told
from thresher.deploy.watching_commands import Insecure, Timeout, TlsCa, TokenFile, check_seconds
from thresher.protos.credentials import Credentials, TlsFiles
from thresher.protos.errors import ConfigurationError

SERVING: Final = "SERVING"

# A shard's own certificate is good for servers only: what its health check shows has variables of its own.
ReaderCert = Annotated[
    Path | None,
    typer.Option(envvar=["THRESHER_OBSERVER_CERT", "THRESHER_TLS_CERT"], help="PEM: the certificate to show."),
]
ReaderKey = Annotated[
    Path | None, typer.Option(envvar=["THRESHER_OBSERVER_KEY", "THRESHER_TLS_KEY"], help="PEM: its private key.")
]


def health(
    where: Annotated[
        str, typer.Argument(envvar="THRESHER_SHARDS", help="host:port,… of the shards.")
    ] = "127.0.0.1:50051",
    timeout: Timeout = 3.0,
    tls_ca: TlsCa = None,
    tls_cert: ReaderCert = None,
    tls_key: ReaderKey = None,
    token_file: TokenFile = None,
    *,
    insecure: Insecure = False,
) -> None:
    """Say of each shard whether it serves. Exit code 1 when one does not: it starts, drains, failed or is not there."""
    with errors_told(Console(stderr=True)):
        check_seconds(timeout=timeout)
        tls = TlsFiles(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None
        addresses = [address for address in where.split(",") if address]
        states = ask(addresses, Credentials(tls, token_file), timeout, insecure=insecure)
        for address, state in zip(addresses, states, strict=True):
            typer.echo(f"{address} {state}")
        if any(state != SERVING for state in states):
            raise typer.Exit(1)


def ask(addresses: Sequence[str], credentials: Credentials, timeout: float, *, insecure: bool) -> list[str]:
    """Return for each shard what it says of itself; of one that says nothing, the reason. All are asked at once.

    Args:
        addresses: ``host:port`` of each.
        credentials: What is shown to the shards, and trusted.
        timeout: Seconds for all of them together.
        insecure: Plain text beyond this machine is fine.

    Raises:
        ConfigurationError: when there is no address, or one is none, or plain text would leave this machine unasked.
    """
    # gRPC takes longer to import than `thresher --help` should.
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    from thresher.protos.transport import channel, check_address  # noqa: PLC0415

    if not addresses:
        raise ConfigurationError("no shard is named; write host:port,host:port,…")
    for address in addresses:
        check_address(address, insecure=insecure, encrypted=credentials.tls is not None)
    opened = [channel(address, credentials) for address in addresses]
    request = health_pb2.HealthCheckRequest()
    stubs: list[Any] = [health_pb2_grpc.HealthStub(one) for one in opened]
    answers = [stub.Check.future(request, timeout=timeout) for stub in stubs]
    states: list[str] = []
    for answer in answers:
        try:
            states.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.result().status))
        except grpc.RpcError:
            states.append(f"{answer.code().name}: {answer.details()}")
    for one in opened:
        one.close()
    return states
