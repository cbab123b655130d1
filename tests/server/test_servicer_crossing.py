"""Where the end of one stream and the hello of another cross: a worker that is here is never taken for lost."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, final

import pytest
import torch
from tests.server.conversing import SECONDS, hello, register

from thresher.protos.replica import PARAMETERS
from thresher.protos.sparse import SparseGradient
from thresher.server import events
from thresher.server.config import ShardConfig
from thresher.server.engine import Engine
from thresher.server.events import IterationRow, Worker
from thresher.server.servicer import AggregationServicer
from thresher.server.shard import Shard
from thresher.server.stream import Stream
from thresher.server.translation import register_from_message

ALONE = ShardConfig(0, 1, 1)


@final
class Halted:
    """A servicer whose worker 0 speaks on `first`, and whose shard takes nothing more before `go_on`."""

    def __init__(self) -> None:
        """Prepare; `begin` begins."""
        self._halts, self._may_go_on = threading.Event(), threading.Event()
        self.engine = Engine(Shard(ALONE), "shard 0", self._halt)
        self.servicer = AggregationServicer(self.engine, ALONE)
        self.first, self.second = Stream(1 << 20), Stream(1 << 20)

    def _halt(self, _: IterationRow) -> None:
        self._halts.set()
        self._may_go_on.wait(SECONDS)

    async def begin(self) -> None:
        """Let worker 0 in, and halt in the middle of its first round."""
        self.engine.start(asyncio.get_running_loop(), self.servicer)
        await self.engine.submit(register_from_message(register(0, workers=1)))
        await self.engine.submit(events.Seed(Worker(0, 1), {PARAMETERS: torch.zeros(4)}, {}))
        await self.greet(self.first)
        push = events.Push(Worker(0, 1), 0, 0, SparseGradient.dense(torch.ones(4)), (True, True))
        self._push = asyncio.ensure_future(self.engine.submit(push))
        assert await asyncio.to_thread(self._halts.wait, SECONDS)

    def greet(self, stream: Stream, incarnation: int = 1) -> "asyncio.Task[None]":
        """Say hello on a stream."""
        return asyncio.ensure_future(self.servicer._greet(hello(0, incarnation), stream))

    async def reached(self, waiting: int) -> None:
        """Let everybody go as far as they can: so many events wait for the shard then."""
        for _ in range(20):
            await asyncio.sleep(0)
        assert self.engine._mailbox.qsize() == waiting

    async def go_on(self) -> None:
        """Let the shard take what waits, and wait until it has."""
        self._may_go_on.set()
        await self._push
        await self.engine.submit(events.ReadState())

    @property
    def state(self) -> str:
        """Where the shard takes worker 0 to stand."""
        return self.engine.statistics().members[0].state


def run(scenario: Callable[[Halted], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario, and end the shard."""

    async def whole() -> None:
        halted = Halted()
        await halted.begin()
        try:
            await scenario(halted)
        finally:
            await halted.go_on()
            await asyncio.to_thread(halted.engine.stop)

    asyncio.run(whole())


@pytest.mark.parametrize("breaks_first", [True, False])
def test_a_worker_that_is_back_is_not_lost_by_the_end_of_its_old_stream(breaks_first: bool) -> None:
    """Whichever of the two is on its way first: the worker exchanges, on its new stream."""

    async def scenario(halted: Halted) -> None:
        def end() -> "asyncio.Task[None]":
            return asyncio.ensure_future(halted.servicer._gone(halted.first, Worker(0, 1)))

        both = [end(), halted.greet(halted.second)] if breaks_first else [halted.greet(halted.second), end()]
        await halted.reached(1)  # the other waits for its turn
        await halted.go_on()
        await asyncio.gather(*both)
        assert halted.state == "exchanging"
        assert halted.servicer._speaking == {0: halted.second}

    run(scenario)


@pytest.mark.parametrize(("incarnation", "state"), [(1, "exchanging"), (2, "lost")])
def test_a_worker_that_goes_away_during_its_hello_is_lost_unless_it_speaks_elsewhere(
    incarnation: int, state: str
) -> None:
    """Its own earlier stream says that it is there; that of an earlier life, which is fenced, says nothing of it."""

    async def scenario(halted: Halted) -> None:
        registered = asyncio.ensure_future(
            halted.engine.submit(register_from_message(register(0, workers=1, incarnation=incarnation)))
        )
        await halted.reached(1)
        greeting = halted.greet(halted.second, incarnation)
        await halted.reached(2)
        greeting.cancel()
        await asyncio.sleep(0)
        await halted.go_on()
        with pytest.raises(asyncio.CancelledError):
            await greeting
        await registered
        assert halted.state == state
        assert halted.servicer._speaking == {0: halted.first}
        assert halted.servicer._greeting is None

    run(scenario)
