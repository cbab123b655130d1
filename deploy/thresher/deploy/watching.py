"""A run looked at from outside: all shards asked at once, each with an answer or the reason for none."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Literal, Self, final

from thresher.deploy.watching_places import Place
from thresher.protos.accounting import compression_ratio
from thresher.protos.errors import (
    AccessDeniedError,
    ConfigurationError,
    DataLossError,
    RoundFailedError,
)
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import ShardCalls, ShardLostError

State = Literal["SERVING", "SILENT", "FAILED", "ENDED"]
"""It answers; it does not at the moment, and may again; it will not; its run is over."""

_MARGIN_SECONDS: Final = 0.25  # after the deadline of the call: what gRPC says of it is better than what we could say
_PROGRESS: Final = ("aborted", "lost", "waited for", "registered", "exchanging", "left")


@final
@dataclass(frozen=True, slots=True)
class ShardLook:
    """One shard, as far as it is known now.

    Attributes:
        shard: Its position in the run.
        where: Its address as it was named, or as it was found; empty where it is not known.
        state: Whether it serves.
        reason: What the run is doing, or why the shard does not serve.
        statistics: Its counters; of a shard that does not serve, the last ones that were seen, if any.
    """

    shard: int
    where: str
    state: State
    reason: str
    statistics: pb.StatisticsResponse | None = None

    @property
    def has_finished(self) -> bool:
        """True when all workers had left it when it was seen last."""
        return self.statistics is not None and self.statistics.state == "finished"


@final
@dataclass(frozen=True, slots=True)
class WorkerLook:
    """One worker, as the shards see it; counters are summed over them.

    Attributes:
        rank: Its rank.
        state: What it is for the shard for which it has come least far, such as ``exchanging``.
        steps: Steps pushed to all of them.
        push_bytes: Bytes received from it.
        pull_bytes: Bytes sent to it.
        pushed_elements: Elements it pushed.
        pushable_elements: Elements it could have pushed.
        density: Of its last push, over all shards.
        origin: Its host and process; empty before it has come.
        metrics_address: ``host:port`` of its Prometheus endpoint; empty without one.
        counts: It belongs to the run, for all of them.
    """

    rank: int
    state: str
    steps: int
    push_bytes: int
    pull_bytes: int
    pushed_elements: int
    pushable_elements: int
    density: float
    origin: str
    metrics_address: str
    counts: bool


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """A run as a whole, as far as its shards have answered.

    Attributes:
        iterations: Rounds closed; by the shard that closed most.
        workers: Workers that it knows of.
        members: Those that have not left.
        push_bytes: Bytes from workers to shards.
        pull_bytes: Bytes from shards to workers.
        density: Elements pushed over elements that could have been pushed, since the beginning.
        compression_ratio: What dense float32 would have been over what was moved, both directions.
    """

    iterations: int
    workers: int
    members: int
    push_bytes: int
    pull_bytes: int
    density: float
    compression_ratio: float


def totals_of(looks: Sequence[ShardLook]) -> Totals:
    """Add up what the shards counted."""
    shards = [look.statistics for look in looks if look.statistics is not None]
    workers = workers_of(shards)
    push, pull = sum(one.push_bytes for one in workers), sum(one.pull_bytes for one in workers)
    pushable = sum(one.pushable_elements for one in workers)
    return Totals(
        iterations=max((shard.version for shard in shards), default=0),
        workers=len(workers),
        members=sum(one.counts for one in workers),
        push_bytes=push,
        pull_bytes=pull,
        density=sum(one.pushed_elements for one in workers) / max(1, pushable),
        compression_ratio=compression_ratio(pushable, push + pull),
    )


def workers_of(shards: Sequence[pb.StatisticsResponse]) -> list[WorkerLook]:
    """Return the workers that any of the shards knows, by rank."""
    count = max((len(shard.workers) for shard in shards), default=0)
    return [_worker(rank, [shard for shard in shards if rank < len(shard.workers)]) for rank in range(count)]


def _worker(rank: int, shards: Sequence[pb.StatisticsResponse]) -> WorkerLook:
    seen = [shard.workers[rank] for shard in shards]
    numel = sum(shard.numel for shard in shards)
    return WorkerLook(
        rank,
        state=min((one.state for one in seen), key=_progress),
        steps=min(one.steps for one in seen),
        push_bytes=sum(one.push_bytes for one in seen),
        pull_bytes=sum(one.pull_bytes for one in seen),
        pushed_elements=sum(one.pushed_elements for one in seen),
        pushable_elements=sum(one.pushable_elements for one in seen),
        density=sum(one.density * shard.numel for one, shard in zip(seen, shards, strict=True)) / max(1, numel),
        origin=next((one.origin for one in seen if one.origin), ""),
        metrics_address=next((one.metrics_address for one in seen if one.metrics_address), ""),
        counts=all(one.counts for one in seen),
    )


def _progress(state: str) -> int:
    return _PROGRESS.index(state) if state in _PROGRESS else 0


@final
class Watch:
    """Looks at the shards of a place, as often as it is asked to. Use as a context manager: it ends the connections.

    A shard that did not answer is looked for anew each time, for it may have come back elsewhere.
    """

    def __init__(self, place: Place, who: str, timeout: float) -> None:
        """Prepare.

        Args:
            place: Where the shards are.
            who: The caller, for people: ``thresher top``.
            timeout: Seconds after which a shard that has not answered is silent.
        """
        self._place = place
        self._askers = [_Asker(place, shard, who, timeout) for shard in range(len(place.shards))]
        self._timeout = timeout

    def __enter__(self) -> Self:
        """Begin; nothing is asked yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the connections. A question that is still open ends with its own deadline, on a thread of its own."""
        for asker in self._askers:
            asker.close()

    def look(self, patience: float | None = None) -> list[ShardLook]:
        """Ask all shards at once.

        Args:
            patience: Seconds to wait for answers; by default until every shard has answered or is silent. Of one whose
                answer is not there by then, and may still come, the look before is returned.
        """
        if self._place.outcome is not None and (outcome := self._place.outcome()):
            return [asker.ended(outcome) for asker in self._askers]
        until = time.monotonic() + (self._timeout + _MARGIN_SECONDS if patience is None else patience)
        for asker in self._askers:
            asker.ask()
        return [asker.answer(until) for asker in self._askers]


@final
class _Asker:
    """Asks one shard, on a thread that nobody has to wait for."""

    def __init__(self, place: Place, shard: int, who: str, timeout: float) -> None:
        self._place, self._shard, self._who, self._timeout = place, shard, who, timeout
        self._look = ShardLook(shard, "", "SILENT", "it has not answered yet")
        self._calls: ShardCalls | None = None
        self._thread: threading.Thread | None = None
        self._asked = 0.0

    def ask(self) -> None:
        """Begin a question, unless one is open."""
        if self._thread is None or not self._thread.is_alive():
            # A daemon: a directory may be slow, and nobody shall wait for it at the end of the process.
            self._thread = threading.Thread(target=self._answer, name=f"look at shard {self._shard}", daemon=True)
            self._asked = time.monotonic()
            self._thread.start()

    def answer(self, until: float) -> ShardLook:
        """Return how it stands; ``until`` is on the monotonic clock."""
        assert self._thread is not None  # noqa: S101 - it was asked
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive() and time.monotonic() - self._asked >= self._timeout:
            return self._without_answer("SILENT", f"it has not answered in {self._timeout:g} s")
        return self._look

    def ended(self, outcome: str) -> ShardLook:
        """Return what there is to say of a shard whose run is over."""
        return self._without_answer("ENDED", outcome)

    def close(self) -> None:
        """End the connection."""
        if self._calls is not None:
            self._calls.close()

    def _answer(self) -> None:
        try:
            told = self._connected().statistics(timeout=self._timeout)
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it: the last look would seem to be this one
            self.close()
            self._calls = None
            self._look = self._after(error)
        else:
            state: State = "FAILED" if told.failure else "SERVING"
            self._look = ShardLook(told.shard, self._look.where, state, told.failure or told.state, told)

    def _connected(self) -> ShardCalls:
        if self._calls is None:
            where = self._place.shards[self._shard]()
            self._look = replace(self._look, where=where)
            place = self._place
            self._calls = ShardCalls(self._shard, where, self._who, place.credentials, insecure=place.insecure)
        return self._calls

    def _after(self, error: Exception) -> ShardLook:
        """Return what is known of a shard that was asked in vain. One that has failed or finished may well be gone."""
        then, state = self._look, _state_after(error)
        if state == "SILENT" and then.state in ("FAILED", "ENDED"):
            return then
        if state == "SILENT" and then.has_finished:
            return self._without_answer("ENDED", "it had finished when it was seen last")
        return self._without_answer(state, str(error) or repr(error))

    def _without_answer(self, state: State, reason: str) -> ShardLook:
        return replace(self._look, state=state, reason=reason)


def _state_after(error: Exception) -> State:
    """Return whether a shard that was asked in vain may answer the next time."""
    if isinstance(error, ShardLostError):
        return "SILENT"
    told = isinstance(error, AccessDeniedError | ConfigurationError | RoundFailedError | DataLossError)
    return "FAILED" if told else "SILENT"
