"""The shard: a state machine without I/O, clock or lock.

Rule 1: everything that changes a shard is in this file. `Shard.handle` is its one door: an event and the time go in,
effects come out. Rule 2: an event that is refused (an exception) or repeated changes nothing (design law 7).

A synchronous round closes when every member has pushed; sums run in rank order, so the result does not depend on who
came first. Push number s of a worker belongs to the round that creates version s + 1.
"""

import math
from dataclasses import dataclass, replace
from typing import assert_never, final

from torch import Tensor

from thresher.protos.errors import ConfigurationError, OptimizerError, ProtocolError, RoundFailedError
from thresher.protos.layout import Slice
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.replica import Replica
from thresher.server import events
from thresher.server.aggregation import learning_rate_of, row_of, update_of
from thresher.server.events import Effect, Event, IterationRow, Judged, Push, Verdict
from thresher.server.log import UpdateLog
from thresher.server.members import Member, Members, MemberState
from thresher.server.registration import check_registration
from thresher.server.statistics import ShardStatistics


@final
@dataclass(frozen=True, slots=True)
class ShardConfig:
    """What a shard is told when it starts. Times are in seconds.

    Attributes:
        shard: Position of this shard.
        shards: Number of shards.
        workers: Number of workers the run starts with.
        run: Random number that names this life of the shard.
        start_timeout: How long the first round waits for workers that have not come.
        round_timeout: How long a round waits for a member that is connected.
        lease: How long a round waits for a member whose connection broke.
        log_cap_bytes: Memory for updates that members have not read.
    """

    shard: int
    shards: int
    workers: int
    run: int = 0
    start_timeout: float = 300.0
    round_timeout: float = 600.0
    lease: float = 5.0
    log_cap_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before anything is served. Raises ConfigurationError."""
        if not 0 <= self.shard < self.shards or self.workers < 1:
            raise ConfigurationError(f"shard {self.shard} of {self.shards} for {self.workers} workers makes no sense")
        for name in ("start_timeout", "round_timeout", "lease"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ConfigurationError(f"{name} must be a number of seconds >= 0, not {seconds}")


@final
class Shard:
    """One slice of the model: registers workers, closes rounds, applies updates.

    Raises, from `handle`:
        RegistrationError, LayoutError: a registration or a seed that does not fit the run.
        ProtocolError: an event from a stranger, or one that makes no sense now.
        RoundFailedError: any event of a worker after the run has failed; the message says why it failed.
    """

    def __init__(self, config: ShardConfig) -> None:
        """Start without a model: the first registration brings it."""
        self._config = config
        self._members = Members(config.workers)
        self._model: events.Register | None = None  # the registration that all others must agree with
        self._slice: Slice | None = None
        self._replica: Replica | None = None
        self._untrained: dict[str, Tensor] = {}
        self._overrides: tuple[Override, ...] = ()  # in force since the last update
        self._threshold: float | None = None  # for the round that is open
        self._open: dict[int, Push] = {}  # pushes of the open round by rank
        self._opened_at = 0.0  # when the first of them came
        self._log = UpdateLog(config.log_cap_bytes)
        self._failure = ""
        self._verdicts = dict.fromkeys(Verdict, 0)
        self._residual_squared_total = 0.0
        self._unpublished: IterationRow | None = None  # waits for its bytes
        self._last_row: IterationRow | None = None
        self._last_warning = 0.0

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time ``now`` (seconds, any origin, never backwards) and say what follows."""
        match event:
            case events.Register():
                return self._register(event)
            case events.Seed():
                return self._seed(event)
            case events.Hello():
                return self._hello(event)
            case events.Push():
                return self._push(event, now)
            case events.Leave():
                return self._leave(event, now)
            case events.Abort():
                return self._abort(event)
            case events.Disconnect():
                return self._disconnect(event, now)
            case events.Published():
                return self._published(event)
            case events.ReadState():
                return [self._state()]
            case events.Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    @property
    def slice(self) -> Slice:
        """The slice this shard owns. Raises ProtocolError before the first registration."""
        if self._slice is None:
            raise ProtocolError("no worker has registered a model yet")
        return self._slice

    def statistics(self) -> ShardStatistics:
        """Return a frozen picture of the shard."""
        return ShardStatistics(
            shard=self._config.shard,
            shards=self._config.shards,
            state=self._phase(),
            failure=self._failure,
            version=self._version,
            numel=self._slice.numel if self._slice else 0,
            model_numel=self._model.layout.numel if self._model else 0,
            members=tuple(member.statistics() for member in self._members.all),
            verdicts={str(verdict): count for verdict, count in self._verdicts.items()},
            residual_squared_total=self._residual_squared_total,
            log_bytes=self._log.bytes,
            threshold=self._threshold,
            last_row=self._last_row,
        )

    def validate(self) -> None:
        """Check every invariant; tests call it after every event. AssertionError names the broken ones."""
        present = {member.rank for member in self._members.present}
        invariants = {
            "only members push": set(self._open) <= present,
            "a full round is closed": not present or len(self._open) < len(present) or bool(self._failure),
            "pushes belong to the open round": all(push.step == self._version for push in self._open.values()),
            "nobody is ahead": all(member.steps <= self._version + 1 for member in self._members.all),
            "a slice comes with its model": (self._slice is None) == (self._model is None),
            "the log ends at the version": self._log.version == self._version,
        }
        broken = [text for text, holds in invariants.items() if not holds]
        if broken:
            raise AssertionError("; ".join(broken))

    @property
    def _version(self) -> int:
        return self._replica.version if self._replica else 0

    def _phase(self) -> str:
        if self._failure:
            return "failed"
        if not self._members.present:
            return "finished"
        if any(member.state is MemberState.WAITED_FOR for member in self._members.all):
            return "waiting for workers"
        return "training" if self._replica else "waiting for the seed"

    # Joining

    def _register(self, request: events.Register) -> list[Effect]:
        self._refuse_after_failure()
        check_registration(request, self._model, self._config.shard, self._config.shards)
        piece = self._slice or request.layout.shard_slice(self._config.shard, self._config.shards)
        self._members.admit(request)
        warning = ""
        if self._model is None:
            self._model, self._slice = request, piece
        elif request.environment != self._model.environment:
            warning = (
                f"worker {request.worker.rank} runs on {request.environment}, the first one registered on "
                f"{self._model.environment}: results may differ in the last bits"
            )
        return [events.Registered(self._config.run, self._version, self._replica is not None, warning)]

    def _seed(self, seed: events.Seed) -> list[Effect]:
        self._refuse_after_failure()
        self._members.known(seed.worker)
        if seed.worker.rank != 0:
            raise ProtocolError(f"rank 0 seeds the shards, not worker {seed.worker.rank}")
        if self._replica is not None:
            return [events.Seeded(accepted=False)]
        self._replica = Replica(self.slice, self._spec, seed.state)
        self._untrained = dict(seed.untrained)
        return [events.Seeded(accepted=True)]

    @property
    def _spec(self) -> OptimizerSpec:
        if self._model is None:
            raise ProtocolError("no worker has registered a model yet")
        return self._model.optimizer

    def _hello(self, hello: events.Hello) -> list[Effect]:
        self._refuse_after_failure()
        member = self._members.known(hello.worker)
        if not member.takes_part:
            raise ProtocolError(f"{member} cannot exchange: it has left")
        backlog = events.Backlog(self._log.since(hello.version))
        member.state, member.version = MemberState.EXCHANGING, hello.version
        return [backlog]

    # Rounds

    def _push(self, push: Push, now: float) -> list[Effect]:
        self._refuse_after_failure()
        member = self._members.known(push.worker)
        refusal = self._judge(push, member)
        if refusal is not None:
            self._verdicts[refusal.verdict] += 1
            return [refusal]
        if not self._open:
            self._opened_at = self._last_warning = now
        self._open[member.rank] = push
        self._verdicts[Verdict.APPLIED] += 1
        member.count(push, self.slice.numel)
        return self._close_if_complete(now)

    def _judge(self, push: Push, member: Member) -> Judged | None:
        """Return why a push is not taken, or None when it is."""
        if member.state is not MemberState.EXCHANGING or self._replica is None:
            raise ProtocolError(f"{member} cannot push: it is {member.state}, and the shard {self._phase()}")
        if push.step == member.steps - 1:
            if push.content == member.last_content:
                return Judged(push.step, Verdict.DUPLICATE)
            return Judged(push.step, Verdict.REJECTED, f"{member} pushed step {push.step} before, with other content")
        if push.step < member.steps:
            return Judged(push.step, Verdict.DUPLICATE)
        if (push.step, push.version) != (self._version, self._version):
            reason = f"{member} pushed step {push.step} of version {push.version}; round {self._version} is open"
            return Judged(push.step, Verdict.REJECTED, reason)
        if push.gradient is not None and push.gradient.numel != self.slice.numel:
            return Judged(push.step, Verdict.REJECTED, f"{push.gradient.numel} elements pushed, not {self.slice.numel}")
        if push.gradient is not None and not bool(push.gradient.values.isfinite().all()):
            return Judged(push.step, Verdict.REJECTED, f"{member} pushed NaN or infinity in step {push.step}")
        if push.next_threshold is not None and not 0 <= push.next_threshold < math.inf:  # NaN is not in there
            return Judged(push.step, Verdict.REJECTED, f"{member} proposes {push.next_threshold} as the threshold")
        if len(push.presence) != len(self.slice.segments):
            return Judged(push.step, Verdict.REJECTED, f"presence of {len(push.presence)} tensors pushed")
        return self._judge_overrides(push, member)

    def _judge_overrides(self, push: Push, member: Member) -> Judged | None:
        self._spec.checked(push.overrides)
        for other in self._open.values():
            if other.only_mean != push.only_mean:
                reason = f"{member} and worker {other.worker.rank} disagree in step {push.step}: one wants a mean only"
                return Judged(push.step, Verdict.REJECTED, reason)
            if other.overrides != push.overrides:
                reason = (
                    f"members disagree on hyper-parameters in step {push.step}: {member} has {list(push.overrides)}, "
                    f"worker {other.worker.rank} has {list(other.overrides)} (differences from the registered values); "
                    "give every worker the same schedule"
                )
                return Judged(push.step, Verdict.REJECTED, reason)
        return None

    def _close_if_complete(self, now: float) -> list[Effect]:
        present = self._members.present
        if not present or self._replica is None or len(self._open) < len(present):
            return []
        pushes = [self._open[rank] for rank in sorted(self._open)]
        update = update_of(pushes, len(present), self._version + 1, self._threshold)
        if update.mean is not None and not bool(update.mean.values.isfinite().all()):
            return self._fail(f"the mean of round {self._version} overflows float32; lower the learning rate or scale")
        row = row_of(
            update,
            pushes,
            shard=self._config.shard,
            numel=self.slice.numel,
            threshold=self._threshold,
            learning_rate=learning_rate_of(self._spec, update.overrides),
            round_seconds=now - self._opened_at,
        )
        try:
            self._replica.apply(update)
        except OptimizerError as error:
            return self._fail(str(error))
        self._log.append(update)
        self._overrides, self._threshold = update.overrides, update.next_threshold
        if not row.only_mean:
            self._residual_squared_total += row.residual_squared
        self._open = {}
        self._log.cut(min(member.version for member in present))
        self._unpublished = row
        return [events.Publish(update)]

    def _published(self, event: events.Published) -> list[Effect]:
        row = self._unpublished
        if row is None or row.version != event.version:
            raise ProtocolError(f"version {event.version} is not the one waiting to be published")
        readers = [member for member in self._members.present if member.state is MemberState.EXCHANGING]
        for member in readers:
            member.pull_bytes += event.wire_bytes
        self._last_row = replace(row, pull_bytes=event.wire_bytes * len(readers))
        self._unpublished = None
        return [events.Record(self._last_row)]

    # Leaving

    def _leave(self, leave: events.Leave, now: float) -> list[Effect]:
        member = self._members.known(leave.worker)
        if not member.takes_part:
            return [events.Left(self._version)]
        self._refuse_after_failure()
        if leave.step != member.steps or member.rank in self._open:
            raise ProtocolError(f"{member} leaves at step {leave.step}, but has pushed {member.steps} steps")
        effects: list[Effect] = []
        if (leave.push_bytes, leave.pull_bytes) != (member.push_bytes, member.pull_bytes):
            effects.append(
                events.Notice(
                    f"{member} counts {leave.push_bytes} bytes pushed and {leave.pull_bytes} pulled, "
                    f"this shard {member.push_bytes} and {member.pull_bytes}"
                )
            )
        self._untrained.update(leave.untrained)
        member.state = MemberState.LEFT
        return [events.Left(self._version), *effects, *self._close_if_complete(now)]

    def _abort(self, abort: events.Abort) -> list[Effect]:
        member = self._members.known(abort.worker)
        if self._failure or not member.takes_part:
            return []
        member.state = MemberState.ABORTED
        return self._fail(f"{member} stopped after {member.steps} steps: {abort.reason}")

    def _disconnect(self, event: events.Disconnect, now: float) -> list[Effect]:
        member = self._members.known(event.worker)
        # After a failure everybody goes: the states stay as they were then, and tell who was the cause.
        if member.state is MemberState.EXCHANGING and not self._failure:
            member.state, member.lost_at = MemberState.LOST, now
        return []

    def _tick(self, now: float) -> list[Effect]:
        if self._failure:
            return []
        lost = [
            m for m in self._members.present if m.state is MemberState.LOST and now - m.lost_at >= self._config.lease
        ]
        if lost:
            return self._fail(f"{self._where()} cannot be closed: " + "; ".join(m.whereabouts(now) for m in lost))
        if not self._open:
            return []
        missing = [member for member in self._members.present if member.rank not in self._open]
        waited = now - self._opened_at
        names = "; ".join(member.whereabouts(now) for member in missing)
        complete = self._members.complete
        if waited >= (self._config.round_timeout if complete else self._config.start_timeout):
            return self._fail(f"{self._where()} was open for {waited:.1f} s, its deadline: {names}")
        if now - self._last_warning >= max(10.0, waited / 2):  # 10, 20, 40, … seconds: seen, but no flood
            self._last_warning = now
            return [events.Notice(f"{self._where()} has been open for {waited:.0f} s: {names}")]
        return []

    def _where(self) -> str:
        return f"round {self._version} of shard {self._config.shard}"

    def _fail(self, reason: str) -> list[Effect]:
        self._failure = reason
        return [events.Failed(reason)]

    def _refuse_after_failure(self) -> None:
        if self._failure:
            raise RoundFailedError(self._failure)

    def _state(self) -> events.State:
        if self._replica is None or self._model is None:
            self._refuse_after_failure()
            raise ProtocolError("the shard has not been seeded yet")
        groups = [dict(group) for group in self._spec.groups]
        for one in self._overrides:
            groups[one.group][one.name] = one.value
        spec = OptimizerSpec(self._spec.name, tuple(groups))
        return events.State(self._version, self._replica.state(), dict(self._untrained), self._model.layout, spec)
