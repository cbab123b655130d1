"""One shard as one worker sees it. Every wait has a deadline, and its error names the shard and its address."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn, final

import grpc
from torch import Tensor

from thresher.protos.errors import ConnectionTimeoutError, FrameError, ProtocolError, RoundFailedError, error_named
from thresher.protos.layout import Layout, Slice
from thresher.protos.messages import (
    Payload,
    chunks,
    layout_from_message,
    optimizer_from_message,
    payload_bound,
    update_from_message,
)
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.snapshots import state_bytes_bound, unpack_state
from thresher.protos.transport import CHANNEL_OPTIONS, ERROR_NAME
from thresher.protos.update import Update
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceStub

_logger = logging.getLogger(__name__)

# A worker may come long before its shards; gRPC's own pauses between two attempts grow to minutes.
_RECONNECT_OPTIONS: Final = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000))
_CALL_SECONDS: Final = 60.0
_NOTICE_SECONDS: Final = 5.0
_GOODBYE_SECONDS: Final = 2.0
_MARGIN_SECONDS: Final = 30.0  # a shard fails a round at its own deadline and says who is missing; let it speak first


@final
@dataclass(frozen=True, slots=True)
class Snapshot:
    """A shard's state at ``version``: what `Replica` takes, untrained tensors by name, and what they belong to."""

    version: int
    layout: Layout
    optimizer: OptimizerSpec
    state: Mapping[str, Tensor]
    untrained: Mapping[str, Tensor]


@final
class ShardClient:
    """Registers with one shard and exchanges pushes for updates over one long-lived stream.

    ``push_bytes`` and ``pull_bytes`` count the messages of the exchange, continuations included; ``setup_bytes`` counts
    seed and snapshot.

    Args:
        shard: Position of the shard.
        address: ``host:port``.
        rank: The worker's rank.
        incarnation: The worker's life.
    """

    def __init__(self, shard: int, address: str, rank: int, incarnation: int) -> None:
        """Open a channel; gRPC connects in the background."""
        self.shard, self.address = shard, address
        self._rank, self._incarnation = rank, incarnation
        self._channel = grpc.insecure_channel(address, options=(*CHANNEL_OPTIONS, *_RECONNECT_OPTIONS))
        self._stub = AggregationServiceStub(self._channel)
        self._outbox: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[pb.ExchangeResponse | Exception] = queue.SimpleQueue()
        self._answer_timeout = _CALL_SECONDS
        self._reader: threading.Thread | None = None
        self.push_bytes = self.pull_bytes = self.setup_bytes = 0

    def __str__(self) -> str:
        """For people: ``shard 1 at 127.0.0.1:50052``."""
        return f"shard {self.shard} at {self.address}"

    def wait_ready(self, deadline: float) -> None:
        """Wait until the shard can be reached; ``deadline`` is on the monotonic clock.

        Raises:
            ConnectionTimeoutError: when it cannot be by then.
        """
        begin = time.monotonic()
        while (left := deadline - time.monotonic()) > 0:
            # A call, because a future of the channel leaves a thread behind that fails when the channel is closed.
            try:
                self._stub.Statistics(pb.StatisticsRequest(), timeout=min(left, _NOTICE_SECONDS), wait_for_ready=True)
            except grpc.RpcError as error:
                if _code(error) not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    self._raise(error)
                waited = time.monotonic() - begin
                _logger.warning("worker %d has waited %.0f s for %s", self._rank, waited, self)
            else:
                return
        raise ConnectionTimeoutError(
            f"worker {self._rank} could not reach {self}; start it there, or correct the address"
        )

    def register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Announce this worker. Raises what the shard raised (`RegistrationError`, `LayoutError`, …)."""
        with self._translated():
            response = self._stub.Register(request, timeout=_CALL_SECONDS)
        self._answer_timeout = response.answer_timeout
        return response

    def seed(self, data: bytes) -> bool:
        """Give the shard its starting values; False when it has some already."""
        self.setup_bytes += len(data)
        requests = (
            pb.SeedRequest(rank=self._rank, incarnation=self._incarnation, total_bytes=len(data), chunk=chunk)
            for _, chunk in chunks(data)
        )
        with self._translated():
            return self._stub.Seed(requests, timeout=self._answer_timeout).accepted

    def snapshot(self, wait_seconds: float) -> "Snapshot":
        """Return the shard's state; waits until it is seeded.

        Raises:
            RoundFailedError: when it is not seeded in time.
            FrameError: when the answer is no state of a model.
        """
        request = pb.SnapshotRequest(wait_seconds=wait_seconds)
        with self._translated():
            parts = self._stub.Snapshot(request, timeout=wait_seconds + _MARGIN_SECONDS)
            first = next(parts)
            layout, optimizer = layout_from_message(first.layout), optimizer_from_message(first.optimizer)
            payload = Payload(first.total_bytes, state_bytes_bound(layout, layout.numel))
            complete = payload.add(first.chunk)
            for part in parts:
                complete = payload.add(part.chunk)
        if not complete:
            raise FrameError(f"the snapshot of {self} broke off")
        self.setup_bytes += len(payload.data)
        return Snapshot(first.version, layout, optimizer, *unpack_state(bytes(payload.data)))

    def statistics(self, timeout: float = _CALL_SECONDS) -> pb.StatisticsResponse:
        """Return the shard's counters."""
        with self._translated():
            return self._stub.Statistics(pb.StatisticsRequest(), timeout=timeout)

    def open(self, version: int) -> None:
        """Begin the exchange with a replica at ``version``."""
        hello = pb.Hello(rank=self._rank, incarnation=self._incarnation, version=version)
        self._outbox.put(pb.ExchangeRequest(hello=hello))
        responses = self._stub.Exchange(iter(self._outbox.get, None))
        self._reader = threading.Thread(target=self._read, args=(responses,), name=f"shard-{self.shard}", daemon=True)
        self._reader.start()

    def push(self, push: pb.Push, frame: bytes) -> None:
        """Send a push; returns before it has left."""
        for message in _messages(pb.ExchangeRequest(push=push), frame):
            self.push_bytes += message.ByteSize()
            self._outbox.put(message)

    def wait_update(self, piece: Slice) -> Update:
        """Wait for the next update of the slice.

        Raises:
            RoundFailedError: when the shard refused the push, gave the round up, or is gone.
        """
        deadline = time.monotonic() + self._answer_timeout + _MARGIN_SECONDS
        first = self._next(deadline)
        match first.WhichOneof("body"):
            case "update":
                payload = Payload(first.payload_bytes, payload_bound(piece))
                complete = payload.add(first.chunk)
                while not complete:
                    complete = payload.add(self._next(deadline).chunk)
                return update_from_message(first.update, payload.data, piece)
            case "result":
                verdict = pb.Verdict.Name(first.result.verdict).removeprefix("VERDICT_")
                raise RoundFailedError(f"{self}: push {first.result.step} was {verdict}: {first.result.reason}")
            case other:
                raise ProtocolError(f"{self} answered a push with {other}")

    def leave(self, step: int, buffers: bytes) -> None:
        """Leave the run before ``step``, and wait until the shard has recorded it."""
        leave = pb.Leave(step=step, push_bytes=self.push_bytes, pull_bytes=self.pull_bytes)
        for message in _messages(pb.ExchangeRequest(leave=leave), buffers):
            self._outbox.put(message)
        answer = self._next(time.monotonic() + _CALL_SECONDS)
        if not answer.HasField("left"):
            raise ProtocolError(f"{self} answered a leave with {answer.WhichOneof('body')}")

    def abort(self, reason: str) -> None:
        """Tell the shard that this worker cannot go on, and wait a moment for it to take note; best effort."""
        self._outbox.put(pb.ExchangeRequest(abort=pb.Abort(reason=reason)))
        deadline = time.monotonic() + _GOODBYE_SECONDS
        with contextlib.suppress(queue.Empty):
            while not isinstance(self._inbox.get(timeout=max(0.0, deadline - time.monotonic())), Exception):
                continue  # an update that was on its way

    def close(self) -> None:
        """End stream and channel."""
        self._outbox.put(None)
        self._channel.close()
        if self._reader is not None:
            self._reader.join(timeout=_NOTICE_SECONDS)

    def _next(self, deadline: float) -> pb.ExchangeResponse:
        try:
            item = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise RoundFailedError(
                f"{self} has not answered worker {self._rank} by the deadline and does not say why; look at its log"
            ) from None
        if isinstance(item, Exception):
            self._inbox.put(item)  # what ended the stream ends every later wait too
            if isinstance(item, grpc.RpcError):
                self._raise(item)
            raise item
        return item

    def _read(self, responses: Iterator[pb.ExchangeResponse]) -> None:
        """Run on its own thread: a gRPC stream cannot be read with a deadline, a queue can."""
        try:
            for response in responses:
                if response.WhichOneof("body") not in ("left", "result"):  # updates and their continuations
                    self.pull_bytes += response.ByteSize()
                self._inbox.put(response)
        except grpc.RpcError as error:
            self._inbox.put(error)
        else:
            self._inbox.put(RoundFailedError(f"{self} has ended the exchange"))

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            self._raise(error)

    def _raise(self, error: Exception) -> NoReturn:
        """Raise a gRPC error as one of ours."""
        if not isinstance(error, grpc.Call):
            raise ProtocolError(f"{self}: {error}") from error
        details = error.details() or ""
        name = dict(error.trailing_metadata() or ()).get(ERROR_NAME)
        if name is not None:
            raise error_named(str(name), f"{details} [{self}]") from None
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            raise RoundFailedError(
                f"worker {self._rank} has lost {self}: it ended or cannot be reached ({details}); see its log"
            ) from None
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise ConnectionTimeoutError(f"{self} did not answer worker {self._rank} in time ({details})") from None
        raise ProtocolError(f"{self}: {error.code().name}: {details}") from None


def _code(error: Exception) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


def _messages(first: pb.ExchangeRequest, payload: bytes) -> Iterator[pb.ExchangeRequest]:
    for index, (size, chunk) in enumerate(chunks(payload)):
        message = first if index == 0 else pb.ExchangeRequest()
        message.payload_bytes, message.chunk = size, chunk
        yield message
