"""The one thread that owns a shard: events in through a bounded mailbox, effects out.

Everything else (sockets, deadlines, waiting) happens on the asyncio loop. The two meet at two places only: `submit`
puts an event into the mailbox, and answers come back by ``call_soon_threadsafe``.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar, final

from thresher.protos.errors import ProtocolError, ThresherError
from thresher.protos.update import Update
from thresher.server import events
from thresher.server.events import Effect, Event, IterationRow
from thresher.server.shard import Shard
from thresher.server.statistics import ShardStatistics

MAILBOX_EVENTS: Final = 1024
_TICK_SECONDS: Final = 0.2
_ENDED: Final = "the shard has ended"

_logger = logging.getLogger(__name__)

Answer = asyncio.Future[list[Effect]]


class Encoded(Protocol):
    """An update as it is sent; only its size matters here."""

    @property
    def wire_bytes(self) -> int:
        """Bytes that each worker will receive."""
        ...


E_contra = TypeVar("E_contra", bound=Encoded, contravariant=True)
E = TypeVar("E", bound=Encoded)


class Subscriber(Protocol[E_contra]):
    """Who hears what concerns everybody. Called on the asyncio loop, in the order in which things happened."""

    def publish(self, update: E_contra) -> None:
        """Send an encoded update to every connected worker."""

    def fail(self, reason: str) -> None:
        """Tell every connected worker that the run cannot go on."""


@final
class Engine(Generic[E]):
    """Runs a `Shard` on a thread of its own.

    Args:
        shard: The state machine; from now on nobody else touches it.
        encode: Turns an update into what subscribers send; called once for each update.
        record: Takes each row of the per-iteration file.
    """

    def __init__(
        self,
        shard: Shard,
        encode: Callable[[Update], E],
        record: Callable[[IterationRow], None],
    ) -> None:
        """Prepare; `start` begins."""
        self._shard = shard
        self._encode = encode
        self._record = record
        self._mailbox: queue.SimpleQueue[tuple[Event, Answer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shard", daemon=True)
        self._statistics = shard.statistics()
        self._ended = False

    def start(self, loop: asyncio.AbstractEventLoop, subscriber: Subscriber[E]) -> None:
        """Begin to take events; answers and effects are delivered on ``loop``."""
        self._loop, self._subscriber = loop, subscriber
        self._room = asyncio.Semaphore(MAILBOX_EVENTS)
        self._thread.start()

    def stop(self) -> None:
        """Finish what is in the mailbox and end the thread."""
        self._mailbox.put(None)
        self._thread.join()

    async def submit(self, event: Event) -> list[Effect]:
        """Hand an event to the shard and wait for its effects; first for room, when many events are waiting.

        Raises:
            ProtocolError: after `stop`.
            ThresherError: as the shard raised it; the event changed nothing.
        """
        async with self._room:
            answer: Answer = self._loop.create_future()
            self._mailbox.put((event, answer))
            if self._ended:  # looked at after the put: an event that came too late to be turned away by the thread
                raise ProtocolError(_ENDED)
            return await answer

    def statistics(self) -> ShardStatistics:
        """Return the shard's counters as of its last event; from any thread."""
        return self._statistics

    def _run(self) -> None:
        next_tick = time.monotonic() + _TICK_SECONDS
        while True:
            try:
                item = self._mailbox.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if item is None:
                    self._turn_away()
                    return
                self._take(*item)
            if time.monotonic() >= next_tick:  # also when the mailbox is never empty: deadlines hold under load
                next_tick = time.monotonic() + _TICK_SECONDS
                self._tick()

    def _turn_away(self) -> None:
        """Answer the events that came after the end; the order of these two lines leaves none without an answer."""
        self._ended = True
        while not self._mailbox.empty():
            item = self._mailbox.get()
            if item is not None:
                self._tell(item[1], ProtocolError(_ENDED))

    def _tick(self) -> None:
        try:
            self._perform(self._shard.handle(events.Tick(), time.monotonic()))
        except Exception:  # a bug: the thread must live, or every worker would wait for ever
            _logger.exception("the shard could not handle the passing of time")

    def _take(self, event: Event, answer: Answer) -> None:
        try:
            effects = self._shard.handle(event, time.monotonic())
            self._perform(effects)
        except ThresherError as error:
            self._tell(answer, error)
        except Exception as error:  # a bug: the sender must hear of it, and the thread must live to say so
            _logger.exception("the shard could not handle %s", type(event).__name__)
            self._tell(answer, error)
        else:
            self._tell(answer, effects)

    def _perform(self, effects: list[Effect]) -> None:
        """Do what the shard wants done; answers to the sender are left to the sender.

        Counters are renewed first: who hears of something and then asks for them finds it counted.
        """
        self._statistics = self._shard.statistics()
        for effect in effects:
            match effect:
                case events.Publish(update):
                    self._publish(update)
                case events.Record(row):
                    self._write(row)
                case events.Notice(text):
                    _logger.warning("%s", text)
                case events.Failed(reason):
                    _logger.error("%s", reason)
                    self._loop.call_soon_threadsafe(self._subscriber.fail, reason)
                case _:
                    pass

    def _publish(self, update: Update) -> None:
        encoded = self._encode(update)
        published = events.Published(update.version, encoded.wire_bytes)
        self._perform(self._shard.handle(published, time.monotonic()))
        self._loop.call_soon_threadsafe(self._subscriber.publish, encoded)

    def _write(self, row: IterationRow) -> None:
        """Record a row. One that cannot be written, on a full disk say, is told, and keeps no worker waiting."""
        try:
            self._record(row)
        except OSError as error:
            _logger.error("the row of version %d could not be recorded: %s", row.version, error)  # noqa: TRY400

    def _tell(self, answer: Answer, result: list[Effect] | Exception) -> None:
        def deliver() -> None:
            if answer.done():  # the sender went away
                return
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        self._loop.call_soon_threadsafe(deliver)
