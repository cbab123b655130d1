"""The gRPC edge of a shard: messages become events, effects become messages, errors become status codes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Final, TypeVar, cast, final

from google.protobuf.message import DecodeError

from thresher.protos.codec import decode
from thresher.protos.errors import (
    BehindError,
    FencedError,
    FrameError,
    ProtocolError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.layout import Layout, Slice
from thresher.protos.messages import Payload, payload_bound
from thresher.protos.sealed import SealedUpdate
from thresher.protos.snapshots import state_bytes_bound, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.server import effects, events
from thresher.server.config import ShardConfig
from thresher.server.copies import Copies
from thresher.server.effects import Effect
from thresher.server.engine import Engine
from thresher.server.events import Worker
from thresher.server.facts import Agreed
from thresher.server.measuring import Measuring
from thresher.server.refusals import Context, answered, refuse
from thresher.server.registration import check_bringer, check_untrained
from thresher.server.stream import Stream
from thresher.server.translation import (
    agreed_to_message,
    hello_from_message,
    judged_to_message,
    leave_from_message,
    push_from_message,
    refill_from_message,
    register_from_message,
    registered_to_message,
    snapshot_to_messages,
    statistics_to_message,
)
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceServicer

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_OFF_LOOP_BYTES: Final = 1 << 16  # a larger frame is decoded on another thread, so that the loop stays responsive


@final
class AggregationServicer(AggregationServiceServicer):
    """Serves one engine. Knows nothing of rounds: it translates and waits.

    Args:
        engine: Where events go.
        config: What the shard was told, for the answers that repeat it.
    """

    def __init__(self, engine: Engine, config: ShardConfig) -> None:
        """Begin without streams."""
        self._engine = engine
        self._config = config
        self._copies = Copies(engine)
        self._measuring = Measuring(config.shard)
        self._streams: set[Stream] = set()
        self._speaking: dict[int, Stream] = {}  # the newest stream of each rank
        self._greeting: tuple[int, Stream] | None = None  # whose hello the shard has not answered yet, and may refuse
        self._turn = asyncio.Lock()  # or a stream that ends would take that of a worker that just came back for lost
        self._layout: Layout | None = None
        self._slice: Slice | None = None
        self._payload_bound = self._state_bound = self._buffers_bound = 0
        self._settled = asyncio.Event()  # seeded, or failed before that
        self.on_failure: Callable[[], None] = lambda: None

    def recover(self, layout: Layout, *, seeded: bool) -> None:
        """Serve a run that began in an earlier life of this shard."""
        self._serve_layout(layout)
        if seeded:
            self._settled.set()

    # What the engine calls

    def publish(self, sealed: SealedUpdate, ranks: tuple[int, ...]) -> None:
        """Send an update to these workers, as far as they are connected."""
        streams = [self._speaking[rank] for rank in ranks if rank in self._speaking]
        if self._greeting is not None and self._greeting[0] in ranks:
            streams.append(self._greeting[1])
        for stream in streams:
            stream.publish(sealed)

    def tell(self, agreed: Agreed, ranks: tuple[int, ...]) -> None:
        """Tell these workers what was agreed."""
        for rank in ranks:
            if rank in self._speaking:
                self._speaking[rank].say(agreed_to_message(agreed))

    def restart(self, ranks: tuple[int, ...]) -> None:
        """End the streams of these workers, which will come back."""
        for rank in ranks:
            if rank in self._speaking:
                self._speaking[rank].end(BehindError(f"shard {self._config.shard} was refilled; find out where it is"))

    def fail(self, reason: str) -> None:
        """End every stream: the run cannot go on."""
        for stream in self._streams:
            stream.end(RoundFailedError(reason))
        self._settled.set()
        self.on_failure()

    # What workers call

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        """Announce a worker."""
        return await answered(self._register(request), context) or pb.RegisterResponse()

    async def Seed(self, request_iterator: AsyncIterator[pb.SeedRequest], context: Context) -> pb.SeedResponse:
        """Take the starting values, or a replica for those that were lost."""
        return await answered(self._seed(request_iterator), context) or pb.SeedResponse()

    async def Snapshot(self, request: pb.SnapshotRequest, context: Context) -> AsyncIterator[pb.SnapshotResponse]:
        """Read the shard's state."""
        try:
            await self._seeded(request.wait_seconds)
            async with self._copies.read() as (snapshot, data):
                for message in snapshot_to_messages(snapshot, data):
                    yield message
        except ThresherError as error:
            refuse(context, error)

    async def Exchange(
        self, request_iterator: AsyncIterator[pb.ExchangeRequest], context: Context
    ) -> AsyncIterator[pb.ExchangeResponse]:
        """Hold the conversation with one worker: a task reads, this generator writes."""
        stream = Stream(self._config.log_cap_bytes)
        self._streams.add(stream)
        stream.listen(asyncio.create_task(self._read(request_iterator, stream)))
        try:
            async with aclosing(aiter(stream)) as messages:
                async for message in messages:
                    yield message
            if stream.refusal is not None:
                refuse(context, stream.refusal)
        finally:
            stream.end()
            self._streams.discard(stream)

    async def Statistics(self, request: pb.StatisticsRequest, context: Context) -> pb.StatisticsResponse:
        """Return counters."""
        return statistics_to_message(self._engine.statistics(), self._engine.last_iteration_age())

    async def Measure(
        self, request_iterator: AsyncIterator[pb.MeasureRequest], context: Context
    ) -> AsyncIterator[pb.MeasureResponse]:
        """Take bytes that mean nothing, and give such back."""
        try:
            async with aclosing(self._measuring.answer(request_iterator)) as answers:
                async for answer in answers:
                    yield answer
        except ThresherError as error:
            refuse(context, error)

    # Translation

    async def _register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        event = register_from_message(request)
        answer = _only(await self._engine.submit(event), effects.Registered)
        if self._slice is None:
            self._serve_layout(event.layout)
        if answer.warning:
            _logger.warning("%s", answer.warning)
        return registered_to_message(answer, self._config)

    def _serve_layout(self, layout: Layout) -> None:
        self._layout, self._slice = layout, layout.shard_slice(self._config.shard, self._config.shards)
        self._payload_bound, self._buffers_bound = payload_bound(self._slice), state_bytes_bound(layout, 0)
        self._state_bound = state_bytes_bound(layout, self._slice.numel)

    async def _seed(self, requests: AsyncIterator[pb.SeedRequest]) -> pb.SeedResponse:
        async with _closing(requests) as parts:
            first = await anext(parts, None)
            if first is None:
                raise ProtocolError("an empty seed")
            if self._slice is None:
                raise ProtocolError("a seed before any registration; register first")
            payload = Payload(first.total_bytes, self._state_bound)
            complete = payload.add(first.chunk)
            async for request in parts:
                complete = payload.add(request.chunk)
        if not complete:
            raise FrameError(f"a seed of {first.total_bytes} bytes was announced, {len(payload.data)} came")
        worker, data = Worker(first.rank, first.incarnation), bytes(payload.data)
        event: events.Seed | events.Refill
        if first.HasField("refill"):
            event = await asyncio.to_thread(refill_from_message, worker, first.refill, data)
        else:
            event = events.Seed(worker, *await asyncio.to_thread(unpack_state, data))
        self._check_untrained(event)
        done = await self._engine.submit(event)
        self._settled.set()
        return pb.SeedResponse(accepted=_only(done, effects.Seeded).accepted)

    def _check_untrained(self, event: events.Seed | events.Refill | events.Leave) -> None:
        assert self._layout is not None  # noqa: S101 - nobody takes part before it was registered
        check_untrained(event.untrained, self._layout, self._config.shard, event.worker.rank)

    async def _seeded(self, wait_seconds: float) -> None:
        try:
            await asyncio.wait_for(self._settled.wait(), wait_seconds)
        except TimeoutError:
            raise RoundFailedError(
                f"shard {self._config.shard} has waited {wait_seconds:.1f} s for its starting values; "
                "worker 0, which brings them, has not come; start it, or look at its log"
            ) from None

    async def _read(self, requests: AsyncIterator[pb.ExchangeRequest], stream: Stream) -> ThresherError | None:
        """Turn what one worker says into events, until it leaves, breaks off or is refused; return why it is."""
        try:
            async with aclosing(self._bodies(requests, stream)) as bodies:
                async for body, payload, wire_bytes in bodies:
                    if stream.worker is None:
                        await self._greet(body, stream)
                        continue
                    done = await self._event(stream.worker, body, payload, wire_bytes)
                    if self._answer(done, stream):
                        return None
        except ThresherError as error:
            return error
        except DecodeError as error:
            return FrameError(f"a message that is none: {error}")
        except Exception as error:
            _logger.exception("what %s said could not be handled", stream.worker)
            return ThresherError(f"shard {self._config.shard} failed by {type(error).__name__}; see its log")
        else:
            return ProtocolError("the stream ended without a leave")
        finally:
            # Also when this task is cancelled because the stream has ended.
            if stream.worker is not None:
                await asyncio.shield(asyncio.ensure_future(self._gone(stream, stream.worker)))

    async def _gone(self, stream: Stream, worker: Worker) -> None:
        """Tell the shard that the worker is gone, unless it has come back on another stream."""
        async with self._turn:
            if self._speaking.get(worker.rank) is stream:
                del self._speaking[worker.rank]
                await self._disconnected(worker)

    async def _disconnected(self, worker: Worker) -> None:
        try:
            await self._engine.submit(events.Disconnect(worker))
        except ThresherError as error:
            _logger.info("worker %d went away: %s", worker.rank, error)

    async def _bodies(
        self, requests: AsyncIterator[pb.ExchangeRequest], stream: Stream
    ) -> AsyncGenerator[tuple[pb.ExchangeRequest, bytearray, int], None]:
        """Put messages and their continuations together: body, payload, bytes on the wire."""
        body: pb.ExchangeRequest | None = None
        payload, wire_bytes = Payload(0, 0), 0
        async with _closing(requests) as parts:
            async for request in parts:
                if request.WhichOneof("body") is not None:
                    if body is not None:
                        raise ProtocolError("a new message began before the payload of the last one was complete")
                    body, wire_bytes = request, 0
                    payload = Payload(request.payload_bytes, self._bound(request, stream.worker))
                if body is None:
                    raise ProtocolError("a part of a payload came before its message")
                wire_bytes += request.ByteSize()
                if payload.add(request.chunk):
                    yield body, payload.data, wire_bytes
                    body = None

    def _bound(self, request: pb.ExchangeRequest, worker: Worker | None) -> int:
        """Return how many bytes may belong to a message; refuse those of which it is known before they come."""
        if worker is None and not request.HasField("hello"):
            raise ProtocolError("the first message of a stream must be a hello")
        match request.WhichOneof("body"):
            case "push":
                return self._payload_bound
            case "leave" if worker is not None and request.payload_bytes:
                check_bringer(worker.rank, self._config.shard)
                return self._buffers_bound
            case _:
                return 0

    async def _greet(self, request: pb.ExchangeRequest, stream: Stream) -> None:
        hello = hello_from_message(request.hello)
        rank = hello.worker.rank
        async with self._turn:
            self._greeting = rank, stream
            try:
                done = await self._hello(hello)
                earlier = self._speaking.get(rank)
                self._speaking[rank] = stream
            finally:
                self._greeting = None
        stream.greet(_only(done, effects.Backlog).updates)
        stream.worker = hello.worker
        if earlier is not None:
            earlier.end(FencedError(f"worker {rank} has opened another stream"))

    async def _hello(self, hello: events.Hello) -> list[Effect]:
        """Introduce a worker; if it goes away meanwhile, the shard hears of that right behind the hello."""
        try:
            return await self._engine.submit(hello)
        except asyncio.CancelledError:
            speaking = self._speaking.get(hello.worker.rank)
            if speaking is None or speaking.worker != hello.worker:  # that of an earlier life says nothing of this one
                await asyncio.shield(asyncio.ensure_future(self._disconnected(hello.worker)))
            raise

    async def _event(
        self, worker: Worker, request: pb.ExchangeRequest, payload: bytearray, wire_bytes: int
    ) -> list[Effect]:
        match request.WhichOneof("body"):
            case "push":
                return await self._push(worker, request.push, payload, wire_bytes)
            case "agree":
                asked = request.agree
                return await self._engine.submit(events.Agree(worker, asked.number, dict(asked.values)))
            case "leave":
                left = leave_from_message(worker, request.leave, payload)
                self._check_untrained(left)
                return await self._engine.submit(left)
            case "abort":
                return await self._engine.submit(events.Abort(worker, request.abort.reason))
            case other:
                raise ProtocolError(f"after a hello come pushes, agreements, a leave or an abort; {other} came")

    async def _push(self, worker: Worker, push: pb.Push, payload: bytearray, wire_bytes: int) -> list[Effect]:
        piece = self._slice
        if piece is None:
            raise ProtocolError("a push before any registration")
        gradient = None if push.skipped or push.lost else await _decoded(payload, piece.numel)
        return await self._engine.submit(push_from_message(worker, push, gradient, piece, payload, wire_bytes))

    def _answer(self, done: list[Effect], stream: Stream) -> bool:
        """Say what only this worker needs to hear; True when nothing more will follow."""
        for effect in done:
            match effect:
                case effects.Judged():
                    stream.say(judged_to_message(effect))
                case effects.Left(version):
                    # What the leave has closed is not for the one who leaves.
                    if stream.worker is not None and self._speaking.get(stream.worker.rank) is stream:
                        del self._speaking[stream.worker.rank]
                    stream.say(pb.ExchangeResponse(left=pb.Left(version=version)))
                    return True
                case _:
                    pass
        return False


async def _decoded(payload: bytearray, numel: int) -> SparseGradient:
    if len(payload) < _OFF_LOOP_BYTES:
        return decode(payload, numel=numel)
    return await asyncio.to_thread(decode, payload, numel=numel)


def _only(done: list[Effect], kind: type[T]) -> T:
    return next(effect for effect in done if isinstance(effect, kind))


def _closing(requests: AsyncIterator[T]) -> "aclosing[AsyncGenerator[T, None]]":
    """Return what a caller says, to be closed when no more of it is heard: gRPC would leave that to the collector."""
    return aclosing(cast("AsyncGenerator[T, None]", aiter(requests)))
