"""The one thread that owns a shard: events in through a bounded mailbox, effects out.

Everything else (sockets, deadlines, waiting) happens on the asyncio loop. The two meet at two places only: `submit`
puts an event into the mailbox, and answers come back by ``call_soon_threadsafe``. Nobody is told of anything before it
is in the journal.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol, final

from thresher.protos.errors import JournalError, ProtocolError, RoundFailedError, ThresherError
from thresher.protos.faults import reached
from thresher.protos.sealed import SealedUpdate
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import Event, IterationRow
from thresher.server.facts import Agreed, Closed, Record, record_to_bytes
from thresher.server.journal import Journal
from thresher.server.shard import Shard
from thresher.server.statistics import ShardStatistics

MAILBOX_EVENTS: Final = 1024
_TICK_SECONDS: Final = 0.2
_PAUSE_SECONDS: Final = 1.0
_ENDED: Final = "the shard has ended"

_logger = logging.getLogger(__name__)

Answer = asyncio.Future[list[Effect]]


class Subscriber(Protocol):
    """Who hears what concerns workers. Called on the asyncio loop, in the order in which things happened."""

    def publish(self, sealed: SealedUpdate, ranks: tuple[int, ...]) -> None:
        """Send an update to these workers, as far as they are connected."""

    def tell(self, agreed: Agreed, ranks: tuple[int, ...]) -> None:
        """Tell these workers what was agreed."""

    def restart(self, ranks: tuple[int, ...]) -> None:
        """End the streams of these workers, which will come back."""

    def fail(self, reason: str) -> None:
        """Tell every connected worker that the run cannot go on."""


@final
class Engine:
    """Runs a `Shard` on a thread of its own.

    Args:
        shard: The state machine; from now on nobody else touches it.
        name: For messages and fault plans: ``shard 1``.
        record: Takes each row of the per-iteration file.
        journal: Where records and checkpoints go; None keeps everything in memory only.
        patience: Seconds for which a journal that cannot be written pauses the run before it fails.

    Attributes:
        changes: How often what the shard keeps has changed: as long as it is the same, so is the shard's state.
    """

    def __init__(
        self,
        shard: Shard,
        name: str,
        record: Callable[[IterationRow], None],
        journal: Journal | None = None,
        patience: float = 1800.0,
    ) -> None:
        """Prepare; `start` begins."""
        self._shard = shard
        self._name = name
        self._record = record
        self._journal = journal
        self._patience = patience
        self._mailbox: queue.SimpleQueue[tuple[Event, Answer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._statistics = shard.statistics()
        self._ended = False
        self._ending = threading.Event()
        self._told_failure = ""  # of a checkpoint
        self._row_time: float | None = None  # on the monotonic clock, when the last row was made
        self.changes = 0

    def start(self, loop: asyncio.AbstractEventLoop, subscriber: Subscriber) -> None:
        """Begin to take events; answers and effects are delivered on ``loop``."""
        self._loop, self._subscriber = loop, subscriber
        self._room = asyncio.Semaphore(MAILBOX_EVENTS)
        self._thread.start()

    def stop(self) -> None:
        """Finish what is in the mailbox, write a checkpoint, and end the thread; a pause of the run ends at once."""
        self._ending.set()
        self._mailbox.put(None)
        self._thread.join()

    async def submit(self, event: Event) -> list[Effect]:
        """Hand an event to the shard and wait for its effects; first for room, when many events are waiting.

        Raises:
            ProtocolError: after `stop`.
            ThresherError: as the shard raised it; the event changed nothing.
        """
        async with self._room:
            return await self._post(
                event
            )  # no name for it here: an error that it raises would hold it, and it the error

    def _post(self, event: Event) -> Answer:
        answer: Answer = self._loop.create_future()
        self._mailbox.put((event, answer))
        if self._ended:  # looked at after the put: an event that came too late to be turned away by the thread
            raise ProtocolError(_ENDED)
        return answer

    def statistics(self) -> ShardStatistics:
        """Return the shard's counters as of its last event; from any thread."""
        return self._statistics

    def last_iteration_age(self) -> float | None:
        """Return the seconds since a round closed; None before the first of this process; from any thread."""
        then = self._row_time
        return None if then is None else time.monotonic() - then

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
                    self._drain()
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

    def _drain(self) -> None:
        with suppress(ThresherError):  # it was told; the log has everything without this checkpoint
            self._perform(self._shard.handle(events.Drain(), time.monotonic()))

    def _tick(self) -> None:
        try:
            self._handle(events.Tick())
            self._tell_of_checkpoint()
        except RoundFailedError:
            pass  # all were told
        except ThresherError as error:  # nobody is there to hear that time was refused
            self._bug(events.Tick(), error)

    def _take(self, event: Event, answer: Answer) -> None:
        try:
            done = self._handle(event)
        except ThresherError as error:
            self._tell(answer, error)
        else:
            self._tell(answer, done)

    def _handle(self, event: Event) -> list[Effect]:
        """Hand an event to the shard and do what follows.

        Raises:
            ThresherError: as the shard raised it; the event changed nothing.
            RoundFailedError: after a bug. Memory may be ahead of the journal then, and nothing may be built on that:
                the run has failed, and all that anybody was told is in the journal.
        """
        try:
            done = self._shard.handle(event, time.monotonic())
        except ThresherError:
            raise
        except Exception as error:
            raise self._bug(event, error) from error
        try:
            if isinstance(event, events.Push):
                reached(self._name, "round open")
            self._perform(done)
        except RoundFailedError:
            raise
        except Exception as error:
            raise self._bug(event, error) from error
        return done

    def _bug(self, event: Event, error: Exception) -> RoundFailedError:
        """Let the run fail for an error that nobody expected, and return what its sender hears."""
        what = f"{self._name} could not handle {type(event).__name__}: {type(error).__name__}: {error}"
        _logger.error("%s", what, exc_info=error)
        return self._failed(f"{what}; this is a bug, see the shard's log, and start it again from its state folder")

    def _failed(self, reason: str) -> RoundFailedError:
        """Let the run fail, tell everybody, and return what to raise."""
        self._perform(self._shard.handle(events.Fail(reason), time.monotonic()))
        return RoundFailedError(reason)

    def _perform(self, done: list[Effect]) -> None:
        """Do what the shard wants done; answers to the sender are left to the sender.

        Counters are renewed first: who hears of something and then asks for them finds it counted.
        """
        self._statistics = self._shard.statistics()
        self.changes += sum(isinstance(effect, effects.Append | effects.Checkpoint) for effect in done)
        for effect in done:
            match effect:
                case effects.Append(record):
                    self._append(record)
                case effects.Checkpoint():
                    self._checkpoint(effect)
                case effects.Publish(sealed, ranks):
                    self._loop.call_soon_threadsafe(self._subscriber.publish, sealed, ranks)
                case effects.Tell(agreed, ranks):
                    self._loop.call_soon_threadsafe(self._subscriber.tell, agreed, ranks)
                case effects.Restart(ranks):
                    self._loop.call_soon_threadsafe(self._subscriber.restart, ranks)
                case effects.WriteRow(row):
                    self._row_time = time.monotonic()
                    self._write(row)
                case effects.Notice(text):
                    _logger.warning("%s", text)
                case effects.Failed(reason):
                    _logger.error("%s", reason)
                    self._loop.call_soon_threadsafe(self._subscriber.fail, reason)
                case _:
                    pass

    def _append(self, record: Record) -> None:
        if self._journal is None:
            return
        journal, closed = self._journal, isinstance(record, Closed)
        if closed:
            reached(self._name, "apply")  # done in memory, and nowhere else
        self._insist(lambda: journal.append(record_to_bytes(record)))
        if closed:
            reached(self._name, "tell")  # on disk, and told to nobody

    def _checkpoint(self, checkpoint: effects.Checkpoint) -> None:
        journal = self._journal
        if journal is None or (journal.checkpointing and not checkpoint.wait):
            return  # the last one is still being written: the next will come, and the log has everything

        def write() -> None:
            journal.checkpoint(checkpoint.table, checkpoint.tensors)
            reached(self._name, "checkpoint")
            if checkpoint.wait:
                journal.wait()

        if checkpoint.wait:
            self._insist(write)
            return
        try:
            write()
        except JournalError as error:
            _logger.warning("%s goes on without a checkpoint: %s", self._name, error)

    def _tell_of_checkpoint(self) -> None:
        """Say when a checkpoint that was written behind has failed."""
        failure = "" if self._journal is None else self._journal.failure
        if failure and failure != self._told_failure:
            _logger.warning("%s", failure)
        self._told_failure = failure

    def _insist(self, write: Callable[[], None]) -> None:
        """Write; while that fails, on a full disk say, the run pauses: nobody is told, and nothing is lost.

        Raises:
            RoundFailedError: when it failed for too long, or the shard is to end; the run has failed then.
        """
        begin, paused = time.monotonic(), False
        while True:
            try:
                write()
            except JournalError as error:
                if not paused:
                    _logger.error("%s is paused: %s", self._name, error)  # noqa: TRY400 - it says all
                paused = True
                left = begin + self._patience - time.monotonic()
                if left > 0 and not self._ending.wait(min(_PAUSE_SECONDS, left)):
                    continue
                reason = f"{self._name} gave up after {self._patience - left:.0f} s of trying to write: {error}"
                raise self._failed(reason) from error
            if paused:
                _logger.warning("%s goes on after %.0f s", self._name, time.monotonic() - begin)
            return

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
                answer.set_exception(result.with_traceback(None))  # or the frames of this thread would live with it
            else:
                answer.set_result(result)

        self._loop.call_soon_threadsafe(deliver)
