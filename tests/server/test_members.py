"""Who belongs to the run: every refusal names the rank, and where a member stands can be told in a sentence."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.dialogues import register

from thresher.protos.errors import FencedError, ProtocolError, RegistrationError
from thresher.protos.update import Membership
from thresher.server.events import Register, Verdict, Worker
from thresher.server.members import MOST_RANKS, Member, Members, MemberState

LEASE = 5.0


def admitted(rank: int = 1, *lives: int, workers: int = 3) -> Members:
    members = Members(workers)
    for life in lives or (1,):
        members.admit(Worker(rank, life), f"host:{life}", "")
    return members


@given(st.lists(st.tuples(st.sampled_from(list(MemberState)), st.sampled_from([0.0, 6.0, math.inf])), max_size=6))
def test_wanted_are_all_that_are_here_or_within_their_lease(seats: list[tuple[MemberState, float]]) -> None:
    """The epoch grows exactly where that changes who belongs to the run; who is absent is not awaited."""
    members = Members(3)
    for rank, (state, lost_at) in enumerate(seats):
        member = members.seat(rank)
        member.state, member.lost_at = state, math.inf if state is MemberState.EXCHANGING else lost_at
    before, now = members.membership, 6.0
    gone = {rank for rank, (state, at) in enumerate(seats) if state is not MemberState.EXCHANGING and now - at >= LEASE}
    here = {rank for rank, (state, _) in enumerate(seats) if state is MemberState.EXCHANGING}
    wanted = members.wanted(now, LEASE)
    assert set(wanted.ranks) == ({0, 1, 2} - gone) | here
    assert wanted.epoch == (wanted.ranks != before.ranks)
    assert members.membership == before
    assert {member.rank for member in members.awaited(now, LEASE)} == {0, 1, 2} - gone


def test_who_has_left_is_not_taken_back_by_a_membership_that_had_not_heard_of_it() -> None:
    """Until another life of it comes."""
    members = admitted(1)
    members.seat(1).state = MemberState.LEFT
    members.dismiss(1, decides=False)
    assert members.membership == Membership(0, (0, 2))
    members.adopt(Membership(4, (0, 1, 2)))
    assert members.membership == Membership(4, (0, 2))
    members.admit(Worker(1, 2), "", "")
    members.adopt(Membership(5, (0, 1, 2)))
    assert [member.rank for member in members.counted] == [0, 1, 2]


def test_the_first_shard_counts_a_leave_as_a_change() -> None:
    """The others hear of it from there; one that belonged to the run no more changes nothing."""
    members = admitted(1)
    for _ in range(2):
        members.dismiss(1, decides=True)
        assert members.membership == Membership(1, (0, 2))


def test_members_that_are_missed_have_a_lease_and_have_come() -> None:
    """A lease that runs goes on; who exchanges is not missed."""
    members = admitted(1)
    members.seat(0).state = MemberState.EXCHANGING
    members.miss(4.0)
    members.miss(6.0)
    assert [member.lost_at for member in members] == [math.inf, 4.0, 4.0]
    assert [str(member.state) for member in members] == ["exchanging", "registered", "lost"]
    assert members.complete


def test_a_run_is_complete_once_every_member_has_come() -> None:
    """Who was here and is lost, or comes back under another life, has come."""
    members = Members(2)
    assert not members.complete
    members.seat(0).state = MemberState.EXCHANGING
    members.admit(Worker(1, 1), "", "")
    assert not members.complete
    members.seat(1).lost_at = 3.0
    assert members.complete


@pytest.mark.parametrize("wrong", [register(0, workers=2), register(2, workers=4)])
def test_a_wrong_number_of_workers_is_refused(wrong: Register) -> None:
    """Of those the run began with; a shard and a worker that were started with different numbers never meet."""
    with pytest.raises(RegistrationError, match=r"of \d asks to join a run that began with 3 workers"):
        Members(3).check_admission(wrong, 3)


def test_a_run_that_has_begun_goes_on_with_any_number_of_workers() -> None:
    """Once a push has its verdict, all may be started again with another number."""
    members = Members(3)
    members.seat(1).settle(0, 7, Verdict.APPLIED)
    members.check_admission(register(0, workers=2), 3)


def test_where_nobody_announced_a_number_all_may_come_with_another_one() -> None:
    """Those of a group that was started again before its first round; none makes the shard keep more than it can."""
    Members(2).check_admission(register(0, workers=4), 0)
    with pytest.raises(RegistrationError, match="worker 0 of 65537 cannot join: 65536 are the most"):
        Members(0).check_admission(register(0, workers=MOST_RANKS + 1), 0)


def test_who_was_told_another_number_than_one_that_exchanges_is_refused() -> None:
    """Each would take another share of the data. Who does not exchange may be of a group that is gone."""
    members = admitted(1, workers=3)
    members.seat(0).among = members.seat(1).among = 3
    members.check_admission(register(2, workers=4), 0)
    members.seat(1).state = MemberState.EXCHANGING
    members.check_admission(register(2, workers=3), 0)
    members.check_admission(register(1, workers=4), 0)
    with pytest.raises(
        RegistrationError, match=r"worker 2 was told that it is one of 4, worker 1 .*one of 3; start all"
    ):
        members.check_admission(register(2, workers=4), 0)
    members.check_admission(register(3, workers=4), 3)  # a further one, where shards know how many begin
    members.seat(0).settle(0, 7, Verdict.APPLIED)
    members.check_admission(register(2, workers=4), 0)


def test_members_beyond_a_smaller_group_have_a_lease() -> None:
    """Whether they never came or came without exchanging; who exchanges stays, and a lease that runs goes on."""
    members = admitted(1, workers=5)
    members.seat(4).state = MemberState.EXCHANGING
    members.seat(3).lost_at = 2.0
    members.expect(2, 3.0)
    members.expect(2, 7.0)
    assert [member.lost_at for member in members] == [math.inf, math.inf, 3.0, 2.0, math.inf]
    assert [member.rank for member in members.awaited(3.0 + LEASE, LEASE)] == [0, 1, 4]


def test_a_further_rank_may_join() -> None:
    """The run grows, whatever number of workers the newcomer was told."""
    Members(3).check_admission(register(7, workers=8), 3)


def test_a_rank_is_bounded() -> None:
    """A shard keeps a record of each, so the largest rank says how much a worker can make it keep."""
    Members(3).check_admission(register(MOST_RANKS - 1, workers=8), 3)
    with pytest.raises(RegistrationError, match="worker 65536 cannot join: ranks are below 65536; give it another"):
        Members(3).check_admission(register(MOST_RANKS, workers=8), 3)


@pytest.mark.parametrize(
    "absurd", [Membership(2**64 - 1, (0,)), Membership(70_000, (0,)), Membership(1, (0, 2**32 - 1))]
)
def test_a_membership_that_no_shard_would_say_is_refused(absurd: Membership) -> None:
    """It comes with a push: such an epoch would outdo all that the first shard ever says, such a rank take memory."""
    members = Members(3)
    before = list(members)
    with pytest.raises(ProtocolError, match=r"membership \d+ is told; here it is 0|rank \d+ in a membership"):
        members.adopt(absurd)
    assert members.membership == Membership(0, (0, 1, 2))
    assert list(members) == before


@pytest.mark.parametrize("worker", [Worker(0, 1), Worker(1, 0), Worker(1, 2), Worker(9, 1), Worker(0, 0)])
def test_a_stranger_is_not_known(worker: Worker) -> None:
    """Neither a rank that never came, also by the default incarnation, nor a life that was never let in."""
    with pytest.raises(ProtocolError, match=f"worker {worker.rank} is not registered under this incarnation"):
        admitted(1, 1).known(worker)


def test_an_earlier_life_is_fenced() -> None:
    """The message names the rank, who has it, and what to do; it is not let in again either."""
    members = admitted(1, 1, 2)
    assert members.known(Worker(1, 2)).origin == "host:2"
    for refused in (lambda: members.known(Worker(1, 1)), lambda: members.check_admission(register(1, workers=3), 3)):
        with pytest.raises(
            FencedError, match=r"worker 1 was replaced by worker 1 \(host:2\): .* Give this one another"
        ):
            refused()
    members.check_admission(replace(register(1, workers=3), worker=Worker(1, 2)), 3)


def test_a_rank_remembers_the_last_of_its_lives() -> None:
    """Their number is bounded; one that is forgotten is a stranger."""
    members = admitted(1, *range(1, 20))
    assert members.seat(1).retired == list(range(3, 19))
    with pytest.raises(ProtocolError, match="is not registered"):
        members.known(Worker(1, 1))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (MemberState.WAITED_FOR, "worker 1 (host:1) has never registered"),
        (MemberState.REGISTERED, "worker 1 (host:1) has registered but not begun to exchange"),
        (MemberState.EXCHANGING, "worker 1 (host:1) is connected but has not pushed, after 4 steps"),
        (MemberState.LOST, "worker 1 (host:1) lost its connection 7.0 s ago, after 4 steps"),
    ],
)
def test_whereabouts_say_why_a_round_waits(state: MemberState, said: str) -> None:
    """One sentence for each state that a round can wait for."""
    member = Member(1, state=state, origin="host:1", lost_at=3.0, steps=4)
    assert member.whereabouts(now=10.0) == said
