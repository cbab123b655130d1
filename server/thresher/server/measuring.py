"""How fast the link to a shard is: bytes that mean nothing are counted as they come, and others are given back."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final, cast, final

from thresher.protos.errors import BusyError, ProtocolError, RoundFailedError
from thresher.protos.messages import CHUNK_BYTES
from thresher.v1 import aggregation_pb2 as pb

MEASURED_BYTES: Final = 256 << 20
"""How many bytes may go each way in one measurement."""
MEASURING_SECONDS: Final = 60.0
"""How long one measurement may take; then it is over, and somebody else may begin."""


@final
class Measuring:
    """Answers one measurement at a time, so that none measures another. Belongs to an asyncio loop.

    Nothing that comes is kept. Between two messages the loop turns to whatever else is there, such as pushes; what a
    measurement takes from them is their share of the link.

    Args:
        shard: Whose it is, for messages.
    """

    def __init__(self, shard: int) -> None:
        """Begin with nobody."""
        self._shard = shard
        self._until: float | None = None  # when the turn of whoever measures is over, on the loop's clock
        self._bytes = b""

    async def answer(self, requests: AsyncIterator[pb.MeasureRequest]) -> AsyncGenerator[pb.MeasureResponse, None]:
        """Count what comes; when that ends, say how much it was, and then send what is wanted.

        Raises:
            BusyError: while somebody else measures.
            ProtocolError: when more comes, or is wanted, than `MEASURED_BYTES`, or a chunk is too long.
            RoundFailedError: when it takes longer than `MEASURING_SECONDS`.
        """
        until = self._take_turn()
        try:
            try:
                async with asyncio.timeout_at(until):
                    received, wanted = await self._hear(requests)
            except TimeoutError:
                raise self._too_slow() from None
            yield pb.MeasureResponse(received_bytes=received)
            for begin in range(0, wanted, CHUNK_BYTES):
                if asyncio.get_running_loop().time() > until:
                    raise self._too_slow()
                yield pb.MeasureResponse(chunk=self._random_bytes()[: wanted - begin])
        finally:
            if self._until == until:
                self._until = None

    def _take_turn(self) -> float:
        """Return when the turn ends. Nobody can hold it for longer, by not reading say."""
        now = asyncio.get_running_loop().time()
        if self._until is not None and now < self._until:
            raise BusyError(f"shard {self._shard} is being measured by somebody else; ask again in a moment")
        self._until = now + MEASURING_SECONDS
        return self._until

    async def _hear(self, requests: AsyncIterator[pb.MeasureRequest]) -> tuple[int, int]:
        """Return how many bytes came, and how many are wanted."""
        received, wanted = 0, None
        async with aclosing(cast("AsyncGenerator[pb.MeasureRequest, None]", aiter(requests))) as parts:
            async for part in parts:
                wanted = part.wanted_bytes if wanted is None else wanted
                received += len(part.chunk)
                if max(wanted, received) > MEASURED_BYTES or len(part.chunk) > CHUNK_BYTES:
                    raise ProtocolError(
                        f"a measurement moves at most {MEASURED_BYTES} bytes each way, in chunks of at most "
                        f"{CHUNK_BYTES}; {received} came, the last {len(part.chunk)} at once, and {wanted} are wanted"
                    )
        return received, wanted or 0

    def _random_bytes(self) -> bytes:
        self._bytes = self._bytes or os.urandom(CHUNK_BYTES)
        return self._bytes

    def _too_slow(self) -> RoundFailedError:
        return RoundFailedError(
            f"a measurement with shard {self._shard} took longer than {MEASURING_SECONDS:.0f} s; move fewer bytes"
        )
