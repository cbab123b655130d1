"""A test that damages a shard on purpose is told what does not hold."""

from collections.abc import Callable

import pytest
from tests.server.dialogues import close_round, push, say, training

from thresher.protos.update import Membership
from thresher.server.invariants import broken_invariants
from thresher.server.shard import Shard


def damaged(change: Callable[[Shard], object]) -> Shard:
    shard = training()
    close_round(shard, (0, 1), 0)
    say(shard, push(0, 1))
    change(shard)
    return shard


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda shard: shard._state.members.adopt(Membership(1, (1,))), "only members push"),
        (lambda shard: setattr(shard._state.members.seat(0), "settled", 2), "an open push has no verdict"),
        (lambda shard: shard._round.hold(push(1, 5), 0.0), "pushes belong to the open round"),
        (lambda shard: setattr(shard._state.members.seat(1), "settled", 3), "nobody is ahead"),
        (lambda shard: setattr(shard._state.members.seat(1), "version", 2), "nobody knows the future"),
        (lambda shard: setattr(shard._state, "piece", None), "a slice comes with its model"),
        (lambda shard: setattr(shard._feed._log, "version", 5), "the log ends at the version"),
        (lambda shard: setattr(shard._state.replica, "version", 0), "the newest round made the version"),
        (lambda shard: setattr(shard._state, "digest", b""), "a digest comes with a history"),
    ],
)
def test_validate_says_which_invariant_is_broken(change: Callable[[Shard], object], said: str) -> None:
    """In words, each of them."""
    with pytest.raises(AssertionError, match=said):
        damaged(change).validate()


def test_a_whole_shard_breaks_none() -> None:
    """With and without a push that waits."""
    shard = damaged(lambda _: None)
    assert broken_invariants(shard._state, shard._round.waiting, shard._feed.version) == []
