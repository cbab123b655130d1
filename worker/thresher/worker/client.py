"""One shard as one worker sees it: a conversation that outlives its connections.

What has no answer yet is kept and said again on the next connection; the shard knows it by (rank, step). Every wait has
a deadline, and its error names the shard and its address.
"""

import logging
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, final

import grpc

from thresher.protos.errors import (
    ConnectionTimeoutError,
    LostHistoryError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.faults import reached
from thresher.protos.layout import Slice
from thresher.protos.messages import Payload, chunks, payload_bound
from thresher.protos.sealed import update_from_message
from thresher.protos.timeouts import NOTICE_SECONDS, longest_wait
from thresher.protos.update import Update
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import ShardCalls, details, is_transient, pauses

_logger = logging.getLogger(__name__)

_GOODBYE_SECONDS: Final = 2.0


@final
@dataclass(frozen=True, slots=True)
class Returned:
    """The shard did not take a push; its values go back into the residual."""

    step: int
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Settled:
    """The shard took a push while there was no connection; its update may never be told on its own."""

    step: int


Told = Update | Returned | Settled
"""What a shard tells a worker that exchanges."""


@final
class ShardClient:
    """Exchanges pushes for updates with one shard.

    ``push_bytes`` and ``pull_bytes`` count the messages of the exchange, continuations included, each once;
    ``resent_bytes`` what was said again. ``first_update`` is the version of the first update that came, and its bytes.

    Args:
        calls: To the shard; their patience is how long it is looked for when it was lost.
        registration: As the shard has accepted it; its rank and incarnation are the worker's.
        answer_timeout: Seconds after which the shard answers at the latest, as it says itself.
    """

    def __init__(self, calls: ShardCalls, registration: pb.RegisterRequest, answer_timeout: float) -> None:
        """Prepare; `open` begins."""
        self.calls = calls
        self._registration = pb.RegisterRequest()
        self._registration.CopyFrom(registration)
        self._who = f"worker {registration.rank}"
        self._longest_wait = longest_wait(answer_timeout, calls.patience)
        self._said = "a hello"  # for people: what the next answer is to
        self._lock = threading.Lock()  # over the next two, which both the caller and the reader thread touch
        self._outbox: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self._unanswered: list[pb.ExchangeRequest] = []
        self._inbox: queue.SimpleQueue[Told | pb.Left | Exception] = queue.SimpleQueue()
        self._agreed: queue.SimpleQueue[pb.Agreed | Exception] = queue.SimpleQueue()
        self._slice: Slice | None = None
        self._reader: threading.Thread | None = None
        self._closed = threading.Event()
        self._pauses = pauses()  # before a broken stream is opened anew; from the shortest again once one has spoken
        self.history = pb.History()
        self.reconnects = 0
        self.push_bytes = self.pull_bytes = self.resent_bytes = 0
        self.first_update: tuple[int, int] | None = None

    def __str__(self) -> str:
        """For people: ``shard 1 at 127.0.0.1:50052``."""
        return str(self.calls)

    @property
    def registration(self) -> pb.RegisterRequest:
        """As the shard has accepted it."""
        return self._registration

    @property
    def longest_wait(self) -> float:
        """Seconds after which this worker gives an answer up: longer than the shard takes to say why there is none."""
        return self._longest_wait

    def open(self, piece: Slice, history: pb.History) -> None:
        """Begin the exchange, from a replica at ``history``."""
        self._slice = piece
        self.history.CopyFrom(history)
        self._start()

    def reopen(self, history: pb.History) -> pb.RegisterResponse:
        """Begin again, after an error ended the exchange, and say again what is unanswered."""
        if self._reader is not None:
            self._reader.join()
        for waiting in (self._inbox, self._agreed):
            while not waiting.empty():
                waiting.get()
        self.history.CopyFrom(history)
        answer = self.calls.register(self._registration)
        self._settle(answer)
        self._start()
        return answer

    def _start(self) -> None:
        self._connect()
        self._reader = threading.Thread(target=self._converse, name=f"shard-{self.calls.shard}", daemon=True)
        self._reader.start()

    def push(self, push: pb.Push, frame: bytes) -> None:
        """Send a push; returns before it has left. It is kept until it is answered."""
        self._said = f"its push of step {push.step}"
        messages = list(_messages(pb.ExchangeRequest(push=push), frame))
        self.push_bytes += _bytes_of(messages)
        self._say(messages)
        reached(self._who, "in flight")

    def wait(self, seconds: float = math.inf) -> Told | None:
        """Wait for the next update of the slice, or for what became of a push; None when there is none for ``seconds``.

        Raises:
            BehindError, LostHistoryError: when this worker and the shard have to find together first; see `open`.
            DataLossError: when they cannot.
            RoundFailedError: when the shard refused the push, gave the round up, or is gone.
        """
        item = self._next(seconds)
        if isinstance(item, pb.Left):
            raise ProtocolError(f"{self} answered a push with a leave")
        return item

    def answered(self) -> None:
        """Say that the last push has its verdict: it need not be said again."""
        with self._lock:
            self._unanswered = []

    def ask(self, number: int, values: Mapping[str, float]) -> None:
        """Say what this worker has to say in agreement ``number``."""
        self._say([pb.ExchangeRequest(agree=pb.Agree(number=number, values=values))])

    def wait_agreed(self, number: int) -> Mapping[str, float]:
        """Return the members' mean of what they said in agreement ``number``; waits until all have asked."""
        self._said = f"what it asked in agreement {number}"
        while True:
            try:
                answer = self._agreed.get(timeout=self._longest_wait)
            except queue.Empty:
                raise self._unheard() from None
            if isinstance(answer, Exception):
                raise answer
            if answer.number == number:  # an earlier one may have been told twice
                self.answered()
                return dict(answer.values)

    def leave(self, leave: pb.Leave, buffers: bytes) -> None:
        """Say that this worker leaves the run."""
        self._said = "its leave"
        leave.push_bytes, leave.pull_bytes = self.push_bytes, self.pull_bytes
        leave.counted = leave.counted and not self.reconnects
        self._say(list(_messages(pb.ExchangeRequest(leave=leave), buffers)))

    def wait_left(self) -> None:
        """Wait until the shard has recorded the leave. Raises what `wait` raises."""
        while not isinstance(self._next(), pb.Left):
            continue  # an update that was on its way

    def abort(self, reason: str) -> None:
        """Tell the shard that this worker cannot go on, and wait a moment for it to take note; best effort."""
        self._closed.set()
        self._outbox.put(pb.ExchangeRequest(abort=pb.Abort(reason=reason)))
        if self._reader is not None:
            self._reader.join(timeout=_GOODBYE_SECONDS)

    def close(self) -> None:
        """End stream and channel."""
        self._closed.set()
        self._outbox.put(None)
        self.calls.close()
        if self._reader is not None:
            self._reader.join(timeout=NOTICE_SECONDS)

    def _say(self, messages: list[pb.ExchangeRequest]) -> None:
        with self._lock:
            self._unanswered = messages
            for message in messages:
                self._outbox.put(message)

    def _next(self, seconds: float = math.inf) -> Told | pb.Left | None:
        try:
            item = self._inbox.get(timeout=min(seconds, self._longest_wait))
        except queue.Empty:
            if seconds < self._longest_wait:
                return None
            raise self._unheard() from None
        if isinstance(item, Exception):
            self._inbox.put(item)  # what ended the exchange ends every later wait too, until it is opened again
            raise item
        return item

    def _unheard(self) -> RoundFailedError:
        return RoundFailedError(
            f"{self} has not answered {self._who} in {self._longest_wait:.0f} s, on {self._said} at {self._place}, and "
            "does not say why; look at its log, and start it again if it hangs"
        )

    @property
    def _place(self) -> str:
        return f"version {self.history.version}"

    # The reader thread

    def _connect(self) -> None:
        """Open a stream: a hello, and what is unanswered."""
        hello = pb.Hello(
            rank=self._registration.rank,
            incarnation=self._registration.incarnation,
            version=self.history.version,
            run=self.history.run,
            digest=self.history.digest,
        )
        with self._lock:
            self._outbox.put(None)  # the generator of the stream before may still wait here
            self._outbox = queue.SimpleQueue()
            for message in (pb.ExchangeRequest(hello=hello), *self._unanswered):
                self._outbox.put(message)
            if self._reader is not None:
                for message in self._unanswered:
                    if message.HasField("leave"):
                        message.leave.counted = False  # bytes were lost, or told twice
                self.resent_bytes += _bytes_of(self._unanswered)
            self._responses = self.calls.exchange(iter(self._outbox.get, None))

    def _converse(self) -> None:
        """Run on its own thread: a gRPC stream cannot be read with a deadline, and must be found again at any time."""
        while True:
            try:
                self._read(self._responses)
            except grpc.RpcError as error:
                if self._closed.is_set() or not is_transient(error):
                    self._end(self.calls.translate(error))
                    return
                _logger.warning("%s has lost %s (%s); looking for it", self._who, self, details(error))
            except ThresherError as error:
                self._end(error)
                return
            else:
                self._end(RoundFailedError(f"{self} ended its exchange with {self._who} at {self._place}; see its log"))
                return
            try:
                self._reconnect()
            except ThresherError as error:
                self._end(error)
                return

    def _end(self, error: Exception) -> None:
        self._inbox.put(error)
        self._agreed.put(error)

    def _read(self, responses: Iterator[pb.ExchangeResponse]) -> None:
        body: pb.Update | None = None
        payload, wire_bytes = Payload(0, 0), 0
        for response in responses:
            self._pauses = pauses()
            match response.WhichOneof("body"):
                case "result":
                    self._take_result(response.result)
                    continue
                case "left":
                    self._inbox.put(response.left)
                    continue
                case "agreed":
                    self._agreed.put(response.agreed)
                    continue
                case "update":
                    body, wire_bytes = response.update, 0
                    payload = Payload(response.payload_bytes, payload_bound(self._piece))
                case _:
                    pass
            if body is None:
                raise ProtocolError(f"{self} sent a part of a payload before its message")
            wire_bytes += response.ByteSize()
            if payload.add(response.chunk):
                self._take_update(body, payload.data, wire_bytes)
                body = None

    @property
    def _piece(self) -> Slice:
        if self._slice is None:
            raise ProtocolError(f"the exchange with {self} has not been opened")
        return self._slice

    def _take_update(self, body: pb.Update, frame: bytearray, wire_bytes: int) -> None:
        update = update_from_message(body, frame, self._piece)
        self.pull_bytes += wire_bytes
        self.first_update = self.first_update or (update.version, wire_bytes)
        self.history.version, self.history.digest = max(self.history.version, update.version), update.digest
        self._inbox.put(update)

    def _take_result(self, result: pb.PushResult) -> None:
        match result.verdict:
            case pb.VERDICT_RETURNED:
                self._inbox.put(Returned(result.step, result.reason))
            case pb.VERDICT_APPLIED:  # before it came again; of a mean, after the mean, where the shard remembers it
                self._inbox.put(Settled(result.step))
            case pb.VERDICT_DUPLICATE:
                pass  # it waits for its verdict
            case _:
                verdict = pb.Verdict.Name(result.verdict).removeprefix("VERDICT_")
                refused = f"{self._who} and {self}: push {result.step} was {verdict}: {result.reason}"
                self._end(RoundFailedError(f"{refused}. Run the same script and release on all workers"))

    def _reconnect(self) -> None:
        """Find the shard again. Raises ConnectionTimeoutError when it does not come back in time."""
        self.reconnects += 1
        if self._closed.wait(next(self._pauses)):
            raise RoundFailedError(f"{self._who} has ended its exchange with {self}")
        try:
            response = self.calls.register(self._registration)
        except ConnectionTimeoutError as error:
            raise ConnectionTimeoutError(f"{error}; it was at {self._place}") from None
        self._settle(response)
        self._connect()

    def _settle(self, response: pb.RegisterResponse) -> None:
        """Hear what became of the last push while there was no connection.

        Raises:
            LostHistoryError: when the shard has lost everything.
        """
        if self.history.run and not response.seeded:
            raise LostHistoryError(f"{self} has lost its state: it has no model any more")
        with self._lock:
            first = self._unanswered[0] if self._unanswered else pb.ExchangeRequest()
            if not first.HasField("push") or first.push.step >= response.settled_steps:
                return
            if not first.push.only_mean:  # the mean of such a round is asked for again
                self._unanswered = []
        step = first.push.step
        if response.last_verdict == pb.VERDICT_RETURNED and step == response.settled_steps - 1:
            self._inbox.put(Returned(step, "while there was no connection"))
        elif not first.push.only_mean:
            self._inbox.put(Settled(step))


def push_bytes_of(push: pb.Push, frame: bytes) -> int:
    """Return the bytes of exchange messages that a push takes."""
    return _bytes_of(_messages(pb.ExchangeRequest(push=push), frame))


def _bytes_of(messages: Iterable[pb.ExchangeRequest]) -> int:
    return sum(message.ByteSize() for message in messages)


def _messages(first: pb.ExchangeRequest, payload: bytes) -> Iterator[pb.ExchangeRequest]:
    for index, (size, chunk) in enumerate(chunks(payload)):
        message = first if index == 0 else pb.ExchangeRequest()
        message.payload_bytes, message.chunk = size, chunk
        yield message
