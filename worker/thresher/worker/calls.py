"""Single calls to one shard: find it, register, seed it, read its state. Errors of gRPC become ours here."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar, final

import grpc

from thresher.protos.credentials import NO_CREDENTIALS, Credentials
from thresher.protos.errors import (
    AccessDeniedError,
    ConnectionTimeoutError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
    error_named,
)
from thresher.protos.messages import chunks
from thresher.protos.timeouts import CALL_SECONDS, MARGIN_SECONDS, NOTICE_SECONDS
from thresher.protos.transport import ERROR_NAME, channel
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub
from thresher.worker.snapshot import Snapshot, snapshot_from_parts

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0

# A worker may come long before its shards; gRPC's own pauses between two attempts grow to minutes.
_RECONNECT_OPTIONS: Final = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000))

_TRANSIENT: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,  # as which gRPC reports a stream whose peer was killed, now and then
    grpc.StatusCode.INTERNAL,  # and one that was reset
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


@final
class ShardLostError(RoundFailedError):
    """The connection to a shard broke, and the shard has not said why: it may come back."""


def pauses() -> Iterator[float]:
    """Yield how many seconds to wait before each new attempt at what has failed: twice as long each time, to a limit.

    >>> from itertools import islice
    >>> list(islice(pauses(), 7))
    [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    """
    pause = _PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


@final
class ShardCalls:
    """Calls to one shard. ``setup_bytes`` counts seeds and snapshots.

    All may be repeated: registering, seeding and reading twice is as good as once. So a shard that is lost in the
    middle of one is looked for, and asked again.

    Args:
        shard: Position of the shard.
        address: ``host:port``.
        who: The caller, for people: ``worker 3``.
        credentials: What is shown to the shard, and trusted.
        patience: Seconds to try to find the shard again when it is lost; 0 tells so at once.
    """

    def __init__(
        self,
        shard: int,
        address: str,
        who: str,
        credentials: Credentials = NO_CREDENTIALS,
        patience: float = 0.0,
    ) -> None:
        """Open a channel; gRPC connects in the background."""
        self.shard, self.address, self.patience = shard, address, patience
        self._who = who
        self._closed = threading.Event()
        self._channel = channel(address, credentials, _RECONNECT_OPTIONS)
        self._stub = AggregationServiceStub(self._channel)
        self._answer_timeout = CALL_SECONDS
        self.setup_bytes = 0

    def __str__(self) -> str:
        """For people: ``shard 1 at 127.0.0.1:50052``."""
        return f"shard {self.shard} at {self.address}"

    def wait_ready(self, deadline: float) -> None:
        """Wait until the shard can be reached; ``deadline`` is on the monotonic clock.

        Raises:
            ConnectionTimeoutError: when it cannot be by then.
        """
        begin = time.monotonic()
        if not self._is_ready(deadline):
            raise ConnectionTimeoutError(
                f"{self._who} could not reach {self}; start it there, correct the address, or wait for longer than "
                f"{time.monotonic() - begin:.0f} s with THRESHER_CONNECT_TIMEOUT"
            )

    def _is_ready(self, deadline: float) -> bool:
        """Wait until the shard can be reached; False when it cannot be by then, or the channel is closed."""
        begin = time.monotonic()
        while (left := deadline - time.monotonic()) > 0 and not self._closed.is_set():
            # A call, because a future of the channel leaves a thread behind that fails when the channel is closed.
            try:
                self._stub.Statistics(pb.StatisticsRequest(), timeout=min(left, NOTICE_SECONDS), wait_for_ready=True)
            except grpc.RpcError as error:
                if not is_transient(error):
                    raise self.translate(error) from None
                waited = time.monotonic() - begin
                _logger.warning("%s has waited %.0f s for %s", self._who, waited, self)
            else:
                return True
        return False

    def _insist(self, call: Callable[[], T]) -> T:
        """Make a call; repeat it while the shard cannot be reached or breaks off, until the patience is used up."""
        deadline = math.inf
        for pause in pauses():
            try:
                return call()
            except grpc.RpcError as error:
                if not is_transient(error) or not self.patience:
                    raise self.translate(error) from None
                deadline = min(deadline, time.monotonic() + self.patience)
                _logger.warning("%s has lost %s (%s); looking for it", self._who, self, details(error))
            if self._closed.wait(pause) or not self._is_ready(deadline):
                break
        raise ConnectionTimeoutError(
            f"{self._who} has lost {self}, and not found it again in {self.patience:.0f} s; see its log and start it "
            "again, or look for longer: THRESHER_RECONNECT_TIMEOUT"
        )

    def register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Announce a worker. Raises what the shard raised (`RegistrationError`, `LayoutError`, …)."""
        return self._insist(lambda: self._register(request))

    def _register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        response = self._stub.Register(request, timeout=CALL_SECONDS)
        self._answer_timeout = response.answer_timeout
        return response

    def seed(self, registration: pb.RegisterRequest, data: bytes, refill: pb.Refill | None = None) -> bool:
        """Give the shard its starting values, or what it has lost; False when it needs none."""
        self.setup_bytes += len(data)
        return self._insist(lambda: self._seed(registration, data, refill))

    def _seed(self, registration: pb.RegisterRequest, data: bytes, refill: pb.Refill | None) -> bool:
        self._register(registration)  # a shard that has just lost its state knows nobody
        requests = (
            pb.SeedRequest(
                rank=registration.rank,
                incarnation=registration.incarnation,
                total_bytes=len(data),
                chunk=chunk,
                refill=refill if index == 0 else None,
            )
            for index, (_, chunk) in enumerate(chunks(data))
        )
        return self._stub.Seed(requests, timeout=self._answer_timeout + MARGIN_SECONDS).accepted

    def snapshot(self, wait_seconds: float) -> Snapshot:
        """Return the shard's state; waits until it is seeded.

        Raises:
            RoundFailedError: when it is not seeded in time.
            FrameError: when the answer is no state of a model.
        """
        request = pb.SnapshotRequest(wait_seconds=wait_seconds)
        parts = self._insist(lambda: list(self._stub.Snapshot(request, timeout=wait_seconds + MARGIN_SECONDS)))
        snapshot, size = snapshot_from_parts(parts, str(self))
        self.setup_bytes += size
        return snapshot

    def statistics(self, timeout: float = CALL_SECONDS) -> pb.StatisticsResponse:
        """Return the shard's counters."""
        with self.translated():
            return self._stub.Statistics(pb.StatisticsRequest(), timeout=timeout)

    def exchange(self, requests: Iterable[pb.ExchangeRequest]) -> Iterator[pb.ExchangeResponse]:
        """Open a conversation; what it says is read by iterating, which raises gRPC's own errors."""
        return self._stub.Exchange(iter(requests))

    def close(self) -> None:
        """Close the channel, and with it everything that is open."""
        self._closed.set()
        self._channel.close()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Raise gRPC's errors as ours."""
        try:
            yield
        except grpc.RpcError as error:
            raise self.translate(error) from None

    def translate(self, error: Exception) -> ThresherError:
        """Return a gRPC error as one of ours."""
        if not isinstance(error, grpc.Call):
            return ProtocolError(f"{self}: {error}")
        said = details(error)
        name = dict(error.trailing_metadata() or ()).get(ERROR_NAME)
        if name is not None:
            return error_named(str(name), f"{said} [{self}]")
        match error.code():
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
                return ShardLostError(
                    f"{self._who} has lost {self}: it ended or cannot be reached ({said}); see its log"
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return ConnectionTimeoutError(
                    f"{self} did not answer {self._who} in time ({said}); look at the shard's log and its disk"
                )
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                return AccessDeniedError(f"{self} refused {self._who}: {said}")
            case code:
                return ProtocolError(f"{self}: {code.name}: {said}")


def is_transient(error: Exception) -> bool:
    """Return True for what the network does; False for what the shard says, which carries the name of its error."""
    if not isinstance(error, grpc.Call):
        return False
    return dict(error.trailing_metadata() or ()).get(ERROR_NAME) is None and error.code() in _TRANSIENT


def details(error: Exception) -> str:
    """Return what an error of gRPC says, for people."""
    return (error.details() or "") if isinstance(error, grpc.Call) else str(error)
