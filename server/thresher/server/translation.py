"""Messages ↔ events and effects: pure functions, no waiting."""

import hashlib
import math
from collections.abc import Iterator
from typing import Final

from thresher.protos.codec import HEADER_BYTES
from thresher.protos.errors import LayoutError, ProtocolError, RegistrationError
from thresher.protos.layout import Slice
from thresher.protos.messages import (
    bookmark_from_message,
    bookmark_to_message,
    chunks,
    consistency_from_message,
    layout_from_message,
    layout_to_message,
    optimizer_from_message,
    optimizer_to_message,
    overrides_from_messages,
)
from thresher.protos.sealed import membership_from_message, membership_to_message
from thresher.protos.snapshots import unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, unpack_presence
from thresher.server import effects, events
from thresher.server.config import ShardConfig
from thresher.server.events import Worker
from thresher.server.facts import VERDICTS, Agreed
from thresher.server.statistics import ShardStatistics
from thresher.v1 import aggregation_pb2 as pb

_DIGEST_BYTES: Final = 8
_MOST_CHARACTERS: Final = 1000  # of what is kept of each worker, or told to it, for people


def register_from_message(request: pb.RegisterRequest) -> events.Register:
    """Read a registration.

    Raises:
        LayoutError: when the two sides understand the model differently.
        RegistrationError: when the worker is called by more words than anybody reads.
    """
    if max(len(request.origin), len(request.metrics_address)) > _MOST_CHARACTERS:
        raise RegistrationError(
            f"origin and metrics address of worker {request.rank} have over {_MOST_CHARACTERS} characters"
        )
    layout = layout_from_message(request.layout)
    if layout.fingerprint != request.fingerprint:
        raise LayoutError(
            f"worker {request.rank} says its layout is {request.fingerprint or 'nameless'}, here it reads as "
            f"{layout.fingerprint}; run the same version of Thresher on both sides"
        )
    seen = request.environment
    return events.Register(
        worker=Worker(request.rank, request.incarnation),
        workers=request.workers,
        shard=request.shard,
        shards=request.shards,
        layout=layout,
        optimizer=optimizer_from_message(request.optimizer),
        method=request.method,
        consistency=consistency_from_message(request.consistency),
        origin=request.origin,
        metrics_address=request.metrics_address,
        environment=(seen.torch_version, seen.cpu_capability, str(seen.threads)),
    )


def registered_to_message(answer: effects.Registered, config: ShardConfig) -> pb.RegisterResponse:
    """Write the answer to a registration."""
    return pb.RegisterResponse(
        run=answer.history.run,
        version=answer.history.version,
        seeded=answer.seeded,
        answer_timeout=config.answer_timeout,
        round_timeout=config.round_timeout,
        lease=config.lease,
        settled_steps=answer.settled,
        in_open_round=answer.in_open_round,
        last_verdict=VERDICTS[answer.verdict],
        membership=membership_to_message(answer.membership),
        agreements=answer.agreements,
    )


def refill_from_message(worker: Worker, refill: pb.Refill, data: bytes) -> events.Refill:
    """Read a worker's replica. Raises FrameError when it is none."""
    state, untrained = unpack_state(data)
    return events.Refill(
        worker=worker,
        history=history_from_message(refill.history),
        state=state,
        untrained=untrained,
        overrides=overrides_from_messages(refill.overrides),
        threshold=refill.next_threshold if refill.HasField("next_threshold") else None,
        membership=membership_from_message(refill.membership),
        bookmark=bookmark_from_message(refill.bookmark) if refill.HasField("bookmark") else None,
    )


def hello_from_message(hello: pb.Hello) -> events.Hello:
    """Read a hello."""
    history = events.History(hello.run, hello.version, hello.digest)
    return events.Hello(Worker(hello.rank, hello.incarnation), history)


def push_from_message(
    worker: Worker, push: pb.Push, gradient: SparseGradient | None, piece: Slice, payload: bytearray, wire_bytes: int
) -> events.Push:
    """Read a push whose frame has been decoded.

    Raises:
        ProtocolError: when it speaks of other tensors, or of a place that is none.
    """
    try:
        presence = unpack_presence(push.presence, len(piece.segments))
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    return events.Push(
        worker=worker,
        step=push.step,
        version=push.version,
        gradient=gradient,
        presence=presence,
        overrides=overrides_from_messages(push.overrides),
        residual_squared=push.residual_squared,
        next_threshold=push.next_threshold if push.HasField("next_threshold") else None,
        only_mean=push.only_mean,
        membership=_membership(push),
        lost=push.lost,
        wire_bytes=wire_bytes,
        content=_content(push, payload),
        bookmark=bookmark_from_message(push.bookmark) if push.HasField("bookmark") else None,
        follows=push.follows,
        forgot=push.forgot,
    )


def leave_from_message(worker: Worker, leave: pb.Leave, payload: bytearray) -> events.Leave:
    """Read a leave. Raises FrameError when its payload is no file of buffers."""
    return events.Leave(
        worker=worker,
        push_bytes=leave.push_bytes,
        pull_bytes=leave.pull_bytes,
        counted=leave.counted,
        abandoned_squared=leave.abandoned_squared,
        untrained=unpack_state(bytes(payload))[1] if payload else {},
    )


def judged_to_message(judged: effects.Judged) -> pb.ExchangeResponse:
    """Write what became of a push."""
    verdict = VERDICTS[judged.verdict]
    reason = judged.reason[:_MOST_CHARACTERS]  # it may quote what the worker said, and waits until it is read
    return pb.ExchangeResponse(result=pb.PushResult(step=judged.step, verdict=verdict, reason=reason))


def agreed_to_message(agreed: Agreed) -> pb.ExchangeResponse:
    """Write what was agreed."""
    return pb.ExchangeResponse(agreed=pb.Agreed(number=agreed.number, values=agreed.values))


def snapshot_to_messages(snapshot: effects.Snapshot, data: bytes) -> Iterator[pb.SnapshotResponse]:
    """Write a state whose tensors have been packed."""
    for index, (_, chunk) in enumerate(chunks(data)):
        message = pb.SnapshotResponse(version=snapshot.history.version, total_bytes=len(data), chunk=chunk)
        if index == 0:
            message.layout.CopyFrom(layout_to_message(snapshot.layout))
            message.optimizer.CopyFrom(optimizer_to_message(snapshot.optimizer))
            message.history.CopyFrom(history_to_message(snapshot.history))
            message.membership.CopyFrom(membership_to_message(snapshot.membership))
            if snapshot.threshold is not None:
                message.next_threshold = snapshot.threshold
            if snapshot.bookmark is not None:
                message.bookmark.CopyFrom(bookmark_to_message(snapshot.bookmark))
        yield message


def statistics_to_message(now: ShardStatistics, last_iteration_age: float | None) -> pb.StatisticsResponse:
    """Write a shard's counters; the age of its last iteration is in seconds."""
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
                origin=m.origin, metrics_address=m.metrics_address, wait_seconds=m.wait_seconds, waits=m.waits,
                counts=m.counts,
            )
            for m in now.members
        ],
        update_density=row.update_density if row else 0.0,
        threshold=now.threshold,
        log_bytes=now.log_bytes,
        round_seconds=row.round_seconds if row else 0.0,
        residual_norm=math.sqrt(row.residual_squared) if row else None,
        staleness=row.staleness if row else 0,
        last_iteration_age=last_iteration_age,
    )  # fmt: skip


def history_from_message(message: pb.History) -> events.History:
    """Read a place in a history."""
    return events.History(message.run, message.version, message.digest)


def history_to_message(history: events.History) -> pb.History:
    """Write a place in a history."""
    return pb.History(run=history.run, version=history.version, digest=history.digest)


def _membership(push: pb.Push) -> Membership | None:
    return membership_from_message(push.membership) if push.HasField("membership") else None


def _content(push: pb.Push, frame: bytearray) -> int:
    """Identify what was pushed. The frame's header, which holds its CRC and counts, stands for the frame.

    What the worker knew of the membership is not part of it: it may know more when it repeats the push.
    """
    said = pb.Push()
    said.CopyFrom(push)
    said.ClearField("membership")
    content = said.SerializeToString(deterministic=True) + frame[:HEADER_BYTES]
    return int.from_bytes(hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest(), "little")
