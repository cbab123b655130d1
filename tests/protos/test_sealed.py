"""Sealed updates: what a shard says comes back as it was, and its digest stands for all that was said before."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from thresher.protos.bookmark import Bookmark
from thresher.protos.codec import encode
from thresher.protos.errors import FrameError, ProtocolError
from thresher.protos.layout import Layout, Slice, TensorSpec
from thresher.protos.messages import CHUNK_BYTES, Payload, payload_bound
from thresher.protos.optimizers import Override
from thresher.protos.sealed import (
    DIGEST_BYTES,
    SealedUpdate,
    membership_from_message,
    membership_to_message,
    sealed,
    update_from_message,
    with_assignments,
)
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Update
from thresher.v1 import aggregation_pb2 as pb

PIECE = Layout((TensorSpec("a", (4,), "float32"), TensorSpec("b", (5,), "float32"))).shard_slice(0, 1)
BEGINNING = b""

rank_lists = st.sets(st.integers(0, 5)).map(lambda found: tuple(sorted(found)))
overrides = st.builds(Override, st.integers(0, 5), st.sampled_from(["lr", "momentum"]), st.floats(0, 1))
memberships = st.builds(Membership, st.integers(0, 2**60), rank_lists)


@st.composite
def gradients(draw: st.DrawFn, piece: Slice = PIECE) -> SparseGradient:
    kept = sorted(draw(st.sets(st.integers(0, piece.numel - 1))))
    numbers = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=len(kept), max_size=len(kept)))
    return SparseGradient(torch.tensor(kept, dtype=torch.int64), torch.tensor(numbers), piece.numel)


@st.composite
def updates(draw: st.DrawFn, piece: Slice = PIECE) -> Update:
    ranks = draw(rank_lists.filter(bool))
    heard = tuple(sorted(draw(st.sets(st.sampled_from(ranks)))))
    return Update(
        version=draw(st.integers(1, 2**60)),
        members=len(ranks),
        contributors=heard,
        mean=draw(gradients(piece)) if heard else None,
        presence=draw(st.tuples(*[st.booleans()] * len(piece.segments))),
        overrides=draw(st.lists(overrides, max_size=3).map(tuple)),
        next_threshold=draw(st.none() | st.floats(0, 10)),
        only_mean=draw(st.booleans()),
        pushed_elements=draw(st.integers(0, 2**40)),
        push_bytes=draw(st.integers(0, 2**40)),
        arrivals=draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**60)), max_size=4).map(tuple)),
        membership=draw(st.none() | memberships),
        bookmark=draw(st.sampled_from([None, Bookmark(9, 0, 2, 3, ((2, 3), (4, 1)), 5, 8)])),
    )


def received(told: SealedUpdate, piece: Slice = PIECE) -> Update:
    """What a worker makes of the messages, after they went through bytes."""
    first, *others = [pb.ExchangeResponse.FromString(message.SerializeToString()) for message in told.messages]
    payload = Payload(first.payload_bytes, payload_bound(piece))
    complete = payload.add(first.chunk)
    for message in others:
        assert message.WhichOneof("body") is None
        complete = payload.add(message.chunk)
    assert complete
    return update_from_message(first.update, payload.data, piece)


def assert_equal(one: Update, other: Update) -> None:
    for name in ("mean", "assignments"):
        mine, yours = getattr(one, name), getattr(other, name)
        assert (mine is None) == (yours is None)
        assert mine is None or mine.equals(yours)
    nothing: Any = {"mean": None, "assignments": None}
    assert replace(one, **nothing) == replace(other, **nothing)


# There and back


@given(updates(), st.binary(max_size=16))
def test_round_trip(update: Update, previous: bytes) -> None:
    """An update comes back as it was, with who contributed, whose pushes came, who belongs to the run, and a digest."""
    told = sealed(update, previous)
    assert len(told.update.digest) == DIGEST_BYTES
    assert_equal(told.update, replace(update, digest=told.update.digest))
    assert_equal(received(told), told.update)
    assert told.wire_bytes == sum(len(message.SerializeToString()) for message in told.messages)


@given(updates(), gradients(), st.integers(1, 2**30), memberships | st.none())
def test_assignments_round_trip(
    update: Update, assignments: SparseGradient, versions: int, membership: Membership | None
) -> None:
    """A worker that copies the shadow hears all but the mean, who belongs to the run, and the update's own digest."""
    newest = sealed(update, BEGINNING)
    told = with_assignments(newest, assignments, versions, membership)
    expected = replace(
        newest.update, mean=None, assignments=assignments, assigned_versions=versions, membership=membership
    )
    assert_equal(told.update, expected)
    assert_equal(received(told), expected)


@given(memberships)
def test_membership_round_trip(membership: Membership) -> None:
    """Also that of a run which nobody belongs to any more."""
    message = pb.Membership.FromString(membership_to_message(membership).SerializeToString())
    assert membership_from_message(message) == membership


def test_the_first_ranks_cost_nothing() -> None:
    """The common case, all members 0 … N-1 heard, names nobody; any other names each."""
    update = Update(1, 3, (0, 1, 2), SparseGradient.empty(9), (True, True))
    assert not sealed(update, BEGINNING).body.contributors
    assert list(sealed(replace(update, members=4), BEGINNING).body.contributors) == [0, 1, 2]


def test_a_large_update_travels_in_chunks() -> None:
    """No message carries more than a chunk, and only the first has a body."""
    numel = CHUNK_BYTES // 2  # two MiB of values
    piece = Layout((TensorSpec("w", (numel,), "float32"),)).shard_slice(0, 1)
    told = sealed(Update(1, 2, (0, 1), SparseGradient.dense(torch.rand(numel)), (True,)), BEGINNING)
    assert len(told.messages) == 3
    assert max(len(message.chunk) for message in told.messages) == CHUNK_BYTES
    assert_equal(received(told, piece), told.update)


# The chain

histories = st.lists(updates(), min_size=1, max_size=3)


def digests(history: Sequence[Update]) -> list[bytes]:
    found = [BEGINNING]
    for update in history:
        found.append(sealed(update, found[-1]).update.digest)
    return found[1:]


@given(histories)
def test_equal_histories_have_equal_digests(history: list[Update]) -> None:
    """Also for another process, which knows them from bytes; an earlier digest in an update is no part of it."""
    again = [replace(received(sealed(update, b"elsewhere")), digest=b"of another life") for update in history]
    assert digests(again) == digests(history)


CHANGES: dict[str, Any] = {
    "version": lambda update: {"version": update.version + 1},
    "members": lambda update: {"members": update.members + 1},
    "presence": lambda update: {"presence": (not update.presence[0], *update.presence[1:])},
    "overrides": lambda update: {"overrides": (*update.overrides, Override(0, "weight_decay", 0.5))},
    "threshold": lambda update: {"next_threshold": 11.0 if update.next_threshold is None else None},
    "only mean": lambda update: {"only_mean": not update.only_mean},
    "elements": lambda update: {"pushed_elements": update.pushed_elements + 1},
    "bytes": lambda update: {"push_bytes": update.push_bytes + 1},
    "arrivals": lambda update: {"arrivals": (*update.arrivals, (6, 0))},
    "membership": lambda update: {"membership": Membership(7, (6,)) if update.membership is None else None},
}


@given(histories, st.sampled_from(sorted(CHANGES)), st.data())
def test_a_change_anywhere_changes_all_digests_behind_it(
    history: list[Update], change: str, data: st.DataObject
) -> None:
    """Whatever is different, and however long ago, the two histories never have a digest in common again."""
    place = data.draw(st.integers(0, len(history) - 1))
    other = [*history]
    other[place] = replace(history[place], **CHANGES[change](history[place]))
    mine, yours = digests(history), digests(other)
    assert mine[:place] == yours[:place]
    assert all(one != another for one, another in zip(mine[place:], yours[place:], strict=True))


@given(histories, gradients(), st.data())
def test_another_mean_changes_all_digests_behind_it(
    history: list[Update], mean: SparseGradient, data: st.DataObject
) -> None:
    """The digest covers the frame too, to the bit."""
    place = data.draw(st.integers(0, len(history) - 1))
    earlier = history[place].mean
    assume(earlier is not None and encode(earlier) != encode(mean))
    mine, yours = (
        digests(history),
        digests([*history[:place], replace(history[place], mean=mean), *history[place + 1 :]]),
    )
    assert mine[:place] == yours[:place]
    assert all(one != another for one, another in zip(mine[place:], yours[place:], strict=True))


@given(updates(), st.binary(max_size=16), st.binary(max_size=16))
def test_the_history_before_is_part_of_the_digest(update: Update, one: bytes, other: bytes) -> None:
    """The same round after two histories is not the same history."""
    assert (sealed(update, one).update.digest == sealed(update, other).update.digest) == (one == other)


# What is refused


def test_an_update_for_another_slice_is_refused() -> None:
    """A frame of another length, or presence of other tensors, is refused by name."""
    told = sealed(Update(1, 1, (0,), SparseGradient.empty(9), (True, False)), BEGINNING)
    with pytest.raises(FrameError, match="numel"):
        update_from_message(told.body, encode(SparseGradient.empty(8)), PIECE)
    told.body.presence = b"\xff"
    with pytest.raises(ProtocolError, match="beyond the 2 of this shard"):
        update_from_message(told.body, told.frame, PIECE)


def test_pushes_without_steps_are_refused() -> None:
    """Each arrival is a rank and a step."""
    told = sealed(Update(3, 1, (0,), SparseGradient.empty(9), (True, True), arrivals=((0, 7),)), BEGINNING)
    told.body.arrived.append(1)
    with pytest.raises(ProtocolError, match="2 pushes and 1 steps in version 3"):
        update_from_message(told.body, told.frame, PIECE)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(lambda ranks: ranks != sorted(set(ranks))))
def test_ranks_that_do_not_ascend_are_refused(ranks: list[int]) -> None:
    """Twice the same, or in another order: there is one way to write a membership."""
    with pytest.raises(ProtocolError, match="must ascend"):
        membership_from_message(pb.Membership(epoch=1, ranks=ranks))


@given(updates(), st.data())
def test_a_frame_that_was_cut_is_refused(update: Update, data: st.DataObject) -> None:
    """Half an update is none."""
    assume(update.mean is not None)
    told = sealed(update, BEGINNING)
    with pytest.raises(FrameError):
        update_from_message(told.body, told.frame[: data.draw(st.integers(0, len(told.frame) - 1))], PIECE)
