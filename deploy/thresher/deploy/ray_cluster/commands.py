"""``thresher ray``: start a run on a Ray cluster, look at it, end it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from thresher.deploy import options
from thresher.deploy.exit_codes import errors_told
from thresher.deploy.ray_cluster.requirement import check_ray
from thresher.deploy.watching_columns import Row, fitting

app = typer.Typer(no_args_is_help=True, help="Run the shards on a Ray cluster; workers find them as ray://NAME.")

_PAUSE_SECONDS: Final = 3600.0

_Name = Annotated[str, typer.Argument(help="Name of the run.")]
_Address = Annotated[
    str, typer.Option(help="Ray's, such as 10.0.0.1:6379; auto: RAY_ADDRESS, or the cluster of this machine.")
]
_Workers = Annotated[int, typer.Option(help="Workers the run starts with; 0: as many as the first one says.")]
_StateDir = Annotated[
    Path | None, typer.Option(help="Folder that all nodes share, for what must not be lost; a run goes on from there.")
]
_WorkerStateDir = Annotated[
    Path | None, typer.Option(help="Folder of each node for its workers' part of it: faster, and lost with the node.")
]
_StartTimeout = Annotated[float, typer.Option(help="Seconds the first round waits for workers to come.")]
_Pem = Annotated[Path | None, typer.Option(help="PEM file of the shards, on every node.")]
_WorkerPem = Annotated[Path | None, typer.Option(help="PEM file of the workers, on every node.")]
_Tokens = Annotated[Path | None, typer.Option(help="File of lines `role token` that callers may show.")]
_TokenFile = Annotated[Path | None, typer.Option(help="File of the token that workers show.")]
_Insecure = Annotated[bool, typer.Option(help="Plain text between the nodes is fine.")]
_Deadline = Annotated[float, typer.Option(help="Seconds until all shards must serve.")]


# Several options on a line: there are many, and each says what it is where it is defined.
# fmt: off
@app.command()
def up(
    name: _Name, address: _Address = "auto", shards: options.Shards = 1, workers: _Workers = 0,
    state_dir: _StateDir = None, worker_state_dir: _WorkerStateDir = None,
    durability: options.Durability = "process",
    compressor: options.Compressor = "HardThreshold", threshold: options.Threshold = None,
    density: options.Density = None, budget: options.Budget = None, precision: options.Precision = None,
    rule: options.Rule = "budget", steps: options.Steps = None, placement: options.Placement = "gradient",
    period: options.Period = 1, outer: options.Outer = "", nonfinite: options.NonFinite = "refuse",
    mode: options.Mode = "sync", quorum: options.Quorum = 0, grace: options.Grace = 0.0,
    staleness: options.Staleness = 0, max_staleness: options.MaxStaleness = 0,
    downlink: options.Downlink = "updates", shadow_threshold: options.ShadowThreshold = 0.0,
    momentum_per_push: options.MomentumPerPush = False, staleness_aware: options.StalenessAware = False,
    seed: options.Seed = 0,
    cpus: Annotated[float, typer.Option(help="CPUs that are reserved for each shard.")] = 1.0,
    strict_spread: Annotated[bool, typer.Option(help="Each shard on a node of its own, or none.")] = False,
    start_timeout: _StartTimeout = 300.0, round_timeout: options.RoundTimeout = 1800.0, lease: options.Lease = 60.0,
    checkpoint_every: options.CheckpointEvery = 500, checkpoints: options.Checkpoints = 3,
    insecure: _Insecure = False, tls_ca: _Pem = None, tls_cert: _Pem = None, tls_key: _Pem = None,
    tokens: _Tokens = None, worker_tls_ca: _WorkerPem = None, worker_tls_cert: _WorkerPem = None,
    worker_tls_key: _WorkerPem = None, worker_token_file: _TokenFile = None, deadline: _Deadline = 60.0,
) -> None:
    """Start the shards of run NAME as actors, or go on with the run that --state-dir holds."""
    with errors_told(Console(stderr=True)):
        check_ray()
        from thresher.deploy.ray_cluster import cluster
        from thresher.deploy.ray_cluster.calls import attach
        from thresher.deploy.ray_cluster.config import RayConfig
        from thresher.deploy.results import read_bytes
        from thresher.protos.consistency import Consistency
        from thresher.worker.method import Method

        method = Method(
            compressor, threshold, density, None if budget is None else read_bytes(budget), precision, rule,
            steps, placement, period, outer, nonfinite,
        )
        consistency = Consistency(
            mode, quorum, grace, staleness, max_staleness, downlink, shadow_threshold, momentum_per_push,
            staleness_aware,
        )
        config = RayConfig(
            name, shards, workers, method, consistency, seed, durability, _whole(state_dir),
            _whole(worker_state_dir), cpus, strict_spread, start_timeout, round_timeout, lease, checkpoint_every,
            checkpoints, insecure, _tls(tls_ca, tls_cert, tls_key), _whole(tokens),
            _tls(worker_tls_ca, worker_tls_cert, worker_tls_key), _whole(worker_token_file),
        )
        attach(address)
        cluster.up(config, deadline=deadline)
        Console(stderr=True).print(f'{name} serves: workers say connect("ray://{name}")', highlight=False)
# fmt: on


@app.command()
def status(
    name: _Name,
    address: _Address = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Show how the shards of run NAME stand. Exit code 1 when one does not serve."""
    with errors_told(Console(stderr=True)):
        check_ray()
        from thresher.deploy.ray_cluster import cluster
        from thresher.deploy.ray_cluster.calls import attach

        attach(address)
        shards = cluster.status(name)
    if as_json:
        typer.echo(json.dumps([asdict(shard) for shard in shards]))
    else:
        show(name, shards, Console())
    if any(shard.state != "SERVING" for shard in shards):
        raise typer.Exit(1)


@app.command()
def down(
    name: _Name,
    address: _Address = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds until all must be gone.")] = 120.0,
) -> None:
    """End run NAME: its shards write a checkpoint, and what they held of the cluster is given back."""
    with errors_told(Console(stderr=True)):
        check_ray()
        from thresher.deploy.ray_cluster import cluster
        from thresher.deploy.ray_cluster.calls import attach

        attach(address)
        cluster.down(name, timeout=timeout)


@app.command()
def targets(
    name: _Name,
    address: _Address = "auto",
    output: Annotated[Path | None, typer.Option(help="File to write, for file_sd_configs.")] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port to answer at until SIGTERM, for http_sd_configs.")
    ] = None,
) -> None:
    """Tell Prometheus where the endpoints of run NAME are: on standard output, in a file, or over HTTP."""
    with errors_told(Console(stderr=True)):
        check_ray()
        from thresher.deploy.ray_cluster import targets as finding
        from thresher.deploy.ray_cluster.calls import attach
        from thresher.deploy.ray_cluster.cluster import status as look
        from thresher.deploy.stop_signals import StopSignals

        attach(address)
        if output is not None:
            finding.write(name, output)
        if listen is not None:
            with StopSignals() as stop, finding.serve(name, listen) as where:
                typer.echo(json.dumps({"address": where}))
                while True:
                    stop.pause(_PAUSE_SECONDS)
        if output is None:
            typer.echo(json.dumps(finding.document(name, look(name))))


def _whole(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> Any:  # noqa: ANN401 - imported when it is needed
    from thresher.deploy.ray_cluster.config import TlsPaths

    return TlsPaths(*map(_whole, (ca, certificate, key))) if ca or certificate or key else None


def show(name: str, shards: "Sequence[ShardStatus]", console: Console) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Print a row for each shard, then why some do not serve. Of a narrow screen the last columns are left out."""
    console.print(fitting(name, [_row(shard) for shard in shards], console))
    for one in shards:
        if one.state != "SERVING":
            console.print(
                f"shard {one.shard} is {one.state}: {one.reason}", highlight=False, markup=False, soft_wrap=True
            )


def _row(one: "ShardStatus") -> Row:  # type: ignore[name-defined]  # noqa: F821
    """Return what a row shows under which heading, that which is needed most first."""
    known = one.address != ""
    age = "–" if one.last_iteration_age is None else f"{one.last_iteration_age:,.1f} s ago"
    return {
        "shard": str(one.shard),
        "state": f"{one.state}: {one.reason}" if one.state == "SERVING" else one.state,
        "where": one.address or one.node or "–",
        "version": f"{one.version:,}" if known else "–",
        "members": f"{one.members:,}" if known else "–",
        "last iteration": age,
        "bytes up": f"{one.bytes_up:,}" if known else "–",
        "bytes down": f"{one.bytes_down:,}" if known else "–",
    }
