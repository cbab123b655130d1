"""What one worker is being told: updates, encoded once for all workers, and answers, in the order they happened."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import final

from thresher.protos.errors import ThresherError
from thresher.protos.sealed import SealedUpdate
from thresher.server.events import Worker
from thresher.v1 import aggregation_pb2 as pb


@final
class Stream:
    """What one exchange stream is about to say. Filled and emptied on the asyncio loop.

    It hears of new updates from before its hello is sent to the shard until it ends, so that none falls between the
    answer to the hello and the first update after it.

    Attributes:
        worker: Whose it is, once it has said so.
    """

    def __init__(self) -> None:
        """Begin with nothing to say, to nobody yet."""
        self.worker: Worker | None = None
        self._outbox: asyncio.Queue[pb.ExchangeResponse | ThresherError | None] = asyncio.Queue()
        self._early: list[SealedUpdate] | None = []  # published before the hello was answered

    def greet(self, backlog: Sequence[SealedUpdate]) -> None:
        """Begin with what the worker lacks, and go on with what was published since."""
        newest = backlog[-1].update.version if backlog else 0
        early, self._early = self._early or [], None
        for one in (*backlog, *(one for one in early if one.update.version > newest)):
            self.publish(one)

    def publish(self, sealed: SealedUpdate) -> None:
        """Send an update."""
        if self._early is not None:
            self._early.append(sealed)
            return
        for message in sealed.messages:
            self.say(message)

    def say(self, message: pb.ExchangeResponse) -> None:
        """Send a message after those that wait already."""
        self._outbox.put_nowait(message)

    def end(self, error: ThresherError | None = None) -> None:
        """End the stream after the messages that wait, with an error if there is one."""
        self._outbox.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[pb.ExchangeResponse]:
        """Yield messages until the end. Raises the error that the stream was ended with."""
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, ThresherError):
                raise item
            yield item
