"""The engine: events reach one thread in order, errors come back to who caused them, and the thread lives."""

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable

import pytest
from tests.server.on_an_engine import Listener, joined_by_another, push, run

from thresher.protos.errors import ProtocolError, RoundFailedError
from thresher.server import effects, events
from thresher.server.engine import MAILBOX_EVENTS, Engine
from thresher.server.events import IterationRow, Worker


def test_an_update_is_published_before_the_push_is_answered() -> None:
    """Who awaits the answer finds the update said, the row recorded, and the statistics of after it."""
    rows: list[IterationRow] = []

    async def scenario(engine: Engine, listener: Listener) -> None:
        for step in range(3):
            await engine.submit(push(step))
            assert listener.heard == list(range(1, step + 2))
            assert [row.version for row in rows] == listener.heard
            assert engine.statistics().version == step + 1
        assert [row.push_bytes for row in rows] == [20] * 3

    run(scenario, rows.append)


def test_events_are_handled_in_the_order_in_which_they_were_submitted() -> None:
    """One mailbox, one thread: steps submitted at once are applied one after the other."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        await asyncio.gather(*(engine.submit(push(step)) for step in range(50)))
        assert listener.heard == list(range(1, 51))

    run(scenario)


def test_an_error_comes_back_to_who_caused_it() -> None:
    """The others' events go on."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        with pytest.raises(ProtocolError, match="not registered"):
            await engine.submit(events.Hello(Worker(0, 9), events.History()))
        await engine.submit(push(0))
        assert listener.heard == [1]

    run(scenario)


def test_an_error_is_let_go_by_whoever_has_heard_it() -> None:
    """Else each refusal would keep what was refused, a frame of megabytes say, until the garbage collector comes by."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        heard: Callable[[], Exception | None] = Exception
        gc.disable()
        try:
            try:
                await engine.submit(events.Hello(Worker(0, 9), events.History()))
            except ProtocolError as error:
                heard = weakref.ref(error)
            await engine.submit(push(0))  # so that the thread has another event in hand
            assert heard() is None
        finally:
            gc.enable()

    run(scenario)


def test_a_row_that_cannot_be_written_is_told_and_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk under the per-iteration file: the log says so, the round counts, training goes on."""

    def full(row: IterationRow) -> None:
        if row.version == 1:
            raise OSError("disk full")

    async def scenario(engine: Engine, listener: Listener) -> None:
        with caplog.at_level(logging.ERROR):
            await engine.submit(push(0))
        assert "version 1 could not be recorded: disk full" in caplog.text
        await engine.submit(push(1))
        assert listener.heard == [1, 2]

    run(scenario, full)


def test_a_bug_is_told_and_logged_and_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong while an event is handled reaches its sender and all others; the thread lives to say so."""

    def broken(row: IterationRow) -> None:
        raise RuntimeError("a bug")

    async def scenario(engine: Engine, listener: Listener) -> None:
        for step in range(2):
            with caplog.at_level(logging.ERROR), pytest.raises(RoundFailedError, match="a bug"):
                await engine.submit(push(step))
        assert "Traceback" in caplog.text
        assert "shard 0 could not handle Push: RuntimeError: a bug" in await asyncio.wait_for(listener.failed, 30)
        assert listener.heard == [1]

    run(scenario, broken)


def test_time_passes_without_events() -> None:
    """A deadline is seen although nobody says anything: the subscriber hears of the failure."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        for event in joined_by_another():
            await engine.submit(event)
        await engine.submit(push(0))  # lets the other in
        await engine.submit(push(1))
        assert "worker 1 is connected but has not pushed" in await asyncio.wait_for(listener.failed, 30)
        assert engine.statistics().state == "failed"

    run(scenario, round_timeout=0.0, lease=0.0)


def test_time_passes_under_load() -> None:
    """A mailbox that is never empty does not hold deadlines back."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        for event in joined_by_another():
            await engine.submit(event)
        await engine.submit(push(0))
        await engine.submit(push(1))

        async def chatter() -> None:
            while not listener.failed.done():
                await asyncio.gather(*(engine.submit(events.ReadState()) for _ in range(MAILBOX_EVENTS // 2)))

        await asyncio.wait_for(asyncio.gather(chatter(), chatter()), 60)

    run(scenario, round_timeout=0.0, lease=0.0)


def test_a_full_mailbox_makes_its_senders_wait() -> None:
    """More events than the mailbox holds wait for room; none is lost, and none is refused."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        asked = (engine.submit(events.ReadState()) for _ in range(3 * MAILBOX_EVENTS))
        answers = await asyncio.gather(*asked, engine.submit(push(0)))
        kinds = [type(answer[0]) for answer in answers]
        assert kinds == [effects.Snapshot] * (3 * MAILBOX_EVENTS) + [effects.Append]
        assert listener.heard == [1]

    run(scenario)


def test_what_is_in_the_mailbox_is_finished_before_the_thread_ends() -> None:
    """A push that was taken in is applied, also when the engine is stopped right after."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        waiting = [asyncio.ensure_future(engine.submit(push(step))) for step in range(20)]
        await asyncio.sleep(0)  # lets each of them reach the mailbox
        await asyncio.to_thread(engine.stop)
        await asyncio.gather(*waiting)
        assert listener.heard == list(range(1, 21))

    run(scenario)


def test_a_sender_that_went_away_harms_nobody() -> None:
    """An answer that nobody waits for any more is dropped."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        gone = asyncio.ensure_future(engine.submit(push(0)))
        await asyncio.sleep(0)
        gone.cancel()
        await engine.submit(push(1))
        assert listener.heard == [1, 2]

    run(scenario)


def test_a_stopped_engine_turns_events_away() -> None:
    """Who speaks to a shard that is ending hears so at once: nobody waits for an answer that cannot come."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ProtocolError, match="the shard has ended"):
            await asyncio.wait_for(engine.submit(push(0)), 30)
        assert engine.statistics().version == 0

    run(scenario)
