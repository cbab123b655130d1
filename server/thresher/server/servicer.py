"""The gRPC edge of a shard: messages become events, effects become messages, errors become status codes."""

import asyncio
import hashlib
import logging
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import accumulate
from typing import Any, Final, NoReturn, TypeVar, final
from urllib.parse import quote

import grpc

from thresher.protos.codec import HEADER_BYTES, decode
from thresher.protos.errors import (
    ConfigurationError,
    FrameError,
    LayoutError,
    OptimizerError,
    ProtocolError,
    RegistrationError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.layout import Slice
from thresher.protos.messages import (
    Payload,
    chunks,
    layout_from_message,
    layout_to_message,
    optimizer_from_message,
    optimizer_to_message,
    overrides_from_messages,
    payload_bound,
)
from thresher.protos.snapshots import pack_state, state_bytes_bound, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.transport import ERROR_NAME
from thresher.protos.update import unpack_presence
from thresher.server import events
from thresher.server.engine import Engine
from thresher.server.events import Effect, Verdict, Worker
from thresher.server.shard import ShardConfig
from thresher.server.stream import EncodedUpdate, Stream, encoded
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1.aggregation_pb2_grpc import AggregationServiceServicer

_logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")

_CODES: Final[dict[type[Exception], grpc.StatusCode]] = {
    FrameError: grpc.StatusCode.INVALID_ARGUMENT,
    OptimizerError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigurationError: grpc.StatusCode.INVALID_ARGUMENT,
    LayoutError: grpc.StatusCode.FAILED_PRECONDITION,
    RegistrationError: grpc.StatusCode.FAILED_PRECONDITION,
    ProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    RoundFailedError: grpc.StatusCode.ABORTED,
}
_VERDICTS: Final = {verdict: pb.Verdict.Value(f"VERDICT_{verdict.name}") for verdict in Verdict}
_DETAILS_BYTES: Final = 6000  # of the 8 KiB that gRPC takes as metadata
_OFF_LOOP_BYTES: Final = 1 << 16  # a larger frame is decoded on another thread, so that the loop stays responsive


@final
class AggregationServicer(AggregationServiceServicer):
    """Serves one engine. Knows nothing of rounds: it translates and waits.

    Args:
        engine: Where events go.
        config: What the shard was told, for the answers that repeat it.
    """

    def __init__(self, engine: Engine[EncodedUpdate], config: ShardConfig) -> None:
        """Begin without streams."""
        self._engine = engine
        self._config = config
        self._streams: set[Stream] = set()
        self._speaking: dict[Worker, Stream] = {}  # each worker's newest stream
        self._slice: Slice | None = None
        self._payload_bound = self._state_bound = 0
        self._settled = asyncio.Event()  # seeded, or failed before that
        self.on_failure: Callable[[], None] = lambda: None

    # What the engine calls

    def publish(self, update: EncodedUpdate) -> None:
        """Send an update to every connected worker."""
        for stream in self._streams:
            stream.publish(update)

    def fail(self, reason: str) -> None:
        """End every stream: the run cannot go on."""
        for stream in self._streams:
            stream.end(RoundFailedError(reason))
        self._settled.set()
        self.on_failure()

    # What workers call

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        """Announce a worker."""
        return await _answered(self._register(request), context)

    async def Seed(self, request_iterator: AsyncIterator[pb.SeedRequest], context: Context) -> pb.SeedResponse:
        """Take the starting values."""
        return await _answered(self._seed(request_iterator), context)

    async def Snapshot(self, request: pb.SnapshotRequest, context: Context) -> AsyncIterator[pb.SnapshotResponse]:
        """Read the shard's state."""
        state, data = await _answered(self._read_state(request.wait_seconds), context)
        for index, (_, chunk) in enumerate(chunks(data)):
            yield pb.SnapshotResponse(
                version=state.version,
                total_bytes=len(data),
                chunk=chunk,
                layout=None if index else layout_to_message(state.layout),
                optimizer=None if index else optimizer_to_message(state.optimizer),
            )

    async def Exchange(
        self, request_iterator: AsyncIterator[pb.ExchangeRequest], context: Context
    ) -> AsyncIterator[pb.ExchangeResponse]:
        """Hold the conversation with one worker: a task reads, this generator writes."""
        stream = Stream()
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            async for message in stream:
                yield message
        except ThresherError as error:
            await _abort(context, error)
        finally:
            reader.cancel()
            self._streams.discard(stream)

    async def Statistics(self, request: pb.StatisticsRequest, context: Context) -> pb.StatisticsResponse:
        """Return counters."""
        now = self._engine.statistics()
        row = now.last_row
        return pb.StatisticsResponse(
            shard=now.shard,
            shards=now.shards,
            state=now.state,
            failure=now.failure,
            version=now.version,
            numel=now.numel,
            model_numel=now.model_numel,
            workers=[
                pb.WorkerStatistics(
                    rank=m.rank, state=m.state, steps=m.steps, push_bytes=m.push_bytes, pull_bytes=m.pull_bytes,
                    pushed_elements=m.pushed_elements, pushable_elements=m.pushable_elements, density=m.density,
                    origin=m.origin, metrics_address=m.metrics_address,
                )
                for m in now.members
            ],
            update_density=row.update_density if row else 0.0,
            threshold=now.threshold,
            log_bytes=now.log_bytes,
            round_seconds=row.round_seconds if row else 0.0,
        )  # fmt: skip

    # Translation

    async def _register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        layout = layout_from_message(request.layout)
        if layout.fingerprint != request.fingerprint:
            raise LayoutError(
                f"worker {request.rank} says its layout is {request.fingerprint or 'nameless'}, here it reads as "
                f"{layout.fingerprint}; run the same version of Thresher on both sides"
            )
        seen = request.environment
        effects = await self._engine.submit(
            events.Register(
                worker=Worker(request.rank, request.incarnation),
                workers=request.workers,
                shard=request.shard,
                shards=request.shards,
                layout=layout,
                optimizer=optimizer_from_message(request.optimizer),
                method=request.method,
                origin=request.origin,
                metrics_address=request.metrics_address,
                environment=(seen.torch_version, seen.cpu_capability, f"{seen.threads} threads"),
            )
        )
        self._slice = layout.shard_slice(self._config.shard, self._config.shards)
        self._payload_bound = payload_bound(self._slice)
        self._state_bound = state_bytes_bound(layout, self._slice.numel)
        answer = _only(effects, events.Registered)
        if answer.warning:
            _logger.warning("%s", answer.warning)
        return pb.RegisterResponse(
            run=answer.run,
            version=answer.version,
            seeded=answer.seeded,
            answer_timeout=max(self._config.start_timeout, self._config.round_timeout),
        )

    async def _seed(self, requests: AsyncIterator[pb.SeedRequest]) -> pb.SeedResponse:
        first = await anext(aiter(requests), None)
        if first is None:
            raise ProtocolError("an empty seed")
        if self._slice is None:
            raise ProtocolError("a seed before any registration; register first")
        payload = Payload(first.total_bytes, self._state_bound)
        complete = payload.add(first.chunk)
        async for request in requests:
            complete = payload.add(request.chunk)
        if not complete:
            raise FrameError(f"a seed of {first.total_bytes} bytes was announced, {len(payload.data)} came")
        state, untrained = await asyncio.to_thread(unpack_state, bytes(payload.data))
        effects = await self._engine.submit(events.Seed(Worker(first.rank, first.incarnation), state, untrained))
        self._settled.set()
        return pb.SeedResponse(accepted=_only(effects, events.Seeded).accepted)

    async def _read_state(self, wait_seconds: float) -> tuple[events.State, bytes]:
        try:
            await asyncio.wait_for(self._settled.wait(), wait_seconds)
        except TimeoutError:
            raise RoundFailedError(
                f"shard {self._config.shard} has waited {wait_seconds:.1f} s for its starting values; "
                "worker 0, which brings them, has not come"
            ) from None
        state = _only(await self._engine.submit(events.ReadState()), events.State)
        return state, await asyncio.to_thread(pack_state, state.tensors, state.untrained)

    async def _read(self, requests: AsyncIterator[pb.ExchangeRequest], stream: Stream) -> None:
        """Turn what one worker says into events, until it leaves, breaks off or is refused."""
        worker: Worker | None = None
        try:
            async for body, payload, wire_bytes in self._bodies(requests):
                if worker is None:
                    worker = await self._greet(body, stream)
                    continue
                if body.HasField("leave"):  # it may close a round, whose update is not for the one who leaves
                    self._streams.discard(stream)
                effects = await self._event(worker, body, payload, wire_bytes)
                if self._answer(effects, stream):
                    return
            raise ProtocolError("the stream ended without a leave")  # noqa: TRY301 - told as every other refusal
        except ThresherError as error:
            stream.end(error)
        except grpc.aio.AbortError:
            pass  # the call was ended from this side while its next message was waited for
        except Exception as error:
            _logger.exception("what %s said could not be handled", worker)
            stream.end(ThresherError(f"shard {self._config.shard} failed by {type(error).__name__}; see its log"))
        finally:
            # Also when this task is cancelled because the call has ended: the shard must learn that the worker is gone,
            # unless it has come back on another stream.
            self._streams.discard(stream)
            if worker is not None and self._speaking.get(worker) is stream:
                del self._speaking[worker]
                await asyncio.shield(asyncio.ensure_future(self._disconnected(worker)))

    async def _disconnected(self, worker: Worker) -> None:
        try:
            await self._engine.submit(events.Disconnect(worker))
        except ThresherError as error:
            _logger.warning("worker %d went away: %s", worker.rank, error)

    async def _bodies(
        self, requests: AsyncIterator[pb.ExchangeRequest]
    ) -> AsyncIterator[tuple[pb.ExchangeRequest, bytearray, int]]:
        """Put messages and their continuations together: body, payload, bytes on the wire."""
        body: pb.ExchangeRequest | None = None
        payload, wire_bytes = Payload(0, 0), 0
        async for request in requests:
            if request.WhichOneof("body") is not None:
                if body is not None:
                    raise ProtocolError("a new message began before the payload of the last one was complete")
                body, wire_bytes = request, 0
                bound = self._state_bound if request.HasField("leave") else self._payload_bound
                payload = Payload(request.payload_bytes, bound)
            if body is None:
                raise ProtocolError("a part of a payload came before its message")
            wire_bytes += request.ByteSize()
            if payload.add(request.chunk):
                yield body, payload.data, wire_bytes
                body = None

    async def _greet(self, request: pb.ExchangeRequest, stream: Stream) -> Worker:
        if not request.HasField("hello"):
            raise ProtocolError("the first message of a stream must be a hello")
        worker = Worker(request.hello.rank, request.hello.incarnation)
        self._streams.add(stream)
        effects = await self._hello(worker, request.hello.version)
        stream.greet([encoded(update) for update in _only(effects, events.Backlog).updates])
        earlier = self._speaking.get(worker)
        self._speaking[worker] = stream
        if earlier is not None:
            self._streams.discard(earlier)
            earlier.end(ProtocolError(f"worker {worker.rank} has opened another stream"))
        return worker

    async def _hello(self, worker: Worker, version: int) -> list[Effect]:
        """Introduce a worker; if it goes away meanwhile, the shard hears of that right behind the hello."""
        try:
            return await self._engine.submit(events.Hello(worker, version))
        except asyncio.CancelledError:
            if worker not in self._speaking:
                await asyncio.shield(asyncio.ensure_future(self._disconnected(worker)))
            raise

    async def _event(
        self, worker: Worker, request: pb.ExchangeRequest, payload: bytearray, wire_bytes: int
    ) -> list[Effect]:
        match request.WhichOneof("body"):
            case "push":
                return await self._push(worker, request.push, payload, wire_bytes)
            case "leave":
                untrained = unpack_state(bytes(payload))[1] if payload else {}
                leave = request.leave
                event = events.Leave(worker, leave.step, leave.push_bytes, leave.pull_bytes, untrained)
                return await self._engine.submit(event)
            case "abort":
                return await self._engine.submit(events.Abort(worker, request.abort.reason))
            case other:
                raise ProtocolError(f"a stream has one hello, then pushes, a leave or an abort; {other} came")

    async def _push(self, worker: Worker, push: pb.Push, payload: bytearray, wire_bytes: int) -> list[Effect]:
        piece = self._slice
        if piece is None:
            raise ProtocolError("a push before any registration")
        try:
            presence = unpack_presence(push.presence, len(piece.segments))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        return await self._engine.submit(
            events.Push(
                worker=worker,
                step=push.step,
                version=push.version,
                gradient=None if push.skipped else await _decoded(payload, piece.numel),
                presence=presence,
                overrides=overrides_from_messages(push.overrides),
                residual_squared=push.residual_squared,
                next_threshold=push.next_threshold if push.HasField("next_threshold") else None,
                only_mean=push.only_mean,
                wire_bytes=wire_bytes,
                content=_digest(push, payload),
            )
        )

    def _answer(self, effects: list[Effect], stream: Stream) -> bool:
        """Say what only this worker needs to hear; True when nothing more will follow."""
        for effect in effects:
            match effect:
                case events.Judged(step, verdict, reason):
                    result = pb.PushResult(step=step, verdict=_VERDICTS[verdict], reason=reason)
                    stream.say(pb.ExchangeResponse(result=result))
                case events.Left(version):
                    self._streams.discard(stream)
                    stream.say(pb.ExchangeResponse(left=pb.Left(version=version)))
                    stream.end()
                    return True
                case _:
                    pass
        return False


async def _decoded(payload: bytearray, numel: int) -> SparseGradient:
    if len(payload) < _OFF_LOOP_BYTES:
        return decode(payload, numel=numel)
    return await asyncio.to_thread(decode, payload, numel=numel)


def _digest(push: pb.Push, frame: bytearray) -> int:
    """Identify what was pushed. The frame's header, which holds its CRC and counts, stands for the frame."""
    content = push.SerializeToString(deterministic=True) + frame[:HEADER_BYTES]
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _only(effects: list[Effect], kind: type[T]) -> T:
    return next(effect for effect in effects if isinstance(effect, kind))


async def _answered(answer: Awaitable[T], context: Context) -> T:
    try:
        return await answer
    except ThresherError as error:
        await _abort(context, error)


async def _abort(context: Context, error: ThresherError) -> NoReturn:
    context.set_trailing_metadata(((ERROR_NAME, type(error).__name__),))
    await context.abort(_CODES.get(type(error), grpc.StatusCode.INTERNAL), _cut(str(error)))
    raise error  # abort never returns; this says so to the type checkers


def _cut(text: str) -> str:
    """Return as much of it as the details of a status can carry: gRPC quotes them, and a longer header is dropped."""
    costs = accumulate(len(quote(character)) for character in text)
    kept = bisect_right(list(costs), _DETAILS_BYTES)
    return text if kept == len(text) else text[:kept] + " …"
