"""Copies of a shard's state for those who read it: one for all who ask while nothing changes, and few at a time."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, final

from thresher.protos.errors import ThresherError
from thresher.protos.snapshots import pack_state
from thresher.server import effects, events
from thresher.server.engine import Engine

MOST_COPIES: Final = 4
"""How many may be read at a time; whoever needs a newer one waits until one of them has been read."""
_FRESH_SECONDS: Final = 10.0
"""How old a copy may be for whoever comes anew: what follows it is kept in the log for longer, but not for ever."""

Packed = tuple[effects.Snapshot, bytes]
"""A snapshot without its tensors, and those as `pack_state` writes them."""


@final
class Copies:
    """Hands out the state of one engine's shard. Belongs to the engine's asyncio loop."""

    def __init__(self, engine: Engine) -> None:
        """Begin without copies."""
        self._engine = engine
        self._room = asyncio.Semaphore(MOST_COPIES)
        self._newest: _Copy | None = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Packed]:
        """Lend the state as it is now, or was at a moment since the call, for the length of the block.

        Raises:
            ProtocolError: before the seed, or when the shard has ended.
            RoundFailedError: when the run failed before the seed.
        """
        copy = self._newest
        if copy is None or not copy.serves(self._engine.changes):
            copy = self._newest = _Copy(self._engine, self._room)
        copy.readers += 1
        try:
            yield await asyncio.shield(copy.packed)
        finally:
            copy.readers -= 1
            if not copy.readers:
                copy.forget()
                if self._newest is copy:
                    self._newest = None
            del copy  # or an error that is raised here would hold it, and it the error


@final
class _Copy:
    """One copy. It waits for room, is made, and takes that room until nobody reads it."""

    def __init__(self, engine: Engine, room: asyncio.Semaphore) -> None:
        loop = asyncio.get_running_loop()
        self.readers = 0
        self.packed: asyncio.Future[Packed] = loop.create_future()
        self._engine, self._room, self._now = engine, room, loop.time
        self._unread = asyncio.Event()
        self._changes = self._begun = math.inf  # while it waits for room it is going to be as new as anybody wants
        self._life = loop.create_task(self._live())

    def serves(self, changes: int) -> bool:
        """Whether it is what a reader who comes now would get."""
        return changes <= self._changes and self._now() < self._begun + _FRESH_SECONDS and not self._life.done()

    def forget(self) -> None:
        """Let it go. What is being made is finished first: it takes its room for as long as it takes memory."""
        self._unread.set()
        if self._begun == math.inf:
            self._life.cancel()

    async def _live(self) -> None:
        async with self._room:
            self._changes, self._begun = self._engine.changes, self._now()
            try:
                self.packed.set_result(await self._made())
            except ThresherError as error:
                # Its traceback holds this frame, and so the error itself: a circle, which would be the collector's.
                self.packed.set_exception(error.with_traceback(None))
                return
            await self._unread.wait()

    async def _made(self) -> Packed:
        done = await self._engine.submit(events.ReadState())
        snapshot = next(effect for effect in done if isinstance(effect, effects.Snapshot))
        return replace(snapshot, tensors={}), await asyncio.to_thread(pack_state, snapshot.tensors, {})
