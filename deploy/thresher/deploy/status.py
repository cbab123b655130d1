"""``thresher status``: how shards and workers of a run stand now."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console

from thresher.deploy.watching import ShardLook, Watch, totals_of, workers_of
from thresher.deploy.watching_columns import fitting
from thresher.deploy.watching_places import Place
from thresher.deploy.watching_tables import shard_rows, troubles, worker_rows

_COUNTED: Final = (
    "version", "numel", "members", "push_bytes", "pull_bytes", "update_density", "threshold", "log_bytes",
    "residual_norm", "staleness", "last_iteration_age", "round_seconds",
)  # fmt: skip


def look_once(place: Place, timeout: float) -> list[ShardLook]:
    """Ask all shards of a run at once; none is waited for longer than ``timeout`` seconds."""
    with Watch(place, "thresher status", timeout) as watch:
        return watch.look()


def all_serve(looks: Sequence[ShardLook]) -> bool:
    """Return True when every shard serves."""
    return all(look.state == "SERVING" for look in looks)


def document(place: Place, looks: Sequence[ShardLook]) -> dict[str, Any]:
    """Return what is known as JSON has it: ``shards`` and ``workers``, each a list of objects, and ``run``.

    docs/watching.md lists the fields. What is not known is null.
    """
    workers = workers_of([look.statistics for look in looks if look.statistics is not None])
    serving = sum(look.state == "SERVING" for look in looks)
    return {
        "run": {"name": place.name, "shards": len(looks), "serving": serving, **asdict(totals_of(looks))},
        "shards": [_shard(look) for look in looks],
        "workers": [asdict(worker) for worker in workers],
    }


def _shard(look: ShardLook) -> dict[str, Any]:
    told = look.statistics
    who = {"shard": look.shard, "where": look.where, "state": look.state, "reason": look.reason}
    if told is None:
        return who | dict.fromkeys(_COUNTED)
    return who | {
        "version": told.version,
        "numel": told.numel,
        "members": sum(worker.counts for worker in told.workers),
        "push_bytes": sum(worker.push_bytes for worker in told.workers),
        "pull_bytes": sum(worker.pull_bytes for worker in told.workers),
        "update_density": told.update_density,
        "threshold": told.threshold if told.HasField("threshold") else None,
        "log_bytes": told.log_bytes,
        "residual_norm": told.residual_norm if told.HasField("residual_norm") else None,
        "staleness": told.staleness,
        "last_iteration_age": told.last_iteration_age if told.HasField("last_iteration_age") else None,
        "round_seconds": told.round_seconds,
    }


def show(place: Place, looks: Sequence[ShardLook], console: Console) -> None:
    """Print a row for each shard and each worker, then why some shards do not serve."""
    console.print(fitting(place.name, shard_rows(looks), console))
    if workers := worker_rows(looks):
        console.print(fitting("", workers, console))
    for line in troubles(looks):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
