"""What workers are told, and the guard of the history: nobody goes on from another past in silence."""

import pytest
from tests.server.dialogues import NUMEL, close_round, hello, history_of, only, push, register, say, training

from thresher.protos.consistency import Consistency
from thresher.protos.errors import BehindError, DataLossError, LostHistoryError
from thresher.server import effects
from thresher.server.events import History
from thresher.server.feed import Feed
from thresher.server.shard import Shard


def at(version: int, consistency: Consistency = Consistency()) -> Shard:  # noqa: B008 - it is frozen
    shard = training(2, consistency)
    for step in range(version):
        close_round(shard, (0, 1), step)
    return shard


def feed_of(shard: Shard) -> Feed:
    return Feed(shard._state, 1 << 20)


def test_a_feed_begins_with_the_newest_round() -> None:
    """After a recovery the log in memory is short: one behind is told, two behind need a snapshot."""
    feed = feed_of(at(3))
    assert (feed.version, [one.update.version for one in feed.since(2)], feed.since(3)) == (3, [3], ())
    with pytest.raises(BehindError):
        feed.since(1)


@pytest.mark.parametrize("version", [0, 2])
def test_equal_histories_and_unknown_ones_are_welcome(version: int) -> None:
    """Who has been told nothing has no past that could differ."""
    shard = at(version)
    for there in (History(), History(7), history_of(shard)):
        feed_of(shard).check(there, "worker 1")


@pytest.mark.parametrize(
    ("there", "error", "said"),
    [
        (History(8), LostHistoryError, "worker 1 was told of run 8; the shard is in run 7: it has lost its state"),
        (History(7, 3), LostHistoryError, "told of version 3; the shard is at 2: it lost the end of its log"),
        (History(7, 2, b"x" * 16), DataLossError, "different histories up to version 2"),
    ],
)
def test_other_histories_are_told_apart(there: History, error: type[Exception], said: str) -> None:
    """What can be refilled, and what cannot."""
    with pytest.raises(error, match=said):
        feed_of(at(2)).check(there, "worker 1")


def test_shards_that_differ_in_one_bit_have_different_digests() -> None:
    """The digest chains everything that was applied; equal rounds after that do not hide it."""
    one, other = at(1), training()
    close_round(other, (0, 1), 0, value=1.0000001)
    for shard in (one, other):
        close_round(shard, (0, 1), 1)
    with pytest.raises(DataLossError, match="different histories"):
        feed_of(one).check(history_of(other), "worker 1")


def test_updates_go_to_all_that_are_connected() -> None:
    """Also to who waits to be let in: it follows."""
    shard = training()
    say(shard, register(4))
    say(shard, hello(4))
    assert only(effects.Publish, close_round(shard, (0, 1), 0)).ranks == (0, 1, 4)


def test_a_shadow_is_told_in_one_from_where_the_reader_is() -> None:
    """Versions merge; a reader that has everything lacks nothing."""
    shard = training(2, Consistency("async", downlink="shadow"))
    for step in range(2):
        say(shard, push(0, step))
    feed = feed_of(shard)
    (missed,) = feed.since(0)
    assert missed.update.assignments is not None
    assert (missed.update.assigned_versions, missed.update.assignments.count, feed.since(2)) == (2, NUMEL, ())
