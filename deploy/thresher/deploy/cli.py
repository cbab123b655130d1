"""The command line. Data goes to stdout, logs to stderr; exit codes: 0 done, 1 failed, 2 bad usage, 128 + signal."""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from thresher.deploy import bench
from thresher.protos.errors import ConfigurationError, ThresherError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench.app, name="bench")


class RuleChoice(StrEnum):
    """What ``--rule`` takes."""

    BUDGET = "budget"
    CALIBRATED = "calibrated"
    PAPER = "paper"


class PlacementChoice(StrEnum):
    """What ``--placement`` takes."""

    GRADIENT = "gradient"
    UPDATE = "update"


class NonFiniteChoice(StrEnum):
    """What ``--nonfinite`` takes."""

    REFUSE = "refuse"
    SKIP = "skip"


@app.callback()
def thresher() -> None:
    """A parameter server for PyTorch that ships only the gradients that matter."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    script: Annotated[list[str], typer.Argument(help="The training script and its arguments.")],
    shards: Annotated[int, typer.Option(envvar="THRESHER_SHARD_COUNT", help="Shard processes.")] = 1,
    workers: Annotated[int, typer.Option(envvar="THRESHER_WORKERS", help="Worker processes.")] = 2,
    compressor: Annotated[str, typer.Option(help="What is sent, such as 'TopK(0.01)'.")] = "HardThreshold",
    threshold: Annotated[float | None, typer.Option(help="λ of the hard threshold, in gradient units.")] = None,
    density: Annotated[float | None, typer.Option(help="Wanted mean density of the run; λ follows it.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wanted bytes of the whole run, such as 500MB; λ follows it. Needs --steps.")
    ] = None,
    precision: Annotated[float | None, typer.Option(help="Wanted precision ε; λ = √(ε/parameters)/γ.")] = None,
    rule: Annotated[RuleChoice, typer.Option(help="How λ follows from --density.")] = RuleChoice.BUDGET,
    steps: Annotated[int | None, typer.Option(help="Rounds of the whole run, where known.")] = None,
    threshold_factors: Annotated[
        str | None, typer.Option(help="Factors on λ, one for each worker: 1,1,2 spares the last one's uplink.")
    ] = None,
    placement: Annotated[
        PlacementChoice, typer.Option(help="Compress gradients, or what the worker's optimizer has moved.")
    ] = PlacementChoice.GRADIENT,
    period: Annotated[int, typer.Option(help="Local steps per round; more than 1 needs --placement update.")] = 1,
    outer: Annotated[
        str, typer.Option(help="Optimizer of the shards for what was moved, such as 'SGD(lr=0.7, momentum=0.9)'.")
    ] = "",
    nonfinite: Annotated[
        NonFiniteChoice, typer.Option(help="NaN or infinity in a gradient: refuse the step, or skip it.")
    ] = NonFiniteChoice.REFUSE,
    seed: Annotated[int, typer.Option(envvar="THRESHER_SEED", help="Keys data order and randomness.")] = 0,
    baseline: Annotated[bool, typer.Option(help="Run once more with everything sent, and compare.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder; script and time by default.")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders lie.")] = Path("runs"),
    round_timeout: Annotated[float, typer.Option(help="Seconds a round waits for a connected worker.")] = 600.0,
    lease: Annotated[float, typer.Option(help="Seconds a round waits for a worker that was lost.")] = 5.0,
    linger: Annotated[float, typer.Option(help="Seconds the shards stay up after the last worker.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train SCRIPT on shards and workers of this machine."""
    from thresher.deploy import launch as launching
    from thresher.deploy.display import Display
    from thresher.deploy.results import read_bytes, results_table
    from thresher.worker.method import Method

    out, err = Console(), Console(stderr=True)
    with _errors_told(err), launching.StopSignals() as stop:
        method = Method(
            compressor, threshold, density, None if budget is None else read_bytes(budget), precision, rule.value,
            steps, placement.value, period, outer, nonfinite.value,
        )  # fmt: skip
        config = launching.LaunchConfig(
            tuple(script), shards, workers, method, seed, round_timeout, lease, linger, _factors(threshold_factors)
        )
        folder = _run_folder(runs, name or f"{Path(script[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        err.print(f"{shards} shards, {workers} workers, {method.describe()}: {folder}", highlight=False, soft_wrap=True)
        with Display(err) as display:
            results = launching.launch(config, folder, display.show, stop, baseline=baseline)
        if as_json:
            out.print_json(json.dumps({key: asdict(result) for key, result in results.items()}))
        else:
            out.print(results_table(results))
        err.print(f"result, model, per-iteration file and logs: {folder}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    shard: Annotated[int, typer.Option(help="Position of this shard.")] = 0,
    shards: Annotated[int, typer.Option(help="Number of shards.")] = 1,
    workers: Annotated[int, typer.Option(envvar="THRESHER_WORKERS", help="Number of workers.")] = 1,
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:0",
    metrics: Annotated[str | None, typer.Option(help="host:port of the Prometheus endpoint.")] = None,
    iterations: Annotated[Path | None, typer.Option(help="Per-iteration file to write.")] = None,
    start_timeout: Annotated[float, typer.Option(help="Seconds the first round waits for workers to come.")] = 300.0,
    round_timeout: Annotated[float, typer.Option(help="Seconds a round waits for a connected worker.")] = 600.0,
    lease: Annotated[float, typer.Option(help="Seconds a round waits for a worker that was lost.")] = 5.0,
    log_cap: Annotated[int, typer.Option(help="Bytes of memory for updates that workers have not read.")] = 256 << 20,
    worker_labels: Annotated[bool, typer.Option(help="Give each worker a label in the metrics.")] = True,
    insecure: Annotated[
        bool, typer.Option(envvar="THRESHER_INSECURE", help="Plain text beyond this machine is fine.")
    ] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(envvar="THRESHER_TLS_CA", help="PEM: whose certificates callers must show.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="THRESHER_TLS_CERT", help="PEM: the certificate of this shard.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="THRESHER_TLS_KEY", help="PEM: its private key.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(envvar="THRESHER_TOKENS", help="File of lines `role token` that callers may show.")
    ] = None,
    until_stdin_closes: Annotated[bool, typer.Option(help="End when standard input does.")] = False,
) -> None:
    """Run one shard until SIGTERM. Prints its address as one JSON line when it serves."""
    from thresher.protos.credentials import TlsFiles
    from thresher.server.server import ServerConfig
    from thresher.server.config import ShardConfig

    with _errors_told(Console(stderr=True)):
        if not 0 <= shard < shards or workers < 1:
            raise ConfigurationError(f"shard {shard} of {shards} for {workers} workers makes no sense")
        config = ServerConfig(
            ShardConfig(
                shard, shards, workers,
                start_timeout=start_timeout, round_timeout=round_timeout, lease=lease, log_cap_bytes=log_cap,
            ),
            listen, metrics, iterations, insecure=insecure, per_worker_metrics=worker_labels,
            tls=TlsFiles(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None, tokens=tokens,
        )  # fmt: skip
        asyncio.run(_serve(config, until_stdin_closes=until_stdin_closes))


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="Where the files go; made where it is missing.")],
    hosts: Annotated[
        str, typer.Option(help="Hosts of the shards beside this one, such as shard-0.example,10.0.0.7.")
    ] = "",
    workers: Annotated[int, typer.Option(help="Number of workers.")] = 1,
    days: Annotated[int, typer.Option(help="How long they are good for.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Make certificates for a trial of mTLS: an authority, and what a shard, workers and readers show."""
    with _errors_told(Console(stderr=True)):
        try:
            from thresher.deploy.certificates import write_certificates
        except ModuleNotFoundError:
            raise ConfigurationError(
                "to make certificates takes the package cryptography: pip install 'thresher[certs]'"
            ) from None
        paths = write_certificates(folder, [host for host in hosts.split(",") if host], workers, days)
    if as_json:
        written = {name: {"certificate": str(pem), "key": str(key)} for name, (pem, key) in paths.items()}
        typer.echo(json.dumps(written))
    else:
        for name, (pem, key) in paths.items():
            typer.echo(f"{name:10} {pem} {key}")


async def _serve(config: "ServerConfig", *, until_stdin_closes: bool) -> None:  # type: ignore[name-defined]  # noqa: F821
    from thresher.server.server import ShardServer

    server = ShardServer(config)
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_kill, stop, number)
    if until_stdin_closes:
        threading.Thread(target=_wait_eof, args=(loop, stop), name="stdin", daemon=True).start()
    ready = {"shard": config.shard.shard, "address": server.address, "metrics": server.metrics_address}
    typer.echo(json.dumps(ready))
    await stop.wait()
    await server.stop()


def _stop_or_kill(stop: asyncio.Event, number: int) -> None:
    """Drain on the first signal, die of the second."""
    if stop.is_set():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stop.set()


def _wait_eof(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    # Not through sys.stdin: a thread that waits inside its buffer would hold a lock that the interpreter's end needs.
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


def _factors(text: str | None) -> tuple[float, ...]:
    """Return the factors in ``text``; none where there is no text. Raises ConfigurationError naming what is none."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise ConfigurationError(f"threshold factors are numbers, such as 1,1,2, not {text!r}") from None


def _run_folder(runs: Path, name: str) -> Path:
    """Return the folder of a new run, and have ``latest`` point at it.

    Raises:
        ConfigurationError: when there is something of that name; a run is never overwritten.
    """
    folder, latest = runs / name, runs / "latest"
    if folder == latest or "/" in name:
        raise ConfigurationError(f"a run cannot be called {name!r}; choose another --name")
    try:
        folder.mkdir(parents=True)
        latest.unlink(missing_ok=True)
        latest.symlink_to(name)
    except FileExistsError:
        raise ConfigurationError(f"{folder} exists already; choose another --name, or remove it") from None
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be made: {error.strerror}; choose another --runs") from None
    return folder


@contextmanager
def _errors_told(console: Console) -> Iterator[None]:
    """Turn our errors into one clear message and an exit code."""
    try:
        yield
    except ConfigurationError as error:
        console.print(f"thresher: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except ThresherError as error:
        console.print(f"thresher: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(128 + getattr(error, "number", -127)) from None


def main() -> None:
    """Run the command line."""
    app()
