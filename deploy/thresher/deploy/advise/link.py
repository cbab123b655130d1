"""The link between this host and the shards, measured the way that pushes and updates go: through the shards."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeAlias, final

import numpy as np

from thresher.deploy.advise.delays import NO_DELAY, Delay
from thresher.deploy.advise.samples import Sample, exactly, middle
from thresher.deploy.watching_places import Place
from thresher.protos.errors import BusyError, ConnectionTimeoutError
from thresher.protos.messages import CHUNK_BYTES
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import ShardCalls

_Seconds: TypeAlias = Callable[[int], float]

_WHO: Final = "thresher advise"
_REPETITIONS: Final = 5
_ROUND_TRIPS: Final = 15
_FIRST_BYTES: Final = 256 << 10
_MOST_BYTES: Final = 64 << 20
_SECONDS: Final = 0.25
"""A transfer that takes so long is long enough: what a shaper lets pass at once does not weigh in it any more."""
_MESSAGES: Final = (0, 16 << 10, 64 << 10, 256 << 10)
"""Bytes to or from each shard, timed after a pause: about what a sparse push has."""
_LONGEST_IDLE: Final = 0.4
"""Seconds. TCP begins anew when it was idle for a retransmission timeout (RFC 5681), here 0.2 s and a round trip."""
_CALL_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.2  # before a shard that is busy is asked again


@final
@dataclass(frozen=True, slots=True)
class Way:
    """What the network gives between this host and one shard, or all of them at once.

    Attributes:
        name: For people.
        host: That of the shard's address; empty for all at once.
        round_trip: Seconds of a call without bytes.
        up: Bytes per second to there.
        down: Bytes per second from there.
    """

    name: str
    host: str
    round_trip: Sample
    up: Sample
    down: Sample


@final
@dataclass(frozen=True, slots=True)
class Link:
    """The network as this host sees it.

    Attributes:
        together: All shards at once: the link of this host, unless the shards' own are slower.
        alone: Each shard by itself.
        shard_bandwidth: Bytes per second of the link of a host of shards, each way, where that is known; otherwise it
            is taken for as fast as it was seen from here.
        up_delay: What a push takes besides, after a pause.
        down_delay: What an update takes besides.
    """

    together: Way
    alone: tuple[Way, ...]
    shard_bandwidth: float | None = None
    up_delay: Delay = NO_DELAY
    down_delay: Delay = NO_DELAY

    def hosts(self) -> list[tuple[list[int], Way]]:
        """Return for each host of shards which they are, and what its link carries, at least."""
        found: dict[str, list[int]] = {}
        for shard, way in enumerate(self.alone):
            found.setdefault(way.host, []).append(shard)
        return [(shards, self._host(shards)) for shards in found.values()]

    def _host(self, shards: Sequence[int]) -> Way:
        ways = [self.alone[shard] for shard in shards]
        if len(ways) > 1 and len(ways) == len(self.alone):
            ways.append(self.together)
        # Two streams may get more out of one link than one does, never less of it than there is.
        best = Way(
            ways[0].host,
            ways[0].host,
            ways[0].round_trip,
            max((way.up for way in ways), key=middle),
            max((way.down for way in ways), key=middle),
        )
        if self.shard_bandwidth is None:
            return best
        known = exactly(self.shard_bandwidth)
        return replace(best, up=known, down=known)


def given_link(bandwidth: float, round_trip: float, shards: int, shard_bandwidth: float | None) -> Link:
    """Return the link that somebody describes, each shard on a host of its own.

    Args:
        bandwidth: Bytes per second of this host, each way.
        round_trip: Seconds.
        shards: How many.
        shard_bandwidth: As for `Link`.
    """
    rate, trip = exactly(bandwidth), exactly(round_trip)
    alone = tuple(Way(f"shard {shard}", str(shard), trip, rate, rate) for shard in range(shards))
    return Link(Way("all shards", "", trip, rate, rate), alone, shard_bandwidth)


def measure_link(
    place: Place, timeout: float, shard_bandwidth: float | None = None, idle: float = _LONGEST_IDLE
) -> Link:
    """Measure the link to the shards of a place: each alone, and all at once; then small messages after pauses.

    A transfer takes a quarter of a second or 64 MiB, whichever is less, and is repeated five times each way.

    Args:
        place: Where the shards are.
        timeout: Seconds to look for them, and to wait for one that somebody else measures.
        shard_bandwidth: As for `Link`.
        idle: Seconds of the pauses: as long as a worker computes between two messages, up to 0.4 s.

    Raises:
        ConnectionTimeoutError: naming each shard that cannot be reached in that time.
        BusyError: when somebody else has measured for so long.
        ProtocolError: when a shard is of another release, and does not know the call.
        ThresherError: as the shard raised it, such as `AccessDeniedError`.
    """
    with ExitStack() as stack:
        calls = []
        for shard, address in enumerate(place.shards):
            calls.append(ShardCalls(shard, address(), _WHO, place.credentials, insecure=place.insecure))
            stack.callback(calls[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor(len(calls)))
        _find(calls, pool, timeout)
        meters = [_Meter(one, timeout) for one in calls]
        alone = tuple(_way([meter], pool, str(one), _host_of(one)) for meter, one in zip(meters, calls, strict=True))
        together = _way(meters, pool, "all shards", "") if len(calls) > 1 else replace(alone[0], name="all shards")
        return Link(together, alone, shard_bandwidth, *_delays(meters, pool, together, min(idle, _LONGEST_IDLE)))


def _host_of(calls: ShardCalls) -> str:
    """Return the host of the address that the shard was found at: ``shard 0 at ray://run/0 (10.0.0.1:5000)``."""
    return str(calls).rpartition(" ")[2].strip("()").rpartition(":")[0]


def _find(calls: Sequence[ShardCalls], pool: ThreadPoolExecutor, timeout: float) -> None:
    """Look for all shards at once. Raises ConnectionTimeoutError naming all that are missing."""
    deadline = time.monotonic() + timeout

    def find(one: ShardCalls) -> str:
        try:
            one.wait_ready(deadline)
        except ConnectionTimeoutError:
            return str(one)
        return ""

    if missing := [name for name in pool.map(find, calls) if name]:
        raise ConnectionTimeoutError(
            f"{_WHO} could not reach {' and '.join(missing)} in {timeout:g} s; start them, correct the addresses, wait "
            "for longer with --timeout, or describe the link yourself: --bandwidth 100mbit --rtt 0.02"
        )


@final
class _Meter:
    """Moves bytes between this host and one shard."""

    def __init__(self, calls: ShardCalls, timeout: float) -> None:
        self._calls, self._timeout = calls, timeout
        self._chunk = np.random.default_rng().bytes(CHUNK_BYTES)  # no link can compress it

    def up(self, size: int) -> None:
        """Send ``size`` bytes, and wait until they have come."""
        self._move(size, 0)

    def down(self, size: int) -> None:
        """Have ``size`` bytes sent, and wait until they have come."""
        self._move(0, size)

    def _move(self, up: int, down: int) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                with self._calls.translated():
                    for _ in self._calls.measure(self._requests(up, down), _CALL_SECONDS):
                        pass
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_SECONDS)
            else:
                return

    def _requests(self, up: int, down: int) -> Iterator[pb.MeasureRequest]:
        yield pb.MeasureRequest(wanted_bytes=down, chunk=self._chunk[:up])
        for begin in range(CHUNK_BYTES, up, CHUNK_BYTES):
            yield pb.MeasureRequest(chunk=self._chunk[: up - begin])


def _way(meters: Sequence[_Meter], pool: ThreadPoolExecutor, name: str, host: str) -> Way:
    """Measure the way to these shards, at once where they are several."""
    ups, downs = _moves(meters, pool)
    ups(0)  # the connection is open now
    trips = np.array([ups(0) for _ in range(_ROUND_TRIPS)])
    up, down = (_rates(seconds, len(meters), middle(trips)) for seconds in (ups, downs))
    return Way(name, host, trips, up, down)


def _moves(meters: Sequence[_Meter], pool: ThreadPoolExecutor) -> tuple[_Seconds, _Seconds]:
    """Return two functions that move so many bytes up and down at each meter, at once, and say how long it took."""

    def seconds(moves: Sequence[Callable[[int], None]], size: int) -> float:
        begin = time.perf_counter()
        list(pool.map(lambda move: move(size), moves))
        return time.perf_counter() - begin

    return partial(seconds, [meter.up for meter in meters]), partial(seconds, [meter.down for meter in meters])


def _delays(meters: Sequence[_Meter], pool: ThreadPoolExecutor, way: Way, idle: float) -> tuple[Delay, Delay]:
    """Time messages of a few sizes in either direction, each after a pause."""

    def delay(seconds: _Seconds, rate: float) -> Delay:
        sizes = [size for size in _MESSAGES if size * len(meters) / rate <= _SECONDS]
        found = []
        for size in sizes:
            usual, taken = middle(way.round_trip) + size * len(meters) / rate, []
            for _ in range(_REPETITIONS):
                time.sleep(idle)
                taken.append(seconds(size) - usual)
            found.append(np.array(taken))
        return Delay(tuple(size * len(meters) for size in sizes), tuple(found))

    ups, downs = _moves(meters, pool)
    return delay(ups, middle(way.up)), delay(downs, middle(way.down))


def _rates(seconds: _Seconds, count: int, round_trip: float) -> Sample:
    """Return bytes per second of all ``count`` transfers together, in each repetition."""
    size = _FIRST_BYTES
    while (taken := seconds(size) - round_trip) < _SECONDS and size < _MOST_BYTES:
        size = min(_MOST_BYTES, max(2 * size, int(size * _SECONDS / max(taken, 1e-4))))
    least = size * count / 1e12  # a clock that stands still is no reason to divide by 0
    return np.array([size * count / max(seconds(size) - round_trip, least) for _ in range(_REPETITIONS)])
