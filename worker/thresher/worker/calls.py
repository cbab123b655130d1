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
    ConfigurationError,
    ConnectionTimeoutError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
    error_named,
)
from thresher.protos.messages import chunks
from thresher.protos.timeouts import CALL_SECONDS, MARGIN_SECONDS, NOTICE_SECONDS
from thresher.protos.transport import ERROR_NAME, channel, check_address
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub
from thresher.worker.directory import locate, name_in
from thresher.worker.snapshot import Snapshot, snapshot_from_parts

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0
_LOOK_SECONDS: Final = 1.0
"""A directory is asked once in so long."""

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
class _Line:
    """The channel to a shard: to one place for good, or, of a named one, to wherever it is now.

    Of a shard that has moved the old channel is closed, and what is open on it breaks off as if the shard had ended.

    Args:
        address: ``host:port`` or ``SCHEME://RUN/SHARD``.
        credentials: What is shown to the shard, and trusted.
        insecure: Plain text may go wherever the name leads.
    """

    def __init__(self, address: str, credentials: Credentials, *, insecure: bool) -> None:
        """Open the channel to a place; a name is looked up by `find`."""
        self._address, self._credentials, self._insecure = address, credentials, insecure
        self._lock = threading.Lock()  # over changes of the next four; a directory may take its time, and is outside
        self._place = ""
        self._channel: grpc.Channel | None = None
        self._stub: AggregationServiceStub | None = None
        self._closed = False
        self._trouble = ""
        self._next_look = -math.inf
        self.is_named = name_in(address) is not None
        if not self.is_named:
            self._open(address)

    def __str__(self) -> str:
        """For people: ``127.0.0.1:50052``, or ``ray://digits/1 (127.0.0.1:50052)``."""
        if not self.is_named:
            return self._address
        known = (self._place or "not found yet", self._trouble)
        return f"{self._address} ({'; '.join(filter(None, known))})"

    def find(self) -> None:
        """Look up where a named shard is now, unless that was done just before; a channel to there is opened.

        While its directory cannot say so, the place that is known stays.

        Raises:
            ConnectionTimeoutError: when none is known, and the directory cannot say one at the moment.
            ConfigurationError: when it says one that is none, or to which plain text must not go.
            ThresherError: as the directory raises it, where another attempt would not help.
        """
        if not self.is_named or time.monotonic() < self._next_look:
            return
        try:
            place = locate(self._address)
        except ConnectionTimeoutError as error:
            self._trouble = str(error)
            if not self._place:
                raise
        else:
            self._trouble = ""
            self._check(place)
            self._open(place)
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def call(self, make: Callable[[AggregationServiceStub], T]) -> T:
        """Begin a call; where another thread has found the shard elsewhere just then, begin it there.

        Raises:
            grpc.RpcError: as the call raises it.
            ShardLostError: when this line was closed.
        """
        while not self._closed:
            stub = self._stub
            if stub is None:
                self.find()
                continue
            try:
                return make(stub)
            except ValueError:  # gRPC's, of a call on a channel that is closed
                if stub is self._stub and not self._closed:
                    raise
        raise ShardLostError(f"the connection to {self} was closed on this side")

    def close(self) -> None:
        """Close the channel, for good, and with it everything that is open."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()

    def _check(self, place: str) -> None:
        try:
            check_address(place, insecure=self._insecure, encrypted=self._credentials.tls is not None)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._address} was looked up: {error}") from None

    def _open(self, place: str) -> None:
        with self._lock:
            if self._closed or place == self._place:
                return
            left = self._channel
            self._channel = channel(place, self._credentials, _RECONNECT_OPTIONS)
            self._stub = AggregationServiceStub(self._channel)
            self._place = place
        if left is not None:
            left.close()


@final
class ShardCalls:
    """Calls to one shard. ``setup_bytes`` counts seeds and snapshots.

    All may be repeated: registering, seeding and reading twice is as good as once. So a shard that is lost in the
    middle of one is looked for, and asked again; where it goes by a name, that is looked up each time.

    Args:
        shard: Position of the shard.
        address: ``host:port``, which `check_address` has let pass, or ``SCHEME://RUN/SHARD``.
        who: The caller, for people: ``worker 3``.
        credentials: What is shown to the shard, and trusted.
        patience: Seconds to try to find the shard again when it is lost; 0 tells so at once.
        insecure: Plain text may go wherever a name leads.

    Raises:
        ConfigurationError: when the address is no name of a shard, or a file of the credentials cannot be read.
    """

    def __init__(
        self,
        shard: int,
        address: str,
        who: str,
        credentials: Credentials = NO_CREDENTIALS,
        patience: float = 0.0,
        *,
        insecure: bool = False,
    ) -> None:
        """Prepare; gRPC connects in the background."""
        self.shard, self.patience = shard, patience
        self._who = who
        self._closed = threading.Event()
        self._line = _Line(address, credentials, insecure=insecure)
        self._answer_timeout = CALL_SECONDS
        self.setup_bytes = 0

    def __str__(self) -> str:
        """For people: ``shard 1 at 127.0.0.1:50052``; of a named one both, the name and where it is."""
        return f"shard {self.shard} at {self._line}"

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
        notice = NOTICE_SECONDS
        while (left := deadline - time.monotonic()) > 0 and not self._closed.is_set():
            if self._answers(min(left, NOTICE_SECONDS)):
                return True
            if (waited := time.monotonic() - begin) >= notice:
                notice = waited + NOTICE_SECONDS
                _logger.warning("%s has waited %.0f s for %s", self._who, waited, self)
        return False

    def _answers(self, seconds: float) -> bool:
        """Look for the shard, and ask it something; False when it does not answer for ``seconds``."""
        question, stays = pb.StatisticsRequest(), not self._line.is_named
        # A call, because a future of the channel leaves a thread behind that fails when the channel is closed. It waits
        # for a place that stays; of a name, the directory may soon know a better one.
        try:
            self._line.find()
            self._line.call(lambda stub: stub.Statistics(question, timeout=seconds, wait_for_ready=stays))
        except (grpc.RpcError, ConnectionTimeoutError) as error:
            if not is_transient(error):
                raise self.translate(error) from None
            if not stays:
                self._closed.wait(min(seconds, _LOOK_SECONDS))
            return False
        return True

    def _insist(self, call: Callable[[AggregationServiceStub], T]) -> T:
        """Make a call; repeat it while the shard cannot be reached or breaks off, until the patience is used up."""
        deadline = math.inf
        for pause in pauses():
            try:
                self._line.find()
                return self._line.call(call)
            except (grpc.RpcError, ConnectionTimeoutError) as error:
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
        return self._insist(lambda stub: self._register(stub, request))

    def _register(self, stub: AggregationServiceStub, request: pb.RegisterRequest) -> pb.RegisterResponse:
        response = stub.Register(request, timeout=CALL_SECONDS)
        self._answer_timeout = response.answer_timeout
        return response

    def seed(self, registration: pb.RegisterRequest, data: bytes, refill: pb.Refill | None = None) -> bool:
        """Give the shard its starting values, or what it has lost; False when it needs none."""
        self.setup_bytes += len(data)
        return self._insist(lambda stub: self._seed(stub, registration, data, refill))

    def _seed(
        self, stub: AggregationServiceStub, registration: pb.RegisterRequest, data: bytes, refill: pb.Refill | None
    ) -> bool:
        self._register(stub, registration)  # a shard that has just lost its state knows nobody
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
        return stub.Seed(requests, timeout=self._answer_timeout + MARGIN_SECONDS).accepted

    def snapshot(self, wait_seconds: float) -> Snapshot:
        """Return the shard's state; waits until it is seeded.

        Raises:
            RoundFailedError: when it is not seeded in time.
            FrameError: when the answer is no state of a model.
        """
        request = pb.SnapshotRequest(wait_seconds=wait_seconds)
        timeout = wait_seconds + MARGIN_SECONDS
        parts = self._insist(lambda stub: list(stub.Snapshot(request, timeout=timeout)))
        snapshot, size = snapshot_from_parts(parts, str(self))
        self.setup_bytes += size
        return snapshot

    def statistics(self, timeout: float = CALL_SECONDS) -> pb.StatisticsResponse:
        """Return the shard's counters."""
        with self.translated():
            return self._line.call(lambda stub: stub.Statistics(pb.StatisticsRequest(), timeout=timeout))

    def measure(self, requests: Iterable[pb.MeasureRequest], timeout: float) -> Iterator[pb.MeasureResponse]:
        """Send bytes that mean nothing; what comes back is read by iterating, which raises gRPC's own errors."""
        return self._line.call(lambda stub: stub.Measure(iter(requests), timeout=timeout))

    def exchange(self, requests: Iterable[pb.ExchangeRequest]) -> Iterator[pb.ExchangeResponse]:
        """Open a conversation; what it says is read by iterating, which raises gRPC's own errors."""
        return self._line.call(lambda stub: stub.Exchange(iter(requests)))

    def close(self) -> None:
        """Close the channel, and with it everything that is open."""
        self._closed.set()
        self._line.close()

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Raise gRPC's errors as ours."""
        try:
            yield
        except grpc.RpcError as error:
            raise self.translate(error) from None

    def translate(self, error: Exception) -> ThresherError:
        """Return a gRPC error as one of ours; what is one already stays."""
        if isinstance(error, ThresherError):
            return error
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
            case grpc.StatusCode.UNIMPLEMENTED:
                return ProtocolError(
                    f"{self} does not know what {self._who} asks of it: it is no shard, or one of another release of "
                    "Thresher; correct the address, or run one release on all machines"
                )
            case code:
                return ProtocolError(f"{self}: {code.name}: {said}")


def is_transient(error: Exception) -> bool:
    """Return True for what the network does, and for a shard of which nobody knows at the moment where it is.

    False for what the shard says, which carries the name of its error.
    """
    if isinstance(error, ConnectionTimeoutError):
        return True
    if not isinstance(error, grpc.Call):
        return False
    return dict(error.trailing_metadata() or ()).get(ERROR_NAME) is None and error.code() in _TRANSIENT


def details(error: Exception) -> str:
    """Return what an error of gRPC says, for people."""
    return (error.details() or "") if isinstance(error, grpc.Call) else str(error)
