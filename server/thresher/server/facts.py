"""What a shard must never forget, as values: one record for each change, and their bytes in the journal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, assert_never, final

from google.protobuf.message import DecodeError
from torch import Tensor

from thresher.protos.errors import DataLossError, FrameError, ProtocolError
from thresher.protos.layout import Slice
from thresher.protos.messages import (
    consistency_from_message,
    consistency_to_message,
    layout_from_message,
    layout_to_message,
    optimizer_from_message,
    optimizer_to_message,
)
from thresher.protos.sealed import SealedUpdate, membership_from_message, membership_to_message, update_from_message
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.protos.update import Membership
from thresher.server.events import Register, Verdict, Worker
from thresher.v1 import aggregation_pb2 as pb
from thresher.v1 import records_pb2 as disk


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """The first worker has registered: what all others must agree with."""

    run: int
    registration: Register


@final
@dataclass(frozen=True, slots=True)
class Admitted:
    """A life of a worker was let in; earlier ones of its rank are fenced."""

    worker: Worker
    origin: str
    metrics_address: str


@final
@dataclass(frozen=True, slots=True)
class Contribution:
    """One push in a closed round.

    ``heard`` is False for one that had nothing to say. ``residual_squared`` is what its worker keeps back on this
    slice, ``forgot`` says that what it kept back before is gone.
    """

    rank: int
    step: int
    content: int
    wire_bytes: int
    elements: int
    staleness: int
    heard: bool
    residual_squared: float = 0.0
    forgot: bool = False


@final
@dataclass(frozen=True, slots=True)
class Closed:
    """A closed round: the update, who pushed, and what the per-iteration file says of it.

    Attributes:
        sealed: The update, encoded.
        contributions: All pushes, in rank order.
        threshold: The one the round was computed with.
        residual_squared: Mean over the pushes of the squared norm of what their workers keep.
        round_seconds: From the first push to the close.
        deliveries: To which rank it is sent, in how many bytes of exchange messages.
    """

    sealed: SealedUpdate
    contributions: tuple[Contribution, ...]
    threshold: float | None
    residual_squared: float
    round_seconds: float
    deliveries: tuple[tuple[int, int], ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Returned:
    """A push was not taken, and its worker has it back."""

    rank: int
    step: int
    content: int


@final
@dataclass(frozen=True, slots=True)
class Departed:
    """A worker has left, with what it had not sent."""

    rank: int
    abandoned_squared: float
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Agreed:
    """The members have agreed on numbers."""

    number: int
    values: Mapping[str, float]


Record = Opened | Admitted | Closed | Returned | Departed | Membership | Agreed


def record_to_bytes(record: Record) -> bytes:
    """Write a record for the journal."""
    match record:
        case Opened():
            message = disk.Record(opened=opened_to_message(record))
        case Admitted(worker, origin, metrics_address):
            admitted = disk.Admitted(
                rank=worker.rank, incarnation=worker.incarnation, origin=origin, metrics_address=metrics_address
            )
            message = disk.Record(admitted=admitted)
        case Closed():
            message = disk.Record(closed=closed_to_message(record))
        case Returned(rank, step, content):
            message = disk.Record(returned=disk.Returned(rank=rank, step=step, content=content))
        case Departed(rank, abandoned_squared, buffers):
            packed = pack_state({}, buffers) if buffers else b""
            departed = disk.Departed(rank=rank, abandoned_squared=abandoned_squared, buffers=packed)
            message = disk.Record(departed=departed)
        case Membership():
            message = disk.Record(membership=membership_to_message(record))
        case Agreed(number, values):
            message = disk.Record(agreed=pb.Agreed(number=number, values=values))
        case _:
            assert_never(record)
    return message.SerializeToString(deterministic=True)


def record_from_bytes(data: bytes, piece: Slice | None) -> Record:
    """Read a record of the journal.

    Args:
        data: As `record_to_bytes` wrote it.
        piece: The shard's slice; None before the run is opened.

    Raises:
        DataLossError: when it is none: the journal is of another version, or its checksums were forged.
    """
    message = disk.Record()
    try:
        message.ParseFromString(data)
        match message.WhichOneof("kind"):
            case "opened":
                return opened_from_message(message.opened)
            case "admitted":
                said = message.admitted
                return Admitted(Worker(said.rank, said.incarnation), said.origin, said.metrics_address)
            case "closed" if piece is not None:
                return closed_from_message(message.closed, piece)
            case "returned":
                return Returned(message.returned.rank, message.returned.step, message.returned.content)
            case "departed":
                packed = message.departed.buffers
                buffers = unpack_state(packed)[1] if packed else {}
                return Departed(message.departed.rank, message.departed.abandoned_squared, buffers)
            case "membership":
                return membership_from_message(message.membership)
            case "agreed":
                return Agreed(message.agreed.number, dict(message.agreed.values))
            case other:
                raise FrameError(f"a record {other} is not known here")
    except (DecodeError, ValueError, ProtocolError) as error:
        raise DataLossError(f"a record of {len(data)} bytes cannot be read: {error}") from error


def opened_to_message(opened: Opened) -> disk.Opened:
    """Write the beginning of a run."""
    said = opened.registration
    registration = pb.RegisterRequest(
        rank=said.worker.rank,
        incarnation=said.worker.incarnation,
        workers=said.workers,
        shard=said.shard,
        shards=said.shards,
        layout=layout_to_message(said.layout),
        optimizer=optimizer_to_message(said.optimizer),
        method=said.method,
        consistency=consistency_to_message(said.consistency),
        origin=said.origin,
        environment=pb.Environment(
            torch_version=said.environment[0], cpu_capability=said.environment[1], threads=int(said.environment[2])
        ) if said.environment else None,
    )  # fmt: skip
    return disk.Opened(run=opened.run, workers=said.workers, registration=registration)


def opened_from_message(message: disk.Opened) -> Opened:
    """Read the beginning of a run."""
    said = message.registration
    environment = said.environment
    register = Register(
        worker=Worker(said.rank, said.incarnation),
        workers=said.workers,
        shard=said.shard,
        shards=said.shards,
        layout=layout_from_message(said.layout),
        optimizer=optimizer_from_message(said.optimizer),
        method=said.method,
        consistency=consistency_from_message(said.consistency),
        origin=said.origin,
        environment=(environment.torch_version, environment.cpu_capability, str(environment.threads))
        if said.HasField("environment")
        else (),
    )
    return Opened(message.run, register)


def closed_to_message(closed: Closed) -> disk.Closed:
    """Write a closed round."""
    return disk.Closed(
        update=closed.sealed.body,
        frame=closed.sealed.frame,
        contributions=[
            disk.Contribution(
                rank=one.rank, step=one.step, content=one.content, wire_bytes=one.wire_bytes, elements=one.elements,
                staleness=one.staleness, heard=one.heard, residual_squared=one.residual_squared, forgot=one.forgot,
            )
            for one in closed.contributions
        ],
        threshold=closed.threshold,
        residual_squared=closed.residual_squared,
        round_seconds=closed.round_seconds,
        readers=[rank for rank, _ in closed.deliveries],
        delivered_bytes=[wire_bytes for _, wire_bytes in closed.deliveries],
    )  # fmt: skip


def closed_from_message(message: disk.Closed, piece: Slice) -> Closed:
    """Read a closed round of a slice."""
    update = update_from_message(message.update, message.frame, piece)
    contributions = tuple(
        Contribution(
            one.rank,
            one.step,
            one.content,
            one.wire_bytes,
            one.elements,
            one.staleness,
            one.heard,
            one.residual_squared,
            one.forgot,
        )
        for one in message.contributions
    )
    return Closed(
        sealed=SealedUpdate(update, message.update, message.frame),
        contributions=contributions,
        threshold=message.threshold if message.HasField("threshold") else None,
        residual_squared=message.residual_squared,
        round_seconds=message.round_seconds,
        deliveries=tuple(zip(message.readers, message.delivered_bytes, strict=True)),
    )


VERDICTS: Final = {verdict: pb.Verdict.Value(f"VERDICT_{verdict.name}") for verdict in Verdict}
"""Verdicts as they are on the wire and on disk."""
