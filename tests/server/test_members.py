"""Who belongs to the run: every refusal names the rank, and where a member stands can be told in a sentence."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import ProtocolError, RegistrationError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.server.events import Register, Worker
from thresher.server.members import Members, MemberState


def request(rank: int, incarnation: int = 1, workers: int = 3, origin: str = "host:1") -> Register:
    layout = Layout((TensorSpec("w", (3,), "float32"),))
    return Register(Worker(rank, incarnation), workers, 0, 1, layout, OptimizerSpec("SGD", ({"lr": 1.0},)), "m", origin)


@given(st.lists(st.sampled_from(list(MemberState)), min_size=1, max_size=6))
def test_present_are_all_that_have_not_left_by_rank(states: list[MemberState]) -> None:
    """The divisor counts who is lost or not yet here: the mean's scale depends on leaves only."""
    members = Members(len(states))
    for member, state in zip(members.all, states, strict=True):
        member.state = state
    assert [member.rank for member in members.present] == [i for i, s in enumerate(states) if s is not MemberState.LEFT]
    assert members.complete == (not {MemberState.WAITED_FOR, MemberState.REGISTERED} & set(states))


def test_a_registration_is_recorded_once() -> None:
    """The first one counts; the same again changes nothing, not even its origin."""
    members = Members(3)
    members.admit(request(1))
    members.admit(request(1, origin="elsewhere"))
    member = members.known(Worker(1, 1))
    assert (member.state, member.origin) == (MemberState.REGISTERED, "host:1")


def test_two_workers_with_one_rank() -> None:
    """The second is refused; the message names the rank, who has it, and what to do."""
    members = Members(3)
    members.admit(request(1, incarnation=1, origin="alpha:10"))
    with pytest.raises(RegistrationError) as caught:
        members.admit(request(1, incarnation=2, origin="beta:20"))
    assert "rank 1 is taken by worker 1 (alpha:10), which is registered" in str(caught.value)
    assert "give beta:20 another" in str(caught.value)


@pytest.mark.parametrize("wrong", [request(0, workers=2), request(3), request(7, workers=3)])
def test_a_wrong_number_of_workers_is_refused(wrong: Register) -> None:
    """A shard and a worker that were started with different numbers never meet in a round."""
    with pytest.raises(RegistrationError, match=r"of \d asks to join a run of 3 workers \(ranks 0 to 2\)"):
        Members(3).admit(wrong)


@pytest.mark.parametrize("worker", [Worker(0, 1), Worker(1, 0), Worker(1, 2), Worker(9, 1)])
def test_a_stranger_is_not_known(worker: Worker) -> None:
    """Neither a rank that never came, nor another life of one that did, nor a rank that does not exist."""
    members = Members(3)
    members.admit(request(1, incarnation=1))
    with pytest.raises(ProtocolError, match=f"worker {worker.rank} is not registered under this incarnation"):
        members.known(worker)


def test_a_rank_that_never_came_is_not_known_by_the_incarnation_zero() -> None:
    """Nobody is let in by guessing the default."""
    with pytest.raises(ProtocolError):
        Members(1).known(Worker(0, 0))


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
    members = Members(2)
    members.admit(replace(request(1), workers=2))
    member = members.all[1]
    member.state, member.lost_at, member.steps = state, 3.0, 4
    assert member.whereabouts(now=10.0) == said
