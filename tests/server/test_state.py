"""What a shard must never forget: it changes by records only, and a checkpoint holds all of it."""

from dataclasses import replace

import pytest
import torch
from tests.server.dialogues import CONFIG, LAYOUT, Journaled, begin, close_round, lasting, leave, push, register

from thresher.protos.bookmark import Bookmark
from thresher.protos.consistency import Consistency
from thresher.protos.errors import DataLossError, ProtocolError
from thresher.protos.replica import PARAMETERS
from thresher.protos.sealed import sealed
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Update
from thresher.server import events
from thresher.server.events import Verdict, Worker
from thresher.server.facts import Admitted, Agreed, Closed, Contribution, Departed, Opened, Returned
from thresher.server.state import RunState


def opened(consistency: Consistency = Consistency()) -> RunState:  # noqa: B008 - it is frozen
    state = RunState(7, 2)
    state.fold(Opened(9, register(0, consistency=consistency)))
    state.fold(Admitted(Worker(0, 1), "host:0", "host:9100"))
    return state


def seeded(consistency: Consistency = Consistency()) -> RunState:  # noqa: B008 - it is frozen
    state = opened(consistency)
    state.seed({PARAMETERS: torch.zeros(4)}, {"bn.mean": torch.ones(2)})
    return state


def closed(version: int, step: int = 0, membership: Membership | None = None, digest: bytes = b"") -> Closed:
    mean, place = SparseGradient.dense(torch.ones(4)), Bookmark(version, 1, 1, 0, ((2, version),))
    update = Update(version, 2, (0,), mean, (True, True), arrivals=((0, step),), membership=membership, bookmark=place)
    one = Contribution(0, step, 55, 100, 4, 0, heard=True)
    return Closed(sealed(update, digest), (one,), 0.25, 1.0, 0.5, ((0, 40),))


def kept_back(round_: Closed, residual_squared: float, *, forgot: bool) -> Closed:
    """The same round, with what its pusher keeps back, or that it has forgotten."""
    (one,) = round_.contributions
    return replace(round_, contributions=(replace(one, residual_squared=residual_squared, forgot=forgot),))


def test_nothing_is_known_before_the_first_registration() -> None:
    """A slice, an optimizer, a snapshot: protocol errors."""
    state = RunState(7, 2)
    assert (state.version, state.phase, state.agreed) == (0, "waiting for workers", 0)
    for look in (lambda: state.slice, lambda: state.spec, state.snapshot):
        with pytest.raises(ProtocolError):
            look()


def test_the_first_registration_names_the_run() -> None:
    """Also when it is read back by a process that was given another number."""
    state = opened()
    assert (state.run, state.slice) == (9, LAYOUT.shard_slice(0, 1))


def test_a_closed_round_is_applied_and_counted() -> None:
    """Model, digest, the pusher's seat, bytes in both directions, verdicts."""
    state = seeded()
    state.fold(closed(1, membership=Membership(3, (0,))))
    seat = state.members.seat(0)
    assert state.snapshot().tensors[PARAMETERS].tolist() == [-1.0] * 4
    assert (state.version, state.digest) == (1, closed(1, membership=Membership(3, (0,))).sealed.update.digest)
    assert (seat.settled, seat.content, seat.verdict, seat.steps) == (1, 55, Verdict.APPLIED, 1)
    assert (seat.push_bytes, seat.pull_bytes, seat.density) == (100, 40, 1.0)
    assert (state.verdicts[Verdict.APPLIED], state.residual_squared_total) == (1, 1.0)
    assert state.members.membership == Membership(3, (0,))
    assert state.bookmark == Bookmark(1, 1, 1, 0, ((2, 1),))


@pytest.mark.parametrize("version", [0, 2, 5])
def test_a_round_that_does_not_follow_is_refused(version: int) -> None:
    """A hole in the log is never jumped over."""
    state = seeded()
    before = lasting(state)
    with pytest.raises(ProtocolError, match="cannot follow version 0"):
        state.fold(closed(version))
    assert lasting(state) == before


def test_a_round_before_the_seed_is_refused() -> None:
    """There is nothing to apply it to."""
    with pytest.raises(ProtocolError, match="before the shard was seeded"):
        opened().fold(closed(1))


def test_a_returned_push_consumes_its_step_and_changes_no_model() -> None:
    """Its step has its verdict, and it is no push that was applied."""
    state = seeded()
    state.fold(Returned(1, 4, 77))
    seat = state.members.seat(1)
    assert (seat.settled, seat.content, seat.verdict, seat.steps) == (5, 77, Verdict.RETURNED, 0)
    assert state.snapshot().tensors[PARAMETERS].tolist() == [0.0] * 4


def test_who_departs_leaves_what_it_had_not_sent_and_its_buffers() -> None:
    """Abandoned residuals are booked, not forgotten."""
    state = seeded()
    for rank in (0, 1):
        state.fold(Departed(rank, 2.5, {"bn.mean": torch.full((2,), 3.0)} if rank == 0 else {}))
    assert (state.abandoned_squared_total, state.phase) == (5.0, "finished")
    assert state.untrained["bn.mean"].tolist() == [3.0, 3.0]


def test_what_a_worker_had_kept_back_is_booked_when_it_has_forgotten_it() -> None:
    """As it was told with the push before; once, and not what it takes with it when it leaves. A mean tells nothing."""
    state = seeded()
    for version, (residual_squared, forgot) in enumerate([(4.0, False), (1.0, True), (2.0, False)], start=1):
        state.fold(kept_back(closed(version, digest=state.digest), residual_squared, forgot=forgot))
    assert state.lost_squared_total == 4.0
    assert RunState.restored(state.table(), state.tensors()).lost_squared_total == 4.0
    state.fold(Departed(0, 2.0))
    state.fold(kept_back(closed(4, digest=state.digest), 0.0, forgot=True))
    assert state.lost_squared_total == 4.0


def test_agreements_are_kept_as_long_as_somebody_may_ask_again() -> None:
    """The newest 64."""
    state = seeded()
    for number in range(100):
        state.fold(Agreed(number, {"loss": 1.0 / (number + 1)}))
    assert (state.agreed, sorted(state.agreements)) == (100, list(range(36, 100)))


@pytest.mark.parametrize("downlink", ["updates", "shadow"])
def test_a_checkpoint_holds_everything(downlink: str) -> None:
    """Restored it is the same, bit for bit, and goes on the same."""
    state = seeded(Consistency("async", downlink=downlink))  # type: ignore[arg-type]
    for record in (
        Admitted(Worker(0, 2), "", ""), Admitted(Worker(5, 1), "other:1", ""),
        closed(1, membership=Membership(1, (0, 5))),
        Returned(5, 0, 3), Agreed(0, {"b": 1.0, "a": 2.0}), Departed(5, 1.0),
    ):  # fmt: skip
        state.fold(record)
    twin = RunState.restored(state.table(), state.tensors())
    assert lasting(twin) == lasting(state)
    for one in (state, twin):
        one.fold(closed(2, step=1, digest=state.members.seat(0).origin.encode()))
        one.fold(Admitted(Worker(5, 2), "again:1", ""))
    assert lasting(twin) == lasting(state)
    assert twin.members.seat(0).retired == [1]


def test_a_checkpoint_is_a_copy() -> None:
    """It is written while training goes on."""
    state = seeded()
    before = state.tensors()
    state.fold(closed(1))
    assert before[PARAMETERS].tolist() == [0.0] * 4


@pytest.mark.parametrize("damage", ["table", "tensors", "nothing"])
def test_a_checkpoint_that_cannot_be_read_is_data_loss(damage: str) -> None:
    """Never a silently wrong model; the journal takes the checkpoint before it."""
    state = seeded()
    table, tensors = state.table(), state.tensors()
    if damage == "table":
        table = b"\xff" + table[:-3]
    elif damage == "tensors":
        tensors[PARAMETERS] = torch.zeros(3)
    else:
        table = b""
    with pytest.raises(DataLossError, match="a checkpoint cannot be read"):
        RunState.restored(table, tensors)


def test_the_live_state_changes_by_records_only() -> None:
    """What is refused or repeated is nowhere in it: not even in its counts."""
    journal = Journaled(CONFIG)
    journal.keep(begin(journal.shard, 2, Consistency()))
    close_round(journal.shard, [0], 0)
    before = lasting(journal.shard._state)
    for event in (push(0, 0), push(0, 0, 5.0), push(0, 9), events.Tick(), events.Disconnect(Worker(1, 1))):
        assert not [effect for effect in journal.say(event) if hasattr(effect, "record")]
    assert lasting(journal.shard._state) == before
    journal.say(leave(1))
    journal.check_replay()
    assert lasting(journal.shard._state) != before
