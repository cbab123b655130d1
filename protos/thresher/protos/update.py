"""An update: what one closed round produced on one shard. A training run is a log of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from thresher.protos.bookmark import Bookmark
from thresher.protos.optimizers import Override
from thresher.protos.sparse import SparseGradient

Presence = tuple[bool, ...]
"""One entry per segment of a slice: does its tensor have a gradient in this step?"""


@final
@dataclass(frozen=True, slots=True)
class Membership:
    """Who belongs to the run. The first shard decides; its updates tell the workers, their pushes the other shards.

    Attributes:
        epoch: Counts the changes; a larger one replaces a smaller one.
        ranks: Of the members, ascending; their number is the divisor of means.
    """

    epoch: int
    ranks: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Update:
    """The record that shards apply, log and send, and that replicas replay.

    Attributes:
        version: The version it creates, counted from 1.
        members: The divisor of the mean: how many workers belonged to the run; more where a stale push weighs less.
        contributors: Ranks whose pushes are in the mean, ascending.
        mean: Sum of the pushes in rank order over ``members``, on the shard's slice; None when every member skipped.
        presence: Segments that at least one contributor had a gradient for; the optimizer leaves the rest alone.
        overrides: Hyper-parameters in force that differ from the registered ones.
        next_threshold: Threshold for the coming round; None for methods without one.
        only_mean: The members wanted the mean alone: the version moves, the model does not.
        pushed_elements: How many elements the contributors pushed, together.
        push_bytes: In how many bytes of exchange messages.
        arrivals: Rank and step of every push in the round, heard or skipped; empty in lockstep, where all members push.
        digest: Of the shard's history up to here (`thresher.protos.sealed`).
        membership: Who belongs to the run from now on, where that has changed; with assignments always (first shard).
        assignments: New values of the shadow, for workers that copy it; ``mean`` stays at the shard then.
        assigned_versions: How many versions they span.
        bookmark: Where the members' loops are after it; None where nobody has told (first shard).
    """

    version: int
    members: int
    contributors: tuple[int, ...]
    mean: SparseGradient | None
    presence: Presence
    overrides: tuple[Override, ...] = ()
    next_threshold: float | None = None
    only_mean: bool = False
    pushed_elements: int = 0
    push_bytes: int = 0
    arrivals: tuple[tuple[int, int], ...] = ()
    digest: bytes = b""
    membership: Membership | None = None
    assignments: SparseGradient | None = None
    assigned_versions: int = 0
    bookmark: Bookmark | None = None


def pack_presence(presence: Sequence[bool]) -> bytes:
    r"""Return one bit per entry, least significant first; nothing when all are present, which is the common case.

    >>> pack_presence((True, True)), pack_presence((True, False, True))
    (b'', b'\x05')
    """
    if all(presence):
        return b""
    packed = sum(1 << index for index, present in enumerate(presence) if present)
    return packed.to_bytes((len(presence) + 7) // 8, "little")


def unpack_presence(packed: bytes, segments: int) -> Presence:
    r"""Invert `pack_presence` for a slice of ``segments`` segments.

    Raises:
        ValueError: when the length does not fit.

    >>> unpack_presence(b"\x05", 3)
    (True, False, True)
    """
    if not packed:
        return (True,) * segments
    if len(packed) != (segments + 7) // 8:
        raise ValueError(f"presence of {segments} tensors takes {(segments + 7) // 8} bytes, not {len(packed)}")
    bits = int.from_bytes(packed, "little")
    if bits >> segments:
        raise ValueError(f"presence names tensors beyond the {segments} of this shard")
    return tuple(bool(bits >> index & 1) for index in range(segments))
