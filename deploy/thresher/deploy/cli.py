"""The command line. Data goes to stdout, logs to stderr; exit codes: 0 done, 1 failed, 2 bad usage, 128 + signal."""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from thresher.deploy import bench, options, watching_commands
from thresher.deploy.advise.command import advise
from thresher.deploy.exit_codes import errors_told
from thresher.deploy.health import health
from thresher.deploy.ranks import worker
from thresher.deploy.ray_cluster import commands as ray_commands
from thresher.deploy.report.command import report
from thresher.protos.errors import ConfigurationError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench.app, name="bench")
app.add_typer(ray_commands.app, name="ray")
app.command()(watching_commands.status)
app.command()(watching_commands.top)
app.command()(report)
app.command()(advise)
app.command()(health)
app.command(context_settings={"allow_interspersed_args": False})(worker)


@app.callback()
def thresher() -> None:
    """A parameter server for PyTorch that ships only the gradients that matter."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    context: typer.Context,
    script: options.Script = None,
    shards: options.Shards = 1,
    workers: options.Workers = 2,
    compressor: options.Compressor = "HardThreshold",
    threshold: options.Threshold = None,
    density: options.Density = None,
    budget: options.Budget = None,
    precision: options.Precision = None,
    rule: options.Rule = "budget",
    steps: options.Steps = None,
    threshold_factors: options.Factors = None,
    placement: options.Placement = "gradient",
    period: options.Period = 1,
    outer: options.Outer = "",
    nonfinite: options.NonFinite = "refuse",
    mode: options.Mode = "sync",
    quorum: options.Quorum = 0,
    grace: options.Grace = 0.0,
    staleness: options.Staleness = 0,
    max_staleness: options.MaxStaleness = 0,
    downlink: options.Downlink = "updates",
    shadow_threshold: options.ShadowThreshold = 0.0,
    momentum_per_push: options.MomentumPerPush = False,
    staleness_aware: options.StalenessAware = False,
    seed: options.Seed = 0,
    durability: options.Durability = "process",
    restarts: options.Restarts = 3,
    restart_delay: options.RestartDelay = 1.0,
    resume: options.Resume = None,
    baseline: options.Baseline = False,
    name: options.Name = None,
    runs: options.Runs = Path("runs"),
    round_timeout: options.RoundTimeout = 1800.0,
    lease: options.Lease = 60.0,
    linger: options.Linger = 0.0,
    as_json: options.AsJson = False,
) -> None:
    """Train SCRIPT on shards and workers of this machine, or go on with a run by --resume."""
    with errors_told(Console(stderr=True)):
        if resume is not None:
            _resume(context, resume)
            return
        from thresher.deploy.launch_config import LaunchConfig
        from thresher.deploy.results import read_bytes
        from thresher.protos.consistency import Consistency
        from thresher.worker.method import Method

        method = Method(
            compressor, threshold, density, None if budget is None else read_bytes(budget), precision, rule,
            steps, placement, period, outer, nonfinite,
        )  # fmt: skip
        config = LaunchConfig(
            tuple(script or ()), shards, workers, method,
            Consistency(mode, quorum, grace, staleness, max_staleness, downlink, shadow_threshold, momentum_per_push,
                        staleness_aware), str(Path.cwd()), seed, round_timeout, lease, linger,
            _factors(threshold_factors), durability, restarts, restart_delay, baseline,
        )  # fmt: skip
        _launch(config, _run_folder(runs, name, config.command[0]), as_json=as_json)


def _resume(context: typer.Context, folder: Path) -> None:
    from thresher.deploy.launch import CONFIG_FILE
    from thresher.deploy.launch_config import LaunchConfig

    given = {
        name: value
        for name, value in context.params.items()
        if name not in options.OF_THE_LAUNCH
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    fixed = sorted(given.keys() - options.CHANGEABLE)
    if fixed:
        listed = ", ".join("the script" if name == "script" else f"--{name.replace('_', '-')}" for name in fixed)
        raise ConfigurationError(
            f"a run goes on as it began: leave out {listed} beside --resume, or begin another run with it"
        )
    config = LaunchConfig.read(folder / CONFIG_FILE)
    if config.durability == "none":
        raise ConfigurationError(f"{folder} was run with --durability none: nothing is left to go on with")
    _launch(replace(config, **given), folder, as_json=context.params["as_json"])


def _launch(config: "LaunchConfig", folder: Path, *, as_json: bool) -> None:  # type: ignore[name-defined]  # noqa: F821
    from thresher.deploy import launch as launching
    from thresher.deploy.display import Display
    from thresher.deploy.results import results_table
    from thresher.deploy.stop_signals import StopRequestedError, StopSignals

    out, err = Console(), Console(stderr=True)
    what = f"{config.shards} shards, {config.workers} workers, {config.method.describe()}"
    err.print(f"{what}, {config.consistency.describe()}: {folder}", highlight=False, soft_wrap=True)
    try:
        with StopSignals() as stop, Display(err) as display:
            results = launching.launch(config, folder, display.show, stop)
    except (launching.RunFailedError, StopRequestedError):
        if config.durability != "none":
            err.print(f"to go on where it was: thresher launch --resume {folder}", highlight=False, soft_wrap=True)
        raise
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
    round_timeout: options.RoundTimeout = 1800.0,
    lease: options.Lease = 60.0,
    state_dir: options.StateDir = None,
    durability: options.ShardDurability = None,
    checkpoint_every: options.CheckpointEvery = 500,
    checkpoints: options.Checkpoints = 3,
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
    from thresher.server.config import ShardConfig
    from thresher.server.server import ServerConfig

    with errors_told(Console(stderr=True)):
        if not 0 <= shard < shards or workers < 1:
            raise ConfigurationError(f"shard {shard} of {shards} for {workers} workers makes no sense")
        _check_durability(state_dir, durability)
        config = ServerConfig(
            ShardConfig(
                shard, shards, workers, start_timeout=start_timeout, round_timeout=round_timeout, lease=lease,
                log_cap_bytes=log_cap, checkpoint_every=checkpoint_every,
            ),
            listen, metrics, iterations, state_dir, durability == "disk", checkpoints,
            insecure=insecure, per_worker_metrics=worker_labels,
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
    with errors_told(Console(stderr=True)):
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


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    version: Annotated[int | None, typer.Option(help="Number of updates in the model that is wanted.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the model goes; model-VERSION.safetensors in RUN by default.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Replay everything, and compare with every checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Make the model of an earlier version again from the log, or say which are kept."""
    from thresher.deploy import replay as replaying

    with errors_told(Console(stderr=True)):
        kept = replaying.Replay(run)
        said: dict[str, Any] = {"kept": [list(span) for span in kept.spans]}
        if verify:
            said["verified"] = [asdict(one) for one in kept.verify()]
        if version is not None:
            path = output or run / f"model-{version}.safetensors"
            kept.write(version, path)
            said["model"] = str(path)
        typer.echo(json.dumps(said) if as_json else replaying.report(said))


def _check_durability(state_dir: Path | None, durability: str | None) -> None:
    if state_dir is None and durability in ("process", "disk"):
        raise ConfigurationError(f"--durability {durability} needs a folder for the state: name --state-dir")
    if state_dir is not None and durability == "none":
        raise ConfigurationError("--durability none keeps nothing in --state-dir; leave one of them out")


async def _serve(config: "ServerConfig", *, until_stdin_closes: bool) -> None:  # type: ignore[name-defined]  # noqa: F821
    from thresher.deploy.lean_start import without_compiler
    from thresher.server.server import ShardServer

    without_compiler()
    begin = time.monotonic()  # the imports are done
    server = ShardServer(config)
    await server.start()
    seconds = round(time.monotonic() - begin, 3)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_kill, stop, number)
    if until_stdin_closes:
        threading.Thread(target=_wait_eof, args=(loop, stop), name="stdin", daemon=True).start()
    where = {"address": server.address, "metrics": server.metrics_address}
    typer.echo(json.dumps({"shard": config.shard.shard, **where, "seconds": seconds}))
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


def _run_folder(runs: Path, name: str | None, script: str) -> Path:
    """Return the folder of a new run, and have ``latest`` point at it; one without a name is called by script and time.

    Raises:
        ConfigurationError: when there is something of that name; a run is never overwritten.
    """
    name = name or f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
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


def main() -> None:
    """Run the command line."""
    app()
