"""Numbers on which the members agree: appended before they are told, the same for all, and not held up by the dead."""

import math

import pytest
from tests.server.dialogues import CONFIG, Journaled, begin, leave, only, register, say, training

from thresher.protos.consistency import Consistency
from thresher.protos.errors import ProtocolError
from thresher.server import effects, events
from thresher.server.agreeing import OpenAgreement
from thresher.server.events import Worker

LEASE = CONFIG.lease


def agree(rank: int, number: int, **values: float) -> events.Agree:
    return events.Agree(Worker(rank, 1), number, values)


def begun() -> Journaled:
    journal = Journaled(CONFIG)
    journal.keep(begin(journal.shard, 2, Consistency()))
    return journal


def test_members_agree_on_numbers_and_who_asks_again_hears_it_again() -> None:
    """The mean over the members, appended before it is told, also after a restart."""
    journal = begun()
    assert journal.say(agree(0, 0, loss=1.0)) == []
    append, tell = journal.say(agree(1, 0, loss=2.0))
    assert isinstance(append, effects.Append)
    assert isinstance(tell, effects.Tell)
    assert (tell.agreed.number, tell.agreed.values, tell.ranks) == (0, {"loss": 1.5}, (0, 1))
    journal.crash()
    assert journal.say(agree(1, 0, loss=2.0)) == [effects.Tell(tell.agreed, (1,))]
    assert only(effects.Registered, journal.say(register(0))).agreements == 1


def test_an_agreement_does_not_wait_for_who_has_gone() -> None:
    """Whether it left, or was away for longer than its lease."""
    for event, now in ((leave(1), 0.0), (events.Disconnect(Worker(1, 1)), LEASE)):
        shard = training()
        say(shard, agree(0, 0, loss=1.0))
        done = [*say(shard, event), *say(shard, events.Tick(), now)]
        assert only(effects.Tell, done).agreed.values == {"loss": 1.0}


def test_agreements_that_make_no_sense_are_refused() -> None:
    """One ahead of the others, one of other names, one that is forgotten."""
    shard = training()
    with pytest.raises(ProtocolError, match="asks for agreement 1; 0 is next"):
        say(shard, agree(0, 1, loss=1.0))
    say(shard, agree(0, 0, loss=1.0))
    with pytest.raises(ProtocolError, match="all must ask alike"):
        say(shard, agree(1, 0, accuracy=1.0))
    for number in range(70):
        for rank in (0, 1):
            say(shard, agree(rank, number, loss=1.0))
    with pytest.raises(ProtocolError, match="agreement 0, which is forgotten"):
        say(shard, agree(0, 0, loss=1.0))


def test_the_mean_is_that_of_those_who_are_asked_for() -> None:
    """Sums are exact and run in rank order, whoever speaks first; who is not awaited has no weight."""
    one = OpenAgreement()
    for rank, value in ((2, 1e16), (0, 1.0), (1, -1e16), (3, 99.0)):
        one.hear(agree(rank, 0, loss=value))
    agreed = one.conclude((0, 1, 2), 0, 5.0)
    assert agreed is not None
    assert agreed.values == {"loss": 1.0 / 3}
    assert one.conclude((0, 1, 2), 1, 6.0) is None


@pytest.mark.parametrize("said", [(math.inf, -math.inf), (1e308, 1e308), (math.nan, 1.0)])
def test_what_has_no_sum_is_not_a_number(said: tuple[float, float]) -> None:
    """A metric that has diverged is told as one; the run goes on, and so do the agreements."""
    journal = begun()
    journal.say(agree(0, 0, loss=said[0], accuracy=0.5))
    agreed = only(effects.Tell, journal.say(agree(1, 0, loss=said[1], accuracy=0.25))).agreed
    assert math.isnan(agreed.values["loss"])
    assert agreed.values["accuracy"] == 0.375
    journal.say(agree(0, 1, loss=math.inf))
    assert only(effects.Tell, journal.say(agree(1, 1, loss=1.0))).agreed.values == {"loss": math.inf}


def test_an_agreement_is_open_since_the_first_of_the_awaited_asked() -> None:
    """Not while none of them asks, and not any more once it is concluded."""
    one = OpenAgreement()
    one.hear(agree(0, 0, loss=1.0))
    for ranks, now, since in (((1,), 1.0, math.inf), ((0, 1), 2.0, 2.0), ((0, 1), 3.0, 2.0), ((1,), 4.0, math.inf)):
        assert one.conclude(ranks, 0, now) is None
        assert one.since == since
    assert one.conclude((0,), 0, 5.0) is not None
    assert one.since == math.inf
