"""An update as it goes on the wire and into the log: encoded once, with the digest that chains it to its history."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, final

from thresher.protos.codec import decode, encode
from thresher.protos.errors import ProtocolError
from thresher.protos.layout import Slice
from thresher.protos.messages import (
    bookmark_from_message,
    bookmark_to_message,
    chunks,
    overrides_from_messages,
    overrides_to_messages,
)
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Update, pack_presence, unpack_presence
from thresher.v1 import aggregation_pb2 as pb

DIGEST_BYTES: Final = 16


@final
@dataclass(frozen=True)
class SealedUpdate:
    """An update beside its message and its frame.

    Attributes:
        update: With its digest.
        body: The message.
        frame: Of the mean or of the assignments; empty when there is none.
    """

    update: Update
    body: pb.Update
    frame: bytes

    @cached_property
    def messages(self) -> list[pb.ExchangeResponse]:
        """What a worker is sent."""
        return [
            pb.ExchangeResponse(update=self.body if index == 0 else None, payload_bytes=size, chunk=chunk)
            for index, (size, chunk) in enumerate(chunks(self.frame))
        ]

    @cached_property
    def wire_bytes(self) -> int:
        """Bytes of all its messages."""
        return sum(message.ByteSize() for message in self.messages)


def sealed(update: Update, previous: bytes) -> SealedUpdate:
    """Encode the update that follows the history with digest ``previous``, and chain it.

    The digest is blake2b, 16 bytes, over the digest before, the message without a digest, and the frame. Two shards
    that have it in common have all their history in common.
    """
    frame = b"" if update.mean is None else encode(update.mean)
    body = _message(update)
    digest = hashlib.blake2b(previous + body.SerializeToString(deterministic=True), digest_size=DIGEST_BYTES)
    digest.update(frame)
    body.digest = digest.digest()
    return SealedUpdate(replace(update, digest=body.digest), body, frame)


def with_assignments(
    newest: SealedUpdate, assignments: SparseGradient, versions: int, membership: Membership | None
) -> SealedUpdate:
    """Return the newest update as workers that copy a shadow are told of it.

    Args:
        newest: Its mean stays at the shard.
        assignments: New values of the shadow since the reader's version.
        versions: How many versions they span.
        membership: Who belongs to the run now, whichever of these versions changed it; None from other than the first
            shard.
    """
    update = replace(
        newest.update, mean=None, assignments=assignments, assigned_versions=versions, membership=membership
    )
    body = _message(update)
    body.digest = update.digest
    return SealedUpdate(update, body, encode(assignments))


def _message(update: Update) -> pb.Update:
    everyone = update.contributors == tuple(range(update.members))  # after a leave the members are not the first ranks
    return pb.Update(
        version=update.version,
        members=update.members,
        contributors=[] if everyone else update.contributors,
        skipped=not update.contributors,
        presence=pack_presence(update.presence),
        overrides=overrides_to_messages(update.overrides),
        next_threshold=update.next_threshold,
        only_mean=update.only_mean,
        pushed_elements=update.pushed_elements,
        push_bytes=update.push_bytes,
        arrived=[rank for rank, _ in update.arrivals],
        arrived_steps=[step for _, step in update.arrivals],
        membership=None if update.membership is None else membership_to_message(update.membership),
        assigned_versions=update.assigned_versions,
        bookmark=None if update.bookmark is None else bookmark_to_message(update.bookmark),
    )


def update_from_message(body: pb.Update, frame: bytes | bytearray, piece: Slice) -> Update:
    """Read an update for a slice.

    Raises:
        FrameError: when the payload is not a frame of that slice.
        ProtocolError: when the body makes no sense for it.
    """
    try:
        presence = unpack_presence(body.presence, len(piece.segments))
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    if len(body.arrived) != len(body.arrived_steps):
        raise ProtocolError(f"{len(body.arrived)} pushes and {len(body.arrived_steps)} steps in version {body.version}")
    payload = decode(frame, numel=piece.numel) if body.assigned_versions or not body.skipped else None
    return Update(
        version=body.version,
        members=body.members,
        contributors=tuple(body.contributors) or (() if body.skipped else tuple(range(body.members))),
        arrivals=tuple(zip(body.arrived, body.arrived_steps, strict=True)),
        mean=None if body.assigned_versions else payload,
        presence=presence,
        overrides=overrides_from_messages(body.overrides),
        next_threshold=body.next_threshold if body.HasField("next_threshold") else None,
        only_mean=body.only_mean,
        pushed_elements=body.pushed_elements,
        push_bytes=body.push_bytes,
        digest=body.digest,
        membership=membership_from_message(body.membership) if body.HasField("membership") else None,
        assignments=payload if body.assigned_versions else None,
        assigned_versions=body.assigned_versions,
        bookmark=bookmark_from_message(body.bookmark) if body.HasField("bookmark") else None,
    )


def membership_to_message(membership: Membership) -> pb.Membership:
    """Write a membership."""
    return pb.Membership(epoch=membership.epoch, ranks=membership.ranks)


def membership_from_message(message: pb.Membership) -> Membership:
    """Read a membership. Raises ProtocolError when its ranks are no ascending list."""
    ranks: Sequence[int] = tuple(message.ranks)
    if list(ranks) != sorted(set(ranks)):
        raise ProtocolError(f"the ranks of a membership must ascend, not {list(ranks)}")
    return Membership(message.epoch, tuple(ranks))
