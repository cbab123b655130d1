"""Bookmarks: the furthest place is one for all."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tests.protos.bookmarks import bookmarks

from thresher.protos.bookmark import Bookmark, furthest


@given(bookmarks, st.integers(1, 9))
def test_a_pass_is_dealt_anew_once(bookmark: Bookmark, workers: int) -> None:
    """What was taken stays; for the same number nothing changes."""
    anew = bookmark.dealt_for(workers)
    assert (anew.workers, anew.dealt_for(workers)) == (workers, anew)
    assert anew.shares[: len(bookmark.shares)] == bookmark.shares
    assert replace(anew, shares=bookmark.shares, since=bookmark.since) == bookmark
    assert anew.since == (bookmark.since if workers == bookmark.workers else bookmark.step)


@given(st.lists(bookmarks | st.none(), max_size=4), bookmarks | st.none())
def test_nobody_calls_the_others_back(told: list[Bookmark | None], before: Bookmark | None) -> None:
    """The furthest place counts; where nobody tells, the one before stays."""
    found = furthest(told, before)
    places = [place for place in [before, *told] if place is not None]
    assert (found is None) == (not places)
    assert found is None or (found in places and found.step == max(place.step for place in places))
    assert furthest([None], before) == before


def test_of_two_that_are_equally_far_the_first_one_counts() -> None:
    """So it does not matter who came first, however the pass was dealt."""
    before, one, other = (
        Bookmark(step, 1, 1, 0, dealt) for step, dealt in [(4, ((2, 4),)), (5, ((2, 5),)), (5, ((3, 1),))]
    )
    assert furthest([one, other], before) == one
    assert furthest([None, other, one], before) == other
    in_the_next_pass = Bookmark(5, 2, 1, 4, ((2, 1),))
    assert furthest([one, in_the_next_pass], before) == in_the_next_pass


def test_where_the_data_are_is_what_says_which_come_next() -> None:
    """Whatever else the loops have counted; and of one dealing are those whose passes begin alike."""
    place = Bookmark(5, 1, 1, 2, ((2, 3),), 4)
    assert place.data == replace(place, passes=0, begun=3, agreements=9).data
    others = [replace(place, **changed) for changed in ({"step": 6}, {"pass_step": 3}, {"shares": ((2, 2),)})]
    assert all(other.data != place.data and other.dealing == place.dealing for other in others)
    anew = place.dealt_for(3)
    assert (anew.dealing, anew.dealt_for(2).dealing, anew.data == place.data) == ((5, 3), (5, 2), False)
