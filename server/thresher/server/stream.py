"""What one worker is being told: updates, encoded once for all workers, and answers, in the order they happened."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from thresher.protos.errors import BehindError, ThresherError
from thresher.protos.sealed import SealedUpdate
from thresher.server.events import Worker
from thresher.v1 import aggregation_pb2 as pb

ANSWER_BYTES: Final = 1 << 20
"""How much one worker may leave unread of answers: who is honest waits for one push and one agreement at a time."""


@final
class UnreadError(BehindError):
    """A worker does not read what it is told; what it lacks it finds in the log or in a snapshot, as if it had gone."""


@final
@dataclass(slots=True)
class _Unread:
    """How much waits of what a worker is told, and how much may wait when more is to be said."""

    what: str
    bound: int
    bytes: int = 0


@final
class Stream:
    """What one exchange stream is about to say. Filled and emptied on the asyncio loop.

    It hears of new updates from before its hello is sent to the shard until it ends, so that none falls between the
    answer to the hello and the first update after it. What waits is bounded: who does not read is told no more.

    Args:
        update_bytes: How much may wait of updates when another comes. Where all workers are sent the same updates, all
            streams wait for the ends of one sequence, and together hold no more than the one that waits for most; with
            the shadow outside lockstep each holds its own.

    Attributes:
        worker: Whose it is, once it has said so.
        refusal: Why it was ended; None while it goes on, and when it was ended in peace.
    """

    def __init__(self, update_bytes: int) -> None:
        """Begin with nothing to say, to nobody yet."""
        self.worker: Worker | None = None
        self.refusal: ThresherError | None = None
        self._updates, self._answers = _Unread("updates", update_bytes), _Unread("answers", ANSWER_BYTES)
        self._waiting: deque[tuple[pb.ExchangeResponse, int, _Unread]] = deque()
        self._early: list[SealedUpdate] | None = []  # published before the hello was answered
        self._news = asyncio.Event()
        self._reader: asyncio.Task[Any] | None = None
        self._ended = False

    def listen(self, reader: "asyncio.Task[ThresherError | None]") -> None:
        """End with the task that hears the worker, for the reason it returns; and end it with the stream."""
        self._reader = reader
        reader.add_done_callback(lambda task: self.end(None if task.cancelled() else task.result()))

    def greet(self, backlog: Sequence[SealedUpdate]) -> None:
        """Begin with what the worker lacks, and go on with what was published since."""
        newest = backlog[-1].update.version if backlog else 0
        early, self._early = self._early or [], None
        for one in (*backlog, *(one for one in early if one.update.version > newest)):
            self.publish(one)

    def publish(self, sealed: SealedUpdate) -> None:
        """Send an update; end the stream instead when too much waits of those before."""
        if self._early is not None:
            self._early.append(sealed)
            return
        *parts, last = sealed.messages
        self._say([(part, 0) for part in parts] + [(last, sealed.wire_bytes)], self._updates)

    def say(self, message: pb.ExchangeResponse) -> None:
        """Send a message after those that wait already; end the stream instead when too much waits of such."""
        self._say([(message, message.ByteSize())], self._answers)

    def end(self, refusal: ThresherError | None = None) -> None:
        """End the stream after the messages that wait, for a reason if there is one. The first end counts."""
        if self._ended:
            return
        self._ended = True
        # Its traceback holds whatever was in hand where it was raised, this stream and the message refused too: a
        # circle, which would keep all that until the garbage collector comes by.
        self.refusal = None if refusal is None else refusal.with_traceback(None)
        self._news.set()
        reader, self._reader = self._reader, None  # each holds the other: another circle
        if reader is not None:  # also while the worker does not take what is being sent: it has no say any more
            reader.cancel()

    async def __aiter__(self) -> AsyncGenerator[pb.ExchangeResponse, None]:
        """Yield messages until the end; `refusal` then says why."""
        while True:
            while self._waiting:
                message, size, unread = self._waiting.popleft()
                unread.bytes -= size
                yield message
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()

    def _say(self, messages: Sequence[tuple[pb.ExchangeResponse, int]], unread: _Unread) -> None:
        if self._ended:
            return
        if unread.bytes > unread.bound:
            self._waiting.clear()
            who = "a worker" if self.worker is None else f"worker {self.worker.rank}"
            self.end(
                UnreadError(
                    f"{who} does not read what it is told: {unread.bytes} bytes of {unread.what} wait for it, "
                    f"{unread.bound} may; its stream is ended, and it may come back"
                )
            )
            return
        for message, size in messages:
            unread.bytes += size
            self._waiting.append((message, size, unread))
        self._news.set()
