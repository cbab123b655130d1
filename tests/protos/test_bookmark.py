"""Bookmarks: they come back from the wire, and a place is one for all, whoever was a step ahead when it changed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.bookmark import Bookmark, bookmark_from_message, bookmark_to_message, furthest
from thresher.protos.errors import ProtocolError
from thresher.v1 import aggregation_pb2 as pb

counts = st.integers(0, 2**31)
shares = st.lists(st.tuples(st.integers(1, 2**31), counts), min_size=1, max_size=4).map(tuple)
bookmarks = st.builds(
    lambda first, more, passes, begun, dealt, asked: Bookmark(first + more, passes, begun, first, dealt, asked),
    counts, counts, counts, st.integers(1, 2**31), shares, counts,
)  # fmt: skip


@given(bookmarks)
def test_what_is_read_is_what_was_written(bookmark: Bookmark) -> None:
    """Every field."""
    assert bookmark_from_message(bookmark_to_message(bookmark)) == bookmark


@pytest.mark.parametrize(
    "wrong",
    [
        {"begun": 0},
        {"shares": []},
        {"shares": [pb.Share(workers=0, taken=3)]},
        {"pass_step": 8},
    ],
    ids=["no pass", "no shares", "shares of nobody", "a pass that begins later"],
)
def test_what_is_no_place_is_refused(wrong: dict[str, object]) -> None:
    """Nobody could go on there."""
    fields: dict[str, object] = {"step": 7, "begun": 1, "pass_step": 2, "shares": [pb.Share(workers=2, taken=3)]}
    assert bookmark_from_message(pb.Bookmark(**fields)).step == 7  # type: ignore[arg-type] # of the right types
    with pytest.raises(ProtocolError, match="a bookmark in pass"):
        bookmark_from_message(pb.Bookmark(**fields | wrong))  # type: ignore[arg-type] # of the right types


@given(bookmarks, st.integers(1, 9))
def test_a_pass_is_dealt_anew_once(bookmark: Bookmark, workers: int) -> None:
    """What was taken stays; for the same number nothing changes."""
    anew = bookmark.dealt_for(workers)
    assert (anew.workers, anew.dealt_for(workers)) == (workers, anew)
    assert anew.shares[: len(bookmark.shares)] == bookmark.shares
    assert replace(anew, shares=bookmark.shares) == bookmark


@given(bookmarks, st.integers(1, 3), st.integers(1, 9))
def test_a_step_on_its_way_counts_as_one_that_is_made_behind_the_change(
    before: Bookmark, batches: int, workers: int
) -> None:
    """In whichever dealing its worker says where it is, it comes to the place of those who make it afterwards."""
    (dealt_for, taken) = before.shares[-1]
    on_its_way = replace(before, step=before.step + 1, shares=(*before.shares[:-1], (dealt_for, taken + batches)))
    begin = before.dealt_for(workers)
    *earlier, (_, already) = begin.shares
    afterwards = replace(begin, step=begin.step + 1, shares=(*earlier, (workers, already + batches)))
    assert on_its_way.redealt(before, workers) == afterwards
    assert afterwards.redealt(before, workers) == afterwards


def test_a_step_on_its_way_in_the_next_pass() -> None:
    """That pass is dealt for the new number from its first batch on."""
    before = Bookmark(8, 1, 1, 0, ((2, 8),))
    assert Bookmark(9, 2, 1, 8, ((2, 1),)).redealt(before, 3) == Bookmark(9, 2, 1, 8, ((3, 1),))


def test_without_a_place_before_it_a_step_counts_as_it_was_dealt() -> None:
    """A shard that was refilled has not been told yet."""
    assert Bookmark(9, 0, 1, 0, ((2, 9),)).redealt(None, 3) == Bookmark(9, 0, 1, 0, ((2, 9), (3, 0)))


@given(st.lists(bookmarks | st.none(), max_size=4), bookmarks | st.none())
def test_nobody_calls_the_others_back(told: list[Bookmark | None], before: Bookmark | None) -> None:
    """The furthest place counts; where nobody tells, the one before stays."""
    found = furthest(told, before)
    places = [place for place in [before, *told] if place is not None]
    assert (found is None) == (not places)
    assert found is None or (found in places and found.step == max(place.step for place in places))
    assert furthest([None], before) == before


def test_of_two_the_one_that_knows_of_the_change_counts() -> None:
    """The other one was sent by a life that was dealt to as before."""
    before, old, new = (
        Bookmark(step, 1, 1, 0, dealt) for step, dealt in [(4, ((2, 4),)), (5, ((2, 5),)), (5, ((3, 1),))]
    )
    assert furthest([old, new, old], before) == new
    assert furthest([new, old], before) == new
