"""Any order of events, of crashes and of recoveries, in every mode, against `tests/server/reference.py`."""

import math
from dataclasses import replace
from typing import Any, Final

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.server.dialogues import (
    ASYNC,
    NUMEL,
    SSP,
    only,
    parameters,
    push,
    register,
    seed,
)
from tests.server.reference import RANKS, Reference

from thresher.protos.consistency import Consistency
from thresher.protos.errors import DataLossError, FencedError, LostHistoryError, ProtocolError, RoundFailedError
from thresher.protos.optimizers import OptimizerSpec
from thresher.server import effects, events
from thresher.server.events import History, Verdict, Worker
from thresher.server.facts import Returned

MODES: Final = [
    Consistency(),
    Consistency(downlink="shadow", shadow_threshold=1.0),
    Consistency(quorum=2, grace=1.0),
    SSP,
    ASYNC,
    Consistency("async", max_staleness=2, downlink="shadow", shadow_threshold=1.0),
]
PLAIN: Final = OptimizerSpec("SGD", ({"lr": 1.0},))
ranks = st.integers(0, RANKS - 1)
rarely = st.sampled_from([False, False, False, False, True])
WRONG: Final[list[dict[str, Any]]] = [
    {"step": 1 << 40}, {"version": 1 << 40}, {"presence": (True,)}, {"next_threshold": math.nan},
]  # fmt: skip
values = st.lists(st.integers(-4, 4), min_size=NUMEL, max_size=NUMEL) | st.none()


def act(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


def often(times: int, one: st.SearchStrategy[Any]) -> list[st.SearchStrategy[Any]]:
    return [one] * times


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    return st.sampled_from([one for times, one in choices for _ in range(times)]).flatmap(lambda one: one)


# One strategy, and not a rule for each: hypothesis leaves out many rules in a run, and little happens then.
acts = weighted(
    (
        8,
        act(
            "push",
            rank=ranks,
            gradient=values,
            behind=st.sampled_from([0, 0, 0, 1, 3]),
            lost=st.booleans(),
            cut=st.booleans(),
        ),
    ),
    (6, act("all_who_are_here_push", gradients=st.lists(values, min_size=RANKS, max_size=RANKS))),
    (4, act("push_again", rank=ranks, conflicting=rarely, back=st.sampled_from([0, 0, 1, 2]), lost=rarely)),
    (1, act("push_what_is_rejected", rank=ranks, wrong=st.sampled_from(WRONG))),
    (2, act("register", rank=ranks, fresh=st.booleans())),
    (3, act("hello", rank=ranks)),
    (4, act("all_come_back")),
    (1, act("hello_with_another_history", rank=ranks, wrong=st.sampled_from(["run", "version", "digest"]))),
    (1, act("an_earlier_life_speaks", rank=ranks, back=st.integers(1, 2))),
    (1, act("a_stranger_speaks", rank=ranks, life=st.sampled_from([0, 99]))),
    (2, act("seed", value=st.integers(-2, 2))),
    (1, act("leave", rank=ranks, last=rarely)),
    (2, act("disconnect", rank=ranks)),
    (4, act("agree", rank=ranks, value=st.integers(-8, 8), off=st.sampled_from([0, 0, 0, -1, 1]))),
    (4, act("tick", seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0, 6.0]))),
    (2, act("one_asks_where_others_push", asking=ranks)),
    (1, act("abort", rank=ranks, really=rarely)),
    (2, act("crash", checkpoint=st.integers(0, 3), seconds=st.sampled_from([0.0, 100.0]))),
)


class ShardMachine(Reference, RuleBasedStateMachine):
    @initialize(mode=st.sampled_from(MODES), begun=rarely.map(lambda late: not late))
    def begin(self, mode: Consistency, *, begun: bool) -> None:
        self.start(mode)
        if begun:
            for rank in self.members:
                self.register(rank, fresh=True)
            self.seed(1)
            for rank in self.members:
                self.hello(rank)

    # Events

    @precondition(lambda self: not self.failed)
    @rule(act=acts)
    def somebody_acts(self, act: tuple[str, dict[str, Any]]) -> None:
        name, arguments = act
        getattr(self, name)(**arguments)

    def all_who_are_here_push(self, gradients: list[list[int] | None]) -> None:
        for rank in sorted(self.here()):
            self.push(rank, gradients[rank], behind=0, lost=False, cut=False)

    def one_asks_where_others_push(self, asking: int) -> None:
        self.all_come_back()
        for rank in sorted(self.here() - {asking}):
            self.push(rank, None, behind=0, lost=False, cut=False)
        self.agree(asking, 1, off=0)
        self.tick(0.0)

    def all_come_back(self) -> None:
        for rank, seat in enumerate(self.seats):
            if seat.state in ("registered", "lost"):
                self.hello(rank)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        done = self.tell(events.Tick())
        self.conclude(done)
        self.let_in_alone()
        self.cross(done)

    def register(self, rank: int, *, fresh: bool) -> None:
        seat = self.seats[rank]
        life = seat.life + 1 if fresh or not seat.life else seat.life
        event = register(rank, life, optimizer=PLAIN, consistency=self.mode)
        if life == seat.life:
            answer = only(effects.Registered, self.unchanged(event))
        else:
            answer = only(effects.Registered, self.tell(event))
            if seat.life:
                seat.lost_at = min(seat.lost_at, self.now)
            seat.life, seat.state = life, "registered"
        assert (answer.settled, answer.in_open_round) == (seat.settled, seat.waiting is not None)
        assert (answer.verdict, answer.agreements) == (seat.verdict, len(self.agreed))
        assert set(answer.membership.ranks) == self.members

    def an_earlier_life_speaks(self, rank: int, back: int) -> None:
        life = self.seats[rank].life - back
        if life < 1:
            return
        worker = Worker(rank, life)
        for event in (
            register(rank, life, optimizer=PLAIN, consistency=self.mode),
            events.Hello(worker, History()),
            replace(push(rank, self.version), worker=worker),
            events.Agree(worker, 0, {"loss": 1.0}),
            events.Leave(worker),
            events.Disconnect(worker),
        ):
            self.refused(event, FencedError)

    def a_stranger_speaks(self, rank: int, life: int) -> None:
        worker = Worker(rank, life)
        for event in (replace(push(rank, 0), worker=worker), events.Leave(worker), events.Abort(worker, "no")):
            self.refused(event, ProtocolError)

    def seed(self, value: int) -> None:
        if not self.seats[0].life:
            return
        event = replace(seed(values=float(value)), worker=Worker(0, self.seats[0].life))
        if self.model is None:
            assert only(effects.Seeded, self.tell(event)).accepted
            self.model = torch.full((NUMEL,), float(value))
            self.follower, self.folded = self.journal.replayed(), len(self.journal.records)
        else:
            assert not only(effects.Seeded, self.unchanged(event)).accepted

    def hello(self, rank: int) -> None:
        seat, here = self.seats[rank], self.journal.shard._state.history
        event = events.Hello(Worker(rank, seat.life), here)
        if not seat.life:
            self.refused(event, ProtocolError)
        elif seat.state == "left":
            assert self.unchanged(event) == [effects.Backlog(())]
        else:
            seat.state, seat.lost_at = "exchanging", math.inf
            assert only(effects.Backlog, self.tell(event)).updates == ()
            self.let_in_alone()

    def hello_with_another_history(self, rank: int, wrong: str) -> None:
        seat, here = self.seats[rank], self.journal.shard._state.history
        if not seat.life or not self.version:
            return
        there = {
            "run": replace(here, run=here.run + 1),
            "version": replace(here, version=here.version + 1),
            "digest": replace(here, digest=bytes(16)),
        }[wrong]
        self.refused(
            events.Hello(Worker(rank, seat.life), there), DataLossError if wrong == "digest" else LostHistoryError
        )

    def push(self, rank: int, gradient: list[int] | None, behind: int, *, lost: bool, cut: bool) -> None:
        """The next step of a worker; ``behind`` is how many versions ago it was computed.

        In lockstep a worker that was ``cut`` from this shard only has followed it beyond its step.
        """
        seat = self.seats[rank]
        version = max(0, self.version - behind)
        step = max(seat.settled, version) if self.mode.lockstep else seat.settled
        version = (max(step, self.version) if cut and step < self.version else step) if self.mode.lockstep else version
        event = replace(
            push(rank, step, gradient), worker=Worker(rank, seat.life), version=version, lost=lost and gradient is None
        )
        if seat.state != "exchanging" or self.model is None:
            self.refused(event, ProtocolError)
        elif seat.waiting is not None:
            self.push_while_one_waits(event, seat.waiting)
        elif self.mode.lockstep and step > self.version:  # the open round returned its push before it was let in
            assert only(effects.Judged, self.unchanged(event)).verdict is Verdict.REJECTED
        elif self.is_returned(rank, event):
            self.settle(rank, event, Verdict.RETURNED)
            done = self.tell(event)
            assert only(effects.Judged, done).verdict is Verdict.RETURNED
            assert isinstance(done[0], effects.Append)
            assert isinstance(done[0].record, Returned)
        else:
            seat.waiting = event
            self.opened_at = self.opened_at if self.order else self.now
            self.order.append(rank)
            self.tell(event)

    def push_while_one_waits(self, event: events.Push, waiting: events.Push) -> None:
        same = event.step == waiting.step and (event.lost or event.content == waiting.content)
        verdict = only(effects.Judged, self.unchanged(event)).verdict
        assert verdict is (Verdict.DUPLICATE if same else Verdict.REJECTED)

    def is_returned(self, rank: int, event: events.Push) -> bool:
        if self.mode.lockstep:
            return event.step < self.version or rank not in self.members
        return bool(self.mode.max_staleness) and self.version - event.version > self.mode.max_staleness

    def push_again(self, rank: int, *, conflicting: bool, back: int, lost: bool) -> None:
        """What has its verdict keeps it, whichever life repeats it."""
        seat = self.seats[rank]
        if seat.last is None or seat.state != "exchanging" or back > seat.last.step:
            return
        event = replace(
            seat.last,
            worker=Worker(rank, seat.life),
            step=seat.last.step - back,
            content=seat.last.content + conflicting,
            lost=lost,
        )
        expected = Verdict.APPLIED if back else seat.verdict
        if conflicting and not back and not lost:
            expected = Verdict.REJECTED
        assert only(effects.Judged, self.unchanged(event)).verdict is expected

    def push_what_is_rejected(self, rank: int, wrong: dict[str, Any]) -> None:
        seat = self.seats[rank]
        if seat.state != "exchanging" or seat.waiting is not None or self.model is None:
            return
        step = self.version if self.mode.lockstep else seat.settled
        if step < seat.settled:
            return
        right = replace(push(rank, step), worker=Worker(rank, seat.life), version=self.version)
        event = replace(right, **wrong)
        assert only(effects.Judged, self.unchanged(event)).verdict is Verdict.REJECTED

    def leave(self, rank: int, *, last: bool) -> None:
        if self.here() <= {rank} and not last:
            return
        seat = self.seats[rank]
        event = events.Leave(Worker(rank, seat.life))
        if not seat.life or seat.waiting is not None:
            self.refused(event, ProtocolError)
        elif seat.state == "left":
            only(effects.Left, self.unchanged(event))
        else:
            seat.state = "left"
            self.members -= {rank}
            self.conclude(self.tell(event))
            self.let_in_alone()

    def disconnect(self, rank: int) -> None:
        seat = self.seats[rank]
        event = events.Disconnect(Worker(rank, seat.life))
        if not seat.life:
            self.refused(event, ProtocolError)
        elif seat.state == "exchanging":
            assert self.tell(event) == []
            seat.state, seat.lost_at = "lost", self.now
        else:
            assert self.unchanged(event) == []

    def agree(self, rank: int, value: int, off: int) -> None:
        seat, number = self.seats[rank], len(self.agreed) + off
        event = events.Agree(Worker(rank, seat.life), number, {"loss": float(value)})
        if not seat.life or off == 1 or number < 0:
            if number >= 0:
                self.refused(event, ProtocolError)
        elif off == -1:
            told = only(effects.Tell, self.unchanged(event))
            assert (told.agreed.values, told.ranks) == ({"loss": self.agreed[number]}, (rank,))
        else:
            self.said[rank] = value, seat.life
            self.conclude(self.tell(event))

    def abort(self, rank: int, *, really: bool) -> None:
        seat = self.seats[rank]
        if not really or self.version < 3 or not seat.life or seat.state == "left":
            return
        assert (
            "no memory"
            in only(
                effects.Failed, self.journal.say(events.Abort(Worker(rank, seat.life), "no memory"), self.now)
            ).reason
        )
        self.failed = True

    @precondition(lambda self: self.failed)
    @rule(rank=ranks)
    def nothing_happens_after_a_failure(self, rank: int) -> None:
        worker = Worker(rank, self.seats[rank].life)
        for event in (
            register(rank, 1 << 20, optimizer=PLAIN, consistency=self.mode),
            events.Hello(worker, History()),
            replace(push(rank, self.version), worker=worker),
        ):
            self.refused(event, RoundFailedError)
        assert self.unchanged(events.Tick()) == []

    @precondition(lambda self: self.failed)
    @rule(checkpoint=st.integers(0, 3), seconds=st.just(1.0))
    def crash(self, checkpoint: int, seconds: float) -> None:
        """The process is killed; another begins from any checkpoint that is kept, and the records after it."""
        if not self.journal.records:
            return
        self.journal.crash(checkpoint % max(1, len(self.journal.checkpoints)))
        self.now += seconds
        for seat in self.seats:
            seat.waiting = None
            if seat.life:
                seat.lost_at = self.now
            if seat.life and seat.state != "left":
                seat.state = "lost"
        self.order, self.quorum_at, self.said, self.failed = [], math.inf, {}, False
        self.conclude(self.tell(events.Tick()))

    # What holds after each event

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """Law 8: the live state is the fold of what was appended, and both are what the reference says."""
        shard = self.journal.shard
        follow = self.journal.records[self.folded :]
        self.folded += len(follow)
        for data in follow:
            self.journal.fold(self.follower, data)
        assert self.follower.table() == shard._state.table()
        now = shard.statistics()
        assert now.version == self.version
        applied = sum(verdict is Verdict.APPLIED for verdict in self.gone.values())
        assert shard._state.verdicts[Verdict.APPLIED] == applied
        assert shard._state.verdicts[Verdict.RETURNED] == len(self.gone) - applied
        assert set(shard._state.members.membership.ranks) == self.members
        if self.model is not None:
            assert parameters(shard) == self.model.tolist()
        if not self.failed:
            assert {m.rank: m.state for m in now.members} == {m.rank: self.seats[m.rank].state for m in now.members}

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.check_replay()


TestShardMachine = ShardMachine.TestCase
TestShardMachine.settings = settings(max_examples=70, stateful_step_count=50, deadline=None)
