"""The shard: a state machine without I/O, clock or lock.

Rule 1: what a shard must never forget is in `RunState`, and changes by records only; who is connected and what is open
is here. `Shard.handle` is its one door: an event and the time go in, effects come out. Rule 2: an event that is refused
(an exception) or repeated changes nothing (design law 7).

One rule for every mode (design §6): a push belongs to the round that is open when it comes, and the divisor is the
number of members. Sums run in rank order, so the result does not depend on who came first.
"""

import math
from dataclasses import replace
from typing import assert_never, final

from thresher.protos.bookmark import furthest
from thresher.protos.errors import OptimizerError, ProtocolError, RoundFailedError
from thresher.protos.sealed import sealed
from thresher.protos.update import Membership
from thresher.server import effects, events
from thresher.server.aggregation import closed_round, row_of, update_of
from thresher.server.agreeing import OpenAgreement, earlier_agreement
from thresher.server.config import ShardConfig
from thresher.server.effects import Effect
from thresher.server.events import Event, IterationRow, Push, Verdict
from thresher.server.facts import Admitted, Closed, Departed, Opened, Record, Returned
from thresher.server.feed import Feed
from thresher.server.invariants import broken_invariants
from thresher.server.judging import judge, returned
from thresher.server.members import MemberState
from thresher.server.open_round import OpenRound
from thresher.server.registration import check_registration, doubts
from thresher.server.state import RunState
from thresher.server.statistics import ShardStatistics
from thresher.server.watch import Watch

_Join = events.Register | events.Seed | events.Refill | events.Hello
_Part = events.Push | events.Agree | events.Leave | events.Abort | events.Disconnect


@final
class Shard:
    """One slice of the model: registers workers, closes rounds, applies updates.

    Args:
        config: What it is told.
        state: What it knew before it was ended, if it was.

    Raises, from `handle`:
        RegistrationError, LayoutError: a registration or a seed that does not fit the run.
        ProtocolError: an event from a stranger, or one that makes no sense now.
        FencedError: an event from an earlier life of a worker.
        BehindError, LostHistoryError, DataLossError: a worker and this shard have to find together first.
        RoundFailedError: any event of a worker after the run has failed; the message says why it failed.
    """

    def __init__(self, config: ShardConfig, state: RunState | None = None) -> None:
        """Start without a model, which the first registration brings, or go on from ``state``."""
        self._config = config
        self._state = RunState(config.run, config.workers) if state is None else state
        self._round = OpenRound()
        self._agreement = OpenAgreement()
        self._watch = Watch(config, self._state)
        self._feed = Feed(self._state, config.log_cap_bytes)
        self._recovered = [member for member in self._state.members if member.incarnation]
        for member in self._recovered:
            if member.state is not MemberState.LEFT:
                member.state = MemberState.LOST
        self._told_epoch = 0
        self._refused = dict.fromkeys(Verdict, 0)  # since this process began: what changes nothing is not kept
        self._failure = ""
        newest = self._state.newest
        self._last_row = None if newest is None or newest.sealed.update.only_mean else self._row(newest)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, any origin, never backwards) and say what follows."""
        self._start_leases(now)
        match event:
            case events.Register() | events.Seed() | events.Refill() | events.Hello():
                return self._join(event, now)
            case events.Push() | events.Agree() | events.Leave() | events.Abort() | events.Disconnect():
                return self._take_part(event, now)
            case events.ReadState():
                if self._state.replica is None:
                    self._refuse_after_failure()
                self._feed.pin(now)
                return [self._state.snapshot()]
            case events.Drain():  # what a failure has spoilt is not kept: the log has all that came before
                return [] if self._failure else self._checkpoint(wait=True)
            case events.Fail(reason):
                return self._fail(reason)
            case events.Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _join(self, event: _Join, now: float) -> list[Effect]:
        self._refuse_after_failure()
        match event:
            case events.Register():
                return self._register(event, now)
            case events.Seed():
                return self._seed(event)
            case events.Refill():
                return self._refill(event, now)
            case events.Hello():
                return self._hello(event, now)

    def _take_part(self, event: _Part, now: float) -> list[Effect]:
        match event:
            case events.Push():
                return self._push(event, now)
            case events.Agree():
                return self._agree(event, now)
            case events.Leave():
                return self._leave(event, now)
            case events.Abort():
                return self._abort(event)
            case events.Disconnect():
                return self._disconnect(event, now)

    def __str__(self) -> str:
        """For people: ``shard 1``."""
        return f"shard {self._config.shard}"

    def statistics(self) -> ShardStatistics:
        """Return a frozen picture of the shard."""
        state, opened = self._state, self._state.opened
        return ShardStatistics(
            shard=self._config.shard,
            shards=self._config.shards,
            state=self._phase(),
            failure=self._failure,
            version=state.version,
            numel=state.piece.numel if state.piece else 0,
            model_numel=opened.registration.layout.numel if opened else 0,
            members=state.members.statistics(self._round.waited),
            verdicts={str(verdict): count + self._refused[verdict] for verdict, count in state.verdicts.items()},
            residual_squared_total=state.residual_squared_total,
            lost_squared_total=state.lost_squared_total,
            log_bytes=self._feed.bytes,
            threshold=state.threshold,
            last_row=self._last_row,
        )

    def validate(self) -> None:
        """Check every invariant; tests call it after every event. AssertionError names the broken ones."""
        broken = broken_invariants(self._state, self._round.waiting, self._feed.version)
        if broken:
            raise AssertionError("; ".join(broken))

    def _phase(self) -> str:
        return "failed" if self._failure else self._state.phase

    def _fold(self, record: Record) -> effects.Append:
        self._state.fold(record)
        return effects.Append(record)

    def _start_leases(self, now: float) -> None:
        """After a recovery, leases begin with the first event: before it nobody could come back."""
        for member in self._recovered:
            member.lost_at = now
        self._recovered = []

    # Joining

    def _register(self, request: events.Register, now: float) -> list[Effect]:
        state, config = self._state, self._config
        first = state.opened.registration if state.opened else None
        check_registration(request, first, config.shard, config.shards)
        state.members.check_admission(request, config.workers)
        written: list[Effect] = []
        if first is None:
            begins = replace(request, workers=config.workers or request.workers)  # a further rank may be the first here
            written.append(self._fold(Opened(state.run, begins)))
        member = state.members.seat(request.worker.rank)
        if member.incarnation != request.worker.incarnation:
            if member.incarnation:  # its lease goes on until the new life exchanges
                member.lost_at = min(member.lost_at, now)
            written.append(self._fold(Admitted(request.worker, request.origin, request.metrics_address)))
        member.among = 0 if config.workers else request.workers
        state.members.expect(request.workers, now)
        answer = effects.Registered(
            history=state.history,
            seeded=state.replica is not None,
            settled=member.settled,
            in_open_round=member.rank in self._round.waiting,
            verdict=member.verdict,
            membership=state.members.membership,
            agreements=state.agreed,
            warning=doubts(request, first, state.bookmark),
        )
        return [*written, answer]

    def _seed(self, seed: events.Seed) -> list[Effect]:
        self._state.members.known(seed.worker)
        if seed.worker.rank != 0:
            raise ProtocolError(f"rank 0 seeds the shards, not worker {seed.worker.rank}")
        if self._state.replica is not None:
            return [effects.Seeded(accepted=False)]
        self._state.seed(seed.state, seed.untrained)
        return [*self._checkpoint(wait=True), effects.Seeded(accepted=True)]

    def _refill(self, refill: events.Refill, now: float) -> list[Effect]:
        """Go on from a worker's replica, where this shard has lost what the worker has been told."""
        member = self._state.members.known(refill.worker)
        here, there = self._state.history, refill.history
        if there.version <= here.version:
            return [effects.Seeded(accepted=False)]
        self._feed.check_refill(there, str(member))
        self._state.refill(refill)
        self._state.members.miss(now)
        self._round.clear()
        self._feed = Feed(self._state, self._config.log_cap_bytes)
        self._last_row = None
        others = [other.rank for other in self._state.members.exchanging if other is not member]
        notice = f"refilled from the replica of {member}: version {here.version} → {there.version}"
        told: list[Effect] = [effects.Seeded(accepted=True), effects.Notice(notice), effects.Restart(tuple(others))]
        return [*self._checkpoint(wait=True), *told]

    def _hello(self, hello: events.Hello, now: float) -> list[Effect]:
        member = self._state.members.known(hello.worker)
        self._feed.check(hello.history, str(member))
        if member.state is MemberState.LEFT:  # it has not heard so, and says its leave again
            return [effects.Backlog(())]
        self._state.members.check_company(member.rank, member.among)
        backlog = tuple(self._feed.since(hello.history.version))
        member.state, member.version, member.lost_at = MemberState.EXCHANGING, hello.history.version, math.inf
        member.told = self._state.version
        return [effects.Backlog(backlog), *self._progress(now), *self._let_in_alone(now)]

    def _let_in_alone(self, now: float) -> list[Effect]:
        """Where no member is here to close a round in which they could be let in, those who are here are members."""
        members, lease = self._state.members, self._config.lease
        alone = self._config.shard == 0 and members.exchanging and not members.awaited(now, lease)
        return [self._fold(members.wanted(now, lease))] if alone else []

    # Rounds

    def _push(self, push: Push, now: float) -> list[Effect]:
        self._refuse_after_failure()
        state = self._state
        member = state.members.known(push.worker)
        if member.state is not MemberState.EXCHANGING or state.replica is None:
            raise ProtocolError(f"{member} cannot push: it is {member.state}, and the shard {self._phase()}")
        waiting = self._round.waiting.get(member.rank)
        refusal = judge(push, member, state, waiting, self._round.pushes.values())
        if refusal is not None:
            rejected = refusal.verdict is Verdict.REJECTED
            self._refused[Verdict.REJECTED if rejected else Verdict.DUPLICATE] += 1
            again = self._feed.again(push) if refusal.verdict is Verdict.APPLIED else []
            return [*again, refusal]
        adopted = self._adopted(push.membership, now)
        reason = returned(push, member, state)
        if reason:
            record = self._fold(Returned(member.rank, push.step, push.content))
            return [*adopted, record, effects.Judged(push.step, Verdict.RETURNED, reason), *self._progress(now)]
        member.version = max(member.version, push.version)
        self._round.hold(push, now)
        return [*adopted, *self._progress(now)]

    def _adopted(self, membership: Membership | None, now: float) -> list[Effect]:
        """The first shard decides who belongs to the run; here it comes with the pushes."""
        if self._config.shard == 0 or membership is None or membership.epoch <= self._state.members.membership.epoch:
            return []
        return [self._fold(membership), *self._watch.changes(now)]

    def _progress(self, now: float) -> list[Effect]:
        """Let waiting pushes in and close rounds, as far as that goes."""
        happened: list[Effect] = []
        state, consistency = self._state, self._state.consistency
        while state.replica is not None and not self._failure:
            awaited = state.members.awaited(now, self._config.lease)
            if not consistency.lockstep:  # there all ask between the same two rounds
                awaited = [m for m in awaited if not self._agreement.asks(m.rank)]
            self._round.let_in(consistency, awaited, now)
            if not self._round.is_complete(consistency, awaited, now, self._config.lease):
                break
            happened += self._close(now)
        return happened

    def _close(self, now: float) -> list[Effect]:
        state = self._state
        pushes = self._round.take(now)
        update = update_of(
            pushes,
            len(state.members.counted),
            state.version + 1,
            state.threshold,
            self._announced(now),
            overrides=state.overrides,
            consistency=state.consistency,
            spec=state.spec,
        )
        if update.mean is not None and not bool(update.mean.values.isfinite().all()):
            what = f"the mean of round {state.version} overflows float32 on {self}"
            return self._fail(f"{what}, of workers {list(update.contributors)}; lower the learning rate or scale")
        place = furthest((push.bookmark for push in pushes), state.bookmark)
        told = sealed(replace(update, bookmark=place), state.digest)
        seconds = now - self._round.opened_at
        closed = closed_round(told, pushes, state.threshold, state.version, seconds)
        try:
            state.fold(closed)
        except OptimizerError as error:
            return self._fail(f"round {state.version} of {self} cannot be applied: {error}")
        publications = self._feed.publish(told)
        closed = replace(closed, deliveries=self._feed.deliveries(publications, pushes))
        state.deliver(closed)
        row = self._row(closed)
        self._last_row = self._last_row if row.only_mean else row
        self._feed.cut(now)
        due = self._config.checkpoint_every and state.version % self._config.checkpoint_every == 0
        checkpoint = self._checkpoint(wait=False) if due else []
        return [effects.Append(closed), *publications, effects.WriteRow(row), *checkpoint, *self._watch.changes(now)]

    def _announced(self, now: float) -> Membership | None:
        """Return who belongs to the run from the next round on, where the first shard has that to say."""
        if self._config.shard != 0:
            return None
        membership = self._state.members.wanted(now, self._config.lease)
        if membership.epoch == self._told_epoch:
            return None
        self._told_epoch = membership.epoch
        return membership

    # Agreeing on numbers

    def _agree(self, asked: events.Agree, now: float) -> list[Effect]:
        self._refuse_after_failure()
        state = self._state
        member = state.members.known(asked.worker)
        earlier = earlier_agreement(asked, state.agreements, state.agreed, str(member))
        if earlier is not None:
            return [effects.Tell(earlier, (member.rank,))]
        self._agreement.hear(asked)
        return [*self._progress(now), *self._agree_if_complete(now)]

    def _agree_if_complete(self, now: float) -> list[Effect]:
        awaited = tuple(member.rank for member in self._state.members.awaited(now, self._config.lease))
        asking = self._agreement.asking  # among them who is not let in yet
        found = self._agreement.conclude(awaited, self._state.agreed, now)
        return [] if found is None else [self._fold(found), effects.Tell(found, asking)]

    def _leave(self, leave: events.Leave, now: float) -> list[Effect]:
        state = self._state
        member = state.members.known(leave.worker)
        if member.state is MemberState.LEFT:
            return [effects.Left(state.version)]
        self._refuse_after_failure()
        waiting = self._round.waiting.get(member.rank)
        if waiting is not None:
            raise ProtocolError(f"{member} leaves, but its push of step {waiting.step} is open")
        miscounted = member.miscounted(leave)
        noticed = [effects.Notice(miscounted)] if miscounted else []
        departed = self._fold(Departed(member.rank, leave.abandoned_squared, leave.untrained))
        return [departed, effects.Left(state.version), *noticed, *self._go_on(now)]

    def _abort(self, abort: events.Abort) -> list[Effect]:
        member = self._state.members.known(abort.worker)
        if self._failure or member.state is MemberState.LEFT:
            return []
        member.state = MemberState.ABORTED
        where = f"{self} is at version {self._state.version}"
        return self._fail(f"{member} stopped after {member.steps} steps: {abort.reason} ({where}; see its log)")

    def _disconnect(self, event: events.Disconnect, now: float) -> list[Effect]:
        member = self._state.members.known(event.worker)
        # After a failure everybody goes: the states stay as they were then, and tell who was the cause.
        if member.state is MemberState.EXCHANGING and not self._failure:
            member.state, member.lost_at = MemberState.LOST, now
        return []

    def _go_on(self, now: float) -> list[Effect]:
        """Do what no longer waits for somebody who has gone."""
        return [*self._progress(now), *self._agree_if_complete(now), *self._let_in_alone(now)]

    def _tick(self, now: float) -> list[Effect]:
        if self._failure:
            return []
        happened = self._go_on(now)
        if any(isinstance(effect, effects.Failed) for effect in happened):
            return happened
        for seen in self._watch.look(self._round, self._agreement, now):
            happened += self._fail(seen.reason) if isinstance(seen, effects.Failed) else [seen]
        return happened

    def _fail(self, reason: str) -> list[Effect]:
        self._failure = reason
        return [effects.Failed(reason)]

    def _refuse_after_failure(self) -> None:
        if self._failure:
            raise RoundFailedError(self._failure)

    def _row(self, closed: Closed) -> IterationRow:
        return row_of(closed, self._config.shard, self._state.slice.numel, self._state.spec, self._round.waits)

    def _checkpoint(self, *, wait: bool) -> list[Effect]:
        state = self._state
        return [] if state.replica is None else [effects.Checkpoint(state.table(), state.tensors(), wait)]
