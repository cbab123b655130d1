"""What the tables of shards and workers say, row by row."""

from collections.abc import Iterator, Sequence
from typing import Final

from rich.text import Text

from thresher.deploy.results import bytes_text
from thresher.deploy.watching import ShardLook, WorkerLook, workers_of
from thresher.deploy.watching_columns import Row
from thresher.deploy.watching_rates import Rates
from thresher.protos.accounting import compression_ratio
from thresher.v1 import aggregation_pb2 as pb

_UNKNOWN: Final = "–"


def shard_rows(looks: Sequence[ShardLook]) -> list[Row]:
    """Return a row for each shard, with what it has counted since it began."""
    return [
        {
            "shard": str(look.shard),
            "state": f"{look.state}: {look.reason}" if look.state == "SERVING" else look.state,
            "where": look.where or _UNKNOWN,
            **_counted(look.statistics),
        }
        for look in looks
    ]


def _counted(shard: pb.StatisticsResponse | None) -> dict[str, str]:
    if shard is None:
        return dict.fromkeys(
            (
                "version", "members", "last iteration", "bytes up", "bytes down", "density", "ratio", "threshold",
                "residual", "staleness", "log",
            ),
            _UNKNOWN,
        )  # fmt: skip
    push, pull = sum(w.push_bytes for w in shard.workers), sum(w.pull_bytes for w in shard.workers)
    return {
        "version": f"{shard.version:,}",
        "members": f"{sum(worker.counts for worker in shard.workers):,}",
        "last iteration": f"{shard.last_iteration_age:,.1f} s ago"
        if shard.HasField("last_iteration_age")
        else _UNKNOWN,
        "bytes up": f"{push:,}",
        "bytes down": f"{pull:,}",
        "density": f"{shard.update_density:.2%}",
        "ratio": _ratio(sum(w.pushable_elements for w in shard.workers), push + pull),
        "threshold": f"{shard.threshold:.3g}" if shard.HasField("threshold") else _UNKNOWN,
        "residual": f"{shard.residual_norm:.3g}" if shard.HasField("residual_norm") else _UNKNOWN,
        "staleness": f"{shard.staleness:,}",
        "log": bytes_text(shard.log_bytes),
    }


def pace_rows(looks: Sequence[ShardLook], rates: Sequence[Rates]) -> list[Row]:
    """Return a row for each shard, with what it does at the moment; bytes are those of an iteration."""
    return [_pace_row(look, rate) for look, rate in zip(looks, rates, strict=True)]


def _pace_row(look: ShardLook, rate: Rates) -> Row:
    counted = _counted(look.statistics)
    return {
        "shard": str(look.shard),
        "state": look.reason if look.state == "SERVING" else Text(look.state, style="bold red"),
        "version": counted["version"],
        "/s": pace_text(rate),
        "up": each_text(rate.up),
        "down": each_text(rate.down),
        "last": age_text(rate),
        **{heading: counted[heading] for heading in ("density", "ratio", "threshold", "residual", "staleness", "log")},
        "where": look.where or _UNKNOWN,
    }


def worker_rows(looks: Sequence[ShardLook]) -> list[Row]:
    """Return a row for each worker that any shard knows."""
    return [_worker_row(one) for one in workers_of([look.statistics for look in looks if look.statistics is not None])]


def _worker_row(one: WorkerLook) -> Row:
    here = one.state in ("registered", "exchanging", "left")
    return {
        "worker": str(one.rank),
        "state": one.state if here else Text(one.state, style="bold red"),
        "steps": f"{one.steps:,}",
        "density": f"{one.density:.2%}",
        "ratio": _ratio(one.pushable_elements, one.push_bytes + one.pull_bytes),
        "bytes up": f"{one.push_bytes:,}",
        "bytes down": f"{one.pull_bytes:,}",
        "where": one.origin or _UNKNOWN,
        "metrics": one.metrics_address or _UNKNOWN,
    }


def troubles(looks: Sequence[ShardLook]) -> Iterator[str]:
    """Yield a line for each shard that does not serve, and why; one line where all say the same."""
    reasons = {look.reason: look.state for look in looks if look.state != "SERVING"}
    for reason, state in reasons.items():
        named = [str(look.shard) for look in looks if look.state != "SERVING" and look.reason == reason]
        many = f"shards {', '.join(named)} are" if len(named) > 1 else f"shard {named[0]} is"
        yield f"{many} {state}: {reason}"


def pace_text(rate: Rates) -> str:
    """Say how many iterations there are in a second."""
    return _UNKNOWN if rate.per_second is None else f"{rate.per_second:,.1f}"


def each_text(count: float | None) -> str:
    """Say how many bytes an iteration takes."""
    return _UNKNOWN if count is None else bytes_text(count)


def age_text(rate: Rates) -> Text:
    """Say how long ago the last iteration was, loudly where that is unusual."""
    return Text(_age(rate.age), style="bold red" if rate.is_late else "")


def _age(seconds: float) -> str:
    return f"{seconds:,.1f} s ago"


def _ratio(pushable: int, moved: int) -> str:
    return f"{compression_ratio(pushable, moved):,.1f}" if pushable else _UNKNOWN
