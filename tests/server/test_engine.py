"""The engine: events reach one thread in order, errors come back to who caused them, and the thread lives."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, final

import pytest
import torch

from thresher.protos.errors import ProtocolError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server import events
from thresher.server.engine import MAILBOX_EVENTS, Engine
from thresher.server.events import IterationRow, Worker
from thresher.server.shard import Shard, ShardConfig

LAYOUT = Layout((TensorSpec("w", (2,), "float32"),))
ME = Worker(0, 1)


@final
@dataclass(frozen=True, slots=True)
class Counted:
    """An update with a size: all that the engine asks of an encoding."""

    update: Update
    wire_bytes: int = 10


@final
@dataclass(slots=True)
class Listener:
    """Keeps what it hears."""

    heard: list[int] = field(default_factory=list)
    failed: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def publish(self, update: Counted) -> None:
        self.heard.append(update.update.version)

    def fail(self, reason: str) -> None:
        self.failed.set_result(reason)


def run(
    scenario: Callable[[Engine[Counted], Listener], Coroutine[Any, Any, None]],
    record: Callable[[IterationRow], None] = lambda _: None,
    **config: float,
) -> None:
    """A training shard of one worker, on an engine, until the scenario ends."""

    async def whole() -> None:
        shard = Shard(ShardConfig(0, 1, 1, **config))  # type: ignore[arg-type] # times only
        engine, listener = Engine(shard, Counted, record), Listener()
        engine.start(asyncio.get_running_loop(), listener)
        try:
            await engine.submit(events.Register(ME, 1, 0, 1, LAYOUT, OptimizerSpec("SGD", ({"lr": 1.0},)), "m"))
            await engine.submit(events.Seed(ME, {PARAMETERS: torch.zeros(2)}, {}))
            await engine.submit(events.Hello(ME, 0))
            await scenario(engine, listener)
        finally:
            await asyncio.to_thread(engine.stop)

    asyncio.run(whole())


def push(step: int) -> events.Push:
    return events.Push(ME, step, step, SparseGradient.dense(torch.ones(2)), (True,), content=step + 1, wire_bytes=20)


def test_an_update_is_published_before_the_push_is_answered() -> None:
    """Who awaits the answer finds the update said, the row recorded, and the statistics of after it."""
    rows: list[IterationRow] = []

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        for step in range(3):
            await engine.submit(push(step))
            assert listener.heard == list(range(1, step + 2))
            assert [row.version for row in rows] == listener.heard
            assert engine.statistics().version == step + 1
        assert [(row.push_bytes, row.pull_bytes) for row in rows] == [(20, 10)] * 3

    run(scenario, rows.append)


def test_events_are_handled_in_the_order_in_which_they_were_submitted() -> None:
    """One mailbox, one thread: steps submitted at once are applied one after the other."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        await asyncio.gather(*(engine.submit(push(step)) for step in range(50)))
        assert listener.heard == list(range(1, 51))

    run(scenario)


def test_an_error_comes_back_to_who_caused_it() -> None:
    """The others' events go on."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        with pytest.raises(ProtocolError, match="not registered"):
            await engine.submit(events.Hello(Worker(0, 9), 0))
        await engine.submit(push(0))
        assert listener.heard == [1]

    run(scenario)


def test_a_row_that_cannot_be_written_is_told_and_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk under the per-iteration file: the log says so, the round counts, training goes on."""

    def full(row: IterationRow) -> None:
        if row.version == 1:
            raise OSError("disk full")

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        with caplog.at_level(logging.ERROR):
            await engine.submit(push(0))
        assert "version 1 could not be recorded: disk full" in caplog.text
        await engine.submit(push(1))
        assert listener.heard == [1, 2]

    run(scenario, full)


def test_a_bug_is_told_and_logged_and_the_thread_lives(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong while an event is handled reaches its sender; the next event is handled."""

    def broken(row: IterationRow) -> None:
        if row.version == 1:
            raise RuntimeError("a bug")

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="a bug"):
            await engine.submit(push(0))
        assert "could not handle Push" in caplog.text
        await engine.submit(push(1))
        assert listener.heard[-1] == 2

    run(scenario, broken)


def test_time_passes_without_events() -> None:
    """A deadline is seen although nobody says anything: the subscriber hears of the failure."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        await engine.submit(events.Disconnect(ME))
        assert "worker 0 lost its connection" in await asyncio.wait_for(listener.failed, 30)
        assert engine.statistics().state == "failed"

    run(scenario, lease=0.0)


def test_time_passes_under_load() -> None:
    """A mailbox that is never empty does not hold deadlines back."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        await engine.submit(events.Disconnect(ME))

        async def chatter() -> None:
            while not listener.failed.done():
                await asyncio.gather(*(engine.submit(events.ReadState()) for _ in range(MAILBOX_EVENTS // 2)))

        await asyncio.wait_for(asyncio.gather(chatter(), chatter()), 60)

    run(scenario, lease=0.0)


def test_a_full_mailbox_makes_its_senders_wait() -> None:
    """More events than the mailbox holds wait for room; none is lost, and none is refused."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        asked = (engine.submit(events.ReadState()) for _ in range(3 * MAILBOX_EVENTS))
        answers = await asyncio.gather(*asked, engine.submit(push(0)))
        assert [type(answer[0]) for answer in answers] == [events.State] * (3 * MAILBOX_EVENTS) + [events.Publish]
        assert listener.heard == [1]

    run(scenario)


def test_what_is_in_the_mailbox_is_finished_before_the_thread_ends() -> None:
    """A push that was taken in is applied, also when the engine is stopped right after."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        waiting = [asyncio.ensure_future(engine.submit(push(step))) for step in range(20)]
        await asyncio.sleep(0)  # lets each of them reach the mailbox
        await asyncio.to_thread(engine.stop)
        await asyncio.gather(*waiting)
        assert listener.heard == list(range(1, 21))

    run(scenario)


def test_a_sender_that_went_away_harms_nobody() -> None:
    """An answer that nobody waits for any more is dropped."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        gone = asyncio.ensure_future(engine.submit(push(0)))
        await asyncio.sleep(0)
        gone.cancel()
        await engine.submit(push(1))
        assert listener.heard == [1, 2]

    run(scenario)


def test_a_stopped_engine_turns_events_away() -> None:
    """Who speaks to a shard that is ending hears so at once: nobody waits for an answer that cannot come."""

    async def scenario(engine: Engine[Counted], listener: Listener) -> None:
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ProtocolError, match="the shard has ended"):
            await asyncio.wait_for(engine.submit(push(0)), 30)
        assert engine.statistics().version == 0

    run(scenario)
