"""From costs and link to seconds of a step, how sure that is, and what to do about it. docs/advise.md explains it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from thresher.deploy.advise.link import Link, Way
from thresher.deploy.advise.rehearsal import Costs
from thresher.deploy.advise.samples import Sample, drawn, middle

PARTS: Final = ("compute", "compress", "up", "shard", "down", "replay")
"""Of a step, in their order."""

_DRAWS: Final = 2000
_BAND: Final = (5.0, 95.0)  # percentiles
_NEAR: Final = 1.1
"""What takes at most so many times the time of the fastest is as good, and the milder of the two is better."""


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Who trains.

    Attributes:
        workers: All of them.
        here: How many of them share a host, and its link.
        compute: Seconds of the forward and backward pass; 0 where that is not known.
    """

    workers: int
    here: int
    compute: Sample


@final
@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step would take.

    Attributes:
        costs: Of the setting.
        seconds: The median.
        low: The 5th percentile: each measured quantity is drawn from its own repetitions.
        high: The 95th.
        compute: Medians of its parts: of the passes, at the worker that is the last in this step.
        compress: Of that worker until frames are ready.
        up: Of the network until all pushes are at the shards, with half a round trip.
        shard: Of the slowest shard.
        down: Of the network until all updates are at the workers, with half a round trip.
        replay: Of the last worker until the model has its new parameters.
    """

    costs: Costs
    seconds: float
    low: float
    high: float
    compute: float
    compress: float
    up: float
    shard: float
    down: float
    replay: float


def predict(costs: Costs, link: Link, group: Group, seed: int = 0) -> Prediction:
    """Add up the parts of a step in lockstep. They follow each other, and all wait for whoever is the slowest."""
    generator = np.random.default_rng(seed)

    def draw(sample: Sample) -> Sample:
        return drawn(sample, _DRAWS, generator)

    up, down = np.zeros(_DRAWS), np.zeros(_DRAWS)
    for way, pushes, pulls in _bottlenecks(costs, link, group):
        up, down = np.maximum(up, pushes / draw(way.up)), np.maximum(down, pulls / draw(way.down))
    trip = draw(link.together.round_trip) / 2
    up += trip + link.up_delay.drawn(sum(costs.push_bytes), _DRAWS, generator)
    down += trip + link.down_delay.drawn(sum(costs.pull_bytes), _DRAWS, generator)
    replay, compute, compress = _slowest((costs.replay, group.compute, costs.compress), group.workers, generator)
    (shard,) = _slowest((costs.shard,), len(costs.push_bytes), generator)
    parts = {
        "compute": compute,
        "compress": compress,
        "up": np.maximum(up, 0.0),
        "shard": shard,
        "down": np.maximum(down, 0.0),
        "replay": replay,
    }
    total = np.sum(list(parts.values()), axis=0)
    low, high = np.percentile(total, _BAND)
    medians = {name: middle(part) for name, part in parts.items()}
    return Prediction(costs, middle(total), float(low), float(high), **medians)


def _slowest(parts: Sequence[Sample], count: int, generator: np.random.Generator) -> list[Sample]:
    """Return the parts of the slowest of ``count`` that do the same, each with its own draws."""
    each = [drawn(part, (_DRAWS, count), generator) for part in parts]
    last = np.sum(each, axis=0).argmax(axis=1)
    return [one[np.arange(_DRAWS), last] for one in each]


def _bottlenecks(costs: Costs, link: Link, group: Group) -> list[tuple[Way, int, int]]:
    """Return each link that a step loads, with the bytes that go up and down through it."""
    shared = [(link.together, group.here * sum(costs.push_bytes), group.here * sum(costs.pull_bytes))]
    for shards, way in link.hosts():
        push, pull = (sum(sizes[shard] for shard in shards) for sizes in (costs.push_bytes, costs.pull_bytes))
        shared.append((way, group.workers * push, group.workers * pull))
    return shared


def break_even(dense: Costs, sparse: Costs, shard_hosts: Sequence[Sequence[int]], group: Group) -> float | None:
    """Return the bandwidth below which ``sparse`` is the faster, in bytes per second.

    It is that of every link, each way: T(B) = fixed seconds + bytes / B for either, and B is where the two meet.

    Args:
        dense: The one.
        sparse: The other.
        shard_hosts: Which shards share a host.
        group: Who trains.

    Returns:
        0 where it never is; None where it is at every bandwidth, because it costs the machine less, too.
    """
    bytes_saved = _loaded(dense, shard_hosts, group) - _loaded(sparse, shard_hosts, group)
    seconds_lost = _fixed(sparse) - _fixed(dense)
    if bytes_saved <= 0:
        return 0.0
    return bytes_saved / seconds_lost if seconds_lost > 0 else None


def _fixed(costs: Costs) -> float:
    return middle(costs.compress) + middle(costs.shard) + middle(costs.replay)


def _loaded(costs: Costs, shard_hosts: Sequence[Sequence[int]], group: Group) -> float:
    """Return the bytes through the link that is loaded most, up and down."""
    return float(
        sum(
            max(group.here * sum(sizes), *(group.workers * sum(sizes[s] for s in shards) for shards in shard_hosts))
            for sizes in (costs.push_bytes, costs.pull_bytes)
        )
    )


def best(predictions: Sequence[Prediction]) -> Prediction:
    """Return the mildest of those that are about as fast as the fastest; they come from the mildest on."""
    fastest = min(one.seconds for one in predictions)
    return next(one for one in predictions if one.seconds <= _NEAR * fastest)


def fastest_compressed(predictions: Sequence[Prediction]) -> Prediction:
    """Return the fastest of those that compress."""
    return min((one for one in predictions if not one.costs.setting.is_everything), key=lambda one: one.seconds)
