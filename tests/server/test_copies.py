"""Copies of the state: one for all who read the same, few at a time, gone with their last reader."""

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack

import pytest
from tests.server.on_an_engine import ME, Listener, push, run

from thresher.protos.errors import ProtocolError
from thresher.protos.replica import PARAMETERS
from thresher.protos.snapshots import unpack_state
from thresher.server import events
from thresher.server.config import ShardConfig
from thresher.server.copies import MOST_COPIES, Copies, Packed
from thresher.server.engine import Engine
from thresher.server.shard import Shard


def values(packed: Packed) -> list[float]:
    return unpack_state(packed[1])[0][PARAMETERS].tolist()


def test_all_who_ask_while_nothing_changes_share_one_copy() -> None:
    """Whether they come while it is made or while it is read; and it holds the tensors once."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        copies = Copies(engine)
        async with AsyncExitStack() as readers:
            together = await asyncio.gather(*(readers.enter_async_context(copies.read()) for _ in range(50)))
            later = await readers.enter_async_context(copies.read())
            assert {id(data) for _, data in (*together, later)} == {id(later[1])}
            assert later[0].tensors == {}
            assert values(later) == [0.0, 0.0]

    run(scenario)


def test_who_asks_after_a_change_reads_what_has_changed() -> None:
    """A round, or a leave that brings no new version: the copy that is being read stays as it was."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        copies = Copies(engine)
        async with copies.read() as first:
            await engine.submit(push(0))
            async with copies.read() as second:
                await engine.submit(events.Leave(ME))
                async with copies.read() as third:
                    assert [one[0].history.version for one in (first, second, third)] == [0, 1, 1]
                    assert [values(one) for one in (first, second, third)] == [[0.0] * 2, [-1.0] * 2, [-1.0] * 2]
                    assert third[1] is not second[1]

    run(scenario)


def test_only_so_many_are_read_at_a_time_and_who_waited_shares_the_next() -> None:
    """Whoever waits for room reads what is newest when there is some."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        copies = Copies(engine)
        async with AsyncExitStack() as others:
            for step in range(MOST_COPIES - 1):
                await others.enter_async_context(copies.read())
                await engine.submit(push(step))
            async with copies.read():
                await engine.submit(push(MOST_COPIES - 1))
                waiting = [asyncio.ensure_future(copies.read().__aenter__()) for _ in range(3)]
                await engine.submit(push(MOST_COPIES))
                assert not any(one.done() for one in waiting)
            read = await asyncio.wait_for(asyncio.gather(*waiting), 30)
        assert [one[0].history.version for one in read] == [MOST_COPIES + 1] * 3
        assert len({id(data) for _, data in read}) == 1

    run(scenario)


def test_readers_who_break_off_take_no_room() -> None:
    """While they wait, while a copy is made for them, or while they read."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        copies = Copies(engine)
        for turns in range(3 * MOST_COPIES):
            asked = asyncio.ensure_future(copies.read().__aenter__())
            for _ in range(turns):
                await asyncio.sleep(0)
            asked.cancel()
            await asyncio.wait([asked])
            await engine.submit(push(turns))
        async with asyncio.timeout(30), AsyncExitStack() as readers:
            for step in range(MOST_COPIES):
                await readers.enter_async_context(copies.read())
                await engine.submit(push(3 * MOST_COPIES + step))

    run(scenario)


def test_a_copy_ends_with_its_last_reader() -> None:
    """It is let go then, and not when the garbage collector comes by."""

    async def scenario(engine: Engine, listener: Listener) -> None:
        copies = Copies(engine)
        gc.disable()
        try:
            async with copies.read():
                async with copies.read():
                    kept = weakref.ref(copies._newest)
                assert kept() is not None
            await asyncio.sleep(0.01)  # its task ends
            assert kept() is None
        finally:
            gc.enable()

    run(scenario)


def test_an_error_is_told_to_all_who_asked_and_let_go() -> None:
    """A shard that has no state yet, or has ended; whoever asks later is answered anew."""

    async def whole() -> None:
        engine = Engine(Shard(ShardConfig(0, 1, 1)), "shard 0", lambda _: None)
        engine.start(asyncio.get_running_loop(), Listener())
        copies = Copies(engine)

        async def told() -> "weakref.ref[ProtocolError]":
            try:
                async with copies.read():
                    pytest.fail("there is nothing to be read")
            except ProtocolError as error:
                assert "not been seeded" in str(error)  # noqa: PT017 - it must not be held
                return weakref.ref(error)

        gc.disable()
        try:
            errors = [*await asyncio.gather(told(), told()), await told()]
            await engine.submit(events.Tick())  # so that the thread has another event in hand
            assert [error() for error in errors] == [None] * 3
        finally:
            gc.enable()
            await asyncio.to_thread(engine.stop)
        with pytest.raises(ProtocolError, match="has ended"):
            async with copies.read():
                pytest.fail("there is nothing to be read")

    asyncio.run(whole())
