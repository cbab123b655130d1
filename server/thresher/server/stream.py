"""What one worker is being told: updates, encoded once for all workers, and answers, in the order they happened."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import final

from thresher.protos.errors import ThresherError
from thresher.protos.messages import update_to_messages
from thresher.protos.update import Update
from thresher.v1 import aggregation_pb2 as pb


@final
@dataclass(frozen=True, slots=True)
class EncodedUpdate:
    """An update as messages: encoded once, sent to every worker."""

    version: int
    messages: list[pb.ExchangeResponse]

    @property
    def wire_bytes(self) -> int:
        """Bytes of all its messages."""
        return sum(message.ByteSize() for message in self.messages)


def encoded(update: Update) -> EncodedUpdate:
    """Encode an update."""
    return EncodedUpdate(update.version, update_to_messages(update))


@final
class Stream:
    """What one exchange stream is about to say. Filled and emptied on the asyncio loop.

    It hears of new updates from before its hello is sent to the shard until it ends, so that none falls between the
    answer to the hello and the first update after it.
    """

    def __init__(self) -> None:
        """Begin with nothing to say."""
        self._outbox: asyncio.Queue[pb.ExchangeResponse | ThresherError | None] = asyncio.Queue()
        self._early: list[EncodedUpdate] | None = []  # published before the hello was answered

    def greet(self, backlog: list[EncodedUpdate]) -> None:
        """Begin with what the worker lacks, and go on with what was published since."""
        newest = backlog[-1].version if backlog else 0
        early, self._early = self._early or [], None
        for update in (*backlog, *(update for update in early if update.version > newest)):
            self.publish(update)

    def publish(self, update: EncodedUpdate) -> None:
        """Send an update."""
        if self._early is not None:
            self._early.append(update)
            return
        for message in update.messages:
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
