"""The shard: any order of events against a reference model, then the dialogues that a reader wants to see."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from thresher.protos.errors import (
    ConfigurationError,
    LayoutError,
    OptimizerError,
    ProtocolError,
    RegistrationError,
    RoundFailedError,
    ThresherError,
)
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.replica import PARAMETERS
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server import events
from thresher.server.events import Effect, Event, Judged, Verdict, Worker
from thresher.server.shard import Shard, ShardConfig

LAYOUT = Layout((TensorSpec("w", (3,), "float32"), TensorSpec("b", (1,), "float32")))
SGD = OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.5},))
NUMEL = 4
CONFIG = ShardConfig(shard=0, shards=1, workers=2, run=7, start_timeout=100.0, round_timeout=30.0, lease=5.0)


def register(rank: int, incarnation: int = 1, workers: int = 2, **changes: Any) -> events.Register:
    request = events.Register(Worker(rank, incarnation), workers, 0, 1, LAYOUT, SGD, "Identity", f"host:{rank}")
    return replace(request, **changes)


def seed(rank: int = 0, values: float = 0.0, numel: int = NUMEL) -> events.Seed:
    return events.Seed(Worker(rank, 1), {PARAMETERS: torch.full((numel,), values)}, {"bn.mean": torch.ones(2)})


def push(rank: int, step: int, gradient: SparseGradient | float | None = 1.0, **changes: Any) -> events.Push:
    if isinstance(gradient, int | float):
        gradient = SparseGradient.dense(torch.full((NUMEL,), gradient))
    made = events.Push(
        Worker(rank, 1), step, step, gradient, (True, True), wire_bytes=100, content=hash((rank, step)) + 1
    )
    return replace(made, **changes)


def leave(rank: int, step: int, push_bytes: int = 0, pull_bytes: int = 0) -> events.Leave:
    return events.Leave(Worker(rank, 1), step, push_bytes, pull_bytes)


def say(shard: Shard, event: Event, now: float = 0.0) -> list[Effect]:
    """Hand over an event, and confirm what is published as the engine does."""
    effects = shard.handle(event, now)
    shard.validate()
    for effect in effects:
        if isinstance(effect, events.Publish):
            effects = [*effects, *shard.handle(events.Published(effect.update.version, 50), now)]
            shard.validate()
    return effects


def training(workers: int = 2, seeded: float = 0.0, **config: Any) -> Shard:
    """A shard on which every worker has registered and opened its stream."""
    shard = Shard(replace(CONFIG, workers=workers, **config))
    for rank in range(workers):
        say(shard, register(rank, workers=workers))
    say(shard, seed(values=seeded))
    for rank in range(workers):
        say(shard, events.Hello(Worker(rank, 1), 0))
    return shard


def state_of(shard: Shard) -> events.State:
    (state,) = shard.handle(events.ReadState(), 0.0)
    assert isinstance(state, events.State)
    return state


def parameters(shard: Shard) -> list[float]:
    found: list[float] = state_of(shard).tensors[PARAMETERS].tolist()
    return found


def only(effects: list[Effect], kind: type[Any]) -> Any:
    (found,) = [effect for effect in effects if isinstance(effect, kind)]
    return found


def picture(shard: Shard) -> object:
    """Everything that can be seen of a shard from outside, but for the count of refusals."""
    try:
        state = state_of(shard)
    except ProtocolError:
        seen: object = None
    else:
        tensors = sorted((name, value.tolist()) for name, value in state.tensors.items())
        untrained = sorted((name, value.tolist()) for name, value in state.untrained.items())
        seen = (state.version, tensors, untrained, state.optimizer)
    return seen, replace(shard.statistics(), verdicts={})


# --- every order of events, against a model ----------------------------------------------------------------

WORKERS = 3
ranks = st.integers(0, WORKERS - 1)
SPEECHES: list[Callable[[int, int], Any]] = [push, leave]
speeches = st.sampled_from(SPEECHES)


class ShardModel(RuleBasedStateMachine):
    """The reference model: states of the members, steps, and SGD on Python floats. Small integers keep sums exact."""

    def __init__(self) -> None:
        super().__init__()
        self.shard = Shard(replace(CONFIG, workers=WORKERS))
        self.now = 0.0
        self.states = ["waited for"] * WORKERS
        self.steps = [0] * WORKERS
        self.contents = [0] * WORKERS
        self.lost_at = [0.0] * WORKERS
        self.open: dict[int, list[float] | None] = {}
        self.opened_at = 0.0
        self.weights: list[float] | None = None
        self.momentum: list[float] | None = None
        self.version = 0
        self.failed = False

    def present(self) -> list[int]:
        return [rank for rank in range(WORKERS) if self.states[rank] != "left"]

    def close_if_full(self) -> bool:
        """SGD with momentum 0.5 and rate 1 on the sum in rank order; torch's first buffer is the gradient itself."""
        members = self.present()
        if self.weights is None or not members or len(self.open) < len(members):
            return False
        heard = [self.open[rank] for rank in sorted(self.open)]
        gradients = [gradient for gradient in heard if gradient is not None]
        if gradients:
            mean = torch.tensor(gradients).sum(0) / len(members)
            old = self.momentum
            moved = mean if old is None else torch.tensor(old) * 0.5 + mean
            self.momentum = moved.tolist()
            self.weights = (torch.tensor(self.weights) - moved).tolist()
        self.version, self.open = self.version + 1, {}
        return True

    def tell(self, event: Event) -> list[Effect]:
        return say(self.shard, event, self.now)

    def refused(self, event: Event, *errors: type[ThresherError]) -> None:
        """Law 7: an exception leaves everything as it was."""
        before = picture(self.shard)
        with pytest.raises(errors or (ThresherError,)):
            self.tell(event)
        assert picture(self.shard) == before

    def unchanged(self, event: Event) -> list[Effect]:
        """Law 7: a repetition leaves everything as it was."""
        before = picture(self.shard)
        effects = self.tell(event)
        assert picture(self.shard) == before
        return effects

    @rule(rank=ranks, incarnation=st.sampled_from([1, 1, 1, 2]))
    def register(self, rank: int, incarnation: int) -> None:
        request = register(rank, incarnation, WORKERS)
        if self.failed:
            self.refused(request, RoundFailedError)
        elif self.states[rank] == "waited for" and incarnation == 1:
            assert only(self.tell(request), events.Registered).version == self.version
            self.states[rank] = "registered"
        elif self.states[rank] != "waited for" and incarnation == 1:
            only(self.unchanged(request), events.Registered)
        elif self.states[rank] != "waited for":
            self.refused(request, RegistrationError)

    @rule(
        wrong=st.sampled_from(
            [
                {"workers": 9}, {"shard": 1}, {"shards": 2}, {"worker": Worker(WORKERS, 1)},
                {"layout": Layout((TensorSpec("w", (4,), "float32"),))}, {"method": "TopK(0.1)"},
                {"optimizer": OptimizerSpec("SGD", ({"lr": 2.0, "momentum": 0.5},))},
            ]
        )
    )  # fmt: skip
    def register_wrongly(self, wrong: Mapping[str, Any]) -> None:
        if all(state == "waited for" for state in self.states) and not wrong.keys() & {"workers", "shard", "worker"}:
            return  # the first one may bring any model
        self.refused(replace(register(0, 1, WORKERS), **wrong), RegistrationError, LayoutError, RoundFailedError)

    @rule(rank=ranks, value=st.integers(-2, 2))
    def seed(self, rank: int, value: int) -> None:
        event = seed(rank, float(value))
        if self.failed or self.states[rank] == "waited for" or rank != 0:
            self.refused(event, ProtocolError, RoundFailedError)
        elif self.weights is None:
            assert only(self.tell(event), events.Seeded).accepted
            self.weights = [float(value)] * NUMEL
        else:
            assert not only(self.unchanged(event), events.Seeded).accepted

    @rule(numel=st.sampled_from([0, 3, 5]))
    def seed_of_another_size(self, numel: int) -> None:
        if self.weights is None:
            self.refused(seed(0, numel=numel), LayoutError, ProtocolError, RoundFailedError)

    @rule(rank=ranks, incarnation=st.sampled_from([1, 1, 1, 2]))
    def hello(self, rank: int, incarnation: int) -> None:
        event = events.Hello(Worker(rank, incarnation), self.version)
        welcome = self.states[rank] in ("registered", "exchanging", "lost")
        if self.failed or incarnation != 1 or not welcome:
            self.refused(event, ProtocolError, RoundFailedError)
        else:
            assert only(self.tell(event), events.Backlog).updates == ()
            self.states[rank] = "exchanging"

    @rule(rank=ranks, ahead=st.integers(1, 3))
    def hello_from_the_future(self, rank: int, ahead: int) -> None:
        self.refused(events.Hello(Worker(rank, 1), self.version + ahead), ProtocolError, RoundFailedError)

    def may_push(self, rank: int) -> bool:
        return self.states[rank] == "exchanging" and not self.failed and self.weights is not None

    @rule(rank=ranks, values=st.lists(st.integers(-4, 4), min_size=NUMEL, max_size=NUMEL) | st.none())
    def push(self, rank: int, values: list[int] | None) -> None:
        gradient = None if values is None else SparseGradient.dense(torch.tensor([float(value) for value in values]))
        event = push(rank, self.version, gradient)
        if not self.may_push(rank):
            self.refused(event, ProtocolError, RoundFailedError)
        elif rank in self.open:
            verdict = only(self.unchanged(event), Judged).verdict
            assert verdict is (Verdict.DUPLICATE if event.content == self.contents[rank] else Verdict.REJECTED)
        else:
            self.take(rank, event, values)

    def take(self, rank: int, event: events.Push, values: list[int] | None) -> None:
        if not self.open:
            self.opened_at = self.now
        self.open[rank] = None if values is None else [float(value) for value in values]
        self.steps[rank], self.contents[rank] = self.version + 1, event.content
        effects = self.tell(event)
        assert not [effect for effect in effects if isinstance(effect, Judged)]
        self.check_closing(effects)

    def check_closing(self, effects: list[Effect]) -> None:
        published = [effect.update for effect in effects if isinstance(effect, events.Publish)]
        contributors = tuple(sorted(rank for rank, gradient in self.open.items() if gradient is not None))
        members = len(self.present())
        if self.close_if_full():
            (update,) = published
            assert (update.version, update.members, update.contributors) == (self.version, members, contributors)
            assert only(effects, events.Record).row.version == self.version
        else:
            assert not published

    @rule(rank=ranks, back=st.integers(1, 3), conflicting=st.booleans())
    def push_an_old_step_again(self, rank: int, back: int, conflicting: bool) -> None:
        step = self.steps[rank] - back
        if not self.may_push(rank) or step < 0:
            return
        content = self.contents[rank] + conflicting
        effects = self.unchanged(replace(push(rank, step, 9.0), content=content))
        expected = Verdict.REJECTED if conflicting and back == 1 else Verdict.DUPLICATE
        assert only(effects, Judged).verdict is expected

    @rule(
        rank=ranks,
        wrong=st.sampled_from(
            [
                {"step": 1 << 40}, {"version": 1 << 40}, {"gradient": SparseGradient.empty(NUMEL + 1)},
                {"gradient": SparseGradient.dense(torch.tensor([0.0, float("nan"), 0.0, 0.0]))},
                {"gradient": SparseGradient.dense(torch.tensor([0.0, 0.0, 0.0, float("-inf")]))},
                {"presence": (True,)}, {"overrides": (Override(0, "lr", 0.5),)},
                {"next_threshold": float("nan")}, {"next_threshold": -1.0},
            ]
        ),
    )  # fmt: skip
    def push_what_is_rejected(self, rank: int, wrong: Mapping[str, Any]) -> None:
        if not self.may_push(rank) or rank in self.open or ("overrides" in wrong and not self.open):
            return
        result = only(self.unchanged(push(rank, self.version, **wrong)), Judged)
        assert result.verdict is Verdict.REJECTED
        assert result.reason

    @rule(rank=ranks, override=st.sampled_from([Override(0, "lr", "fast"), Override(3, "lr", 0.1)]))
    def push_an_impossible_override(self, rank: int, override: Override) -> None:
        if self.may_push(rank) and rank not in self.open:
            self.refused(push(rank, self.version, overrides=(override,)), OptimizerError)

    @rule(rank=ranks, incarnation=st.sampled_from([0, 2]), make=speeches)
    def a_stranger_speaks(self, rank: int, incarnation: int, make: Callable[[int, int], Any]) -> None:
        for event in (
            replace(make(rank, self.version), worker=Worker(rank, incarnation)),
            events.Abort(Worker(rank, incarnation), "no"),
            events.Disconnect(Worker(WORKERS + rank, 1)),
        ):
            self.refused(event, ProtocolError, RoundFailedError)

    @rule(rank=ranks)
    def leave(self, rank: int) -> None:
        event = leave(rank, self.steps[rank])
        if self.states[rank] == "waited for":
            self.refused(event, ProtocolError)
        elif self.states[rank] == "left":
            only(self.unchanged(event), events.Left)
        elif self.failed or rank in self.open:
            self.refused(event, ProtocolError, RoundFailedError)
        else:
            before = self.version
            self.states[rank] = "left"
            effects = self.tell(event)
            assert only(effects, events.Left).version == before
            self.check_closing(effects)

    @rule(rank=ranks, off=st.sampled_from([-1, 1, 5]))
    def leave_at_another_step(self, rank: int, off: int) -> None:
        if self.states[rank] != "left":
            self.refused(leave(rank, self.steps[rank] + off), ProtocolError, RoundFailedError)

    @rule(rank=ranks)
    def disconnect(self, rank: int) -> None:
        event = events.Disconnect(Worker(rank, 1))
        if self.states[rank] == "waited for":
            self.refused(event, ProtocolError)
        elif self.states[rank] == "exchanging" and not self.failed:
            self.tell(event)
            self.states[rank], self.lost_at[rank] = "lost", self.now
        else:
            assert self.unchanged(event) == []

    @precondition(lambda self: self.version > 2)
    @rule(rank=ranks)
    def abort(self, rank: int) -> None:
        event = events.Abort(Worker(rank, 1), "out of memory")
        if self.failed or self.states[rank] == "left":
            assert self.unchanged(event) == []
        else:
            reason = only(self.tell(event), events.Failed).reason
            assert f"worker {rank}" in reason
            assert "out of memory" in reason
            self.states[rank], self.failed = "aborted", True

    @rule(seconds=st.sampled_from([0.0, 1.0, 1.0, 4.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        effects = self.tell(events.Tick())
        complete = not {"waited for", "registered"} & set(self.states)
        deadline = CONFIG.round_timeout if complete else CONFIG.start_timeout
        overdue = bool(self.open) and self.now - self.opened_at >= deadline
        gone = any(s == "lost" and self.now - self.lost_at[r] >= CONFIG.lease for r, s in enumerate(self.states))
        expected = not self.failed and (overdue or gone)
        assert bool([effect for effect in effects if isinstance(effect, events.Failed)]) == expected
        self.failed = self.failed or expected

    @rule(version=st.integers(0, 9))
    def publish_what_is_not_waiting(self, version: int) -> None:
        self.refused(events.Published(version, 10), ProtocolError)

    @invariant()
    def agrees_with_the_model(self) -> None:
        now = self.shard.statistics()
        assert now.version == self.version
        assert (now.state == "failed") == self.failed
        assert [member.state for member in now.members] == self.states
        assert [member.steps for member in now.members] == self.steps
        if self.weights is not None and any(state != "waited for" for state in self.states):
            assert parameters(self.shard) == self.weights


TestShardModel = ShardModel.TestCase
TestShardModel.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


# --- joining -----------------------------------------------------------------------------------------------


def test_a_run_begins() -> None:
    """An example to read: two workers register, rank 0 seeds, both say hello, and the shard trains."""
    shard = Shard(CONFIG)
    assert shard.statistics().state == "waiting for workers"
    assert say(shard, register(1)) == [events.Registered(run=7, version=0, seeded=False)]
    say(shard, register(0))
    assert shard.statistics().state == "waiting for the seed"
    say(shard, seed(values=2.0))
    assert say(shard, register(1)) == [events.Registered(run=7, version=0, seeded=True)]
    for rank in (0, 1):
        assert say(shard, events.Hello(Worker(rank, 1), 0)) == [events.Backlog(())]
    assert shard.statistics().state == "training"
    assert parameters(shard) == [2.0] * 4


def test_the_second_seed_is_ignored() -> None:
    """Seeding is safe to repeat: the first one wins."""
    shard = training(seeded=1.0)
    assert say(shard, seed(values=9.0)) == [events.Seeded(accepted=False)]
    assert parameters(shard) == [1.0] * 4


def test_another_layout_is_refused_with_the_difference() -> None:
    """The message names both workers and lists what differs."""
    shard = Shard(CONFIG)
    say(shard, register(0))
    other = Layout((TensorSpec("w", (5,), "float32"), TensorSpec("b", (1,), "float32")))
    with pytest.raises(LayoutError) as caught:
        say(shard, register(1, layout=other))
    assert "model of worker 1 differs from the one that worker 0 registered" in str(caught.value)
    assert "w float32 [3] is registered, here it is float32 [5]" in str(caught.value)


def test_more_shards_than_elements_are_refused_and_nothing_is_registered() -> None:
    """The worker hears how many shards its model can have."""
    shard = Shard(replace(CONFIG, shard=4, shards=5))
    with pytest.raises(ConfigurationError, match="5 shards are more than the model's 4 trained elements"):
        say(shard, register(0, shard=4, shards=5))
    assert shard.statistics().members[0].state == "waited for"


def test_other_hardware_is_a_warning() -> None:
    """Different torch or CPU may differ in the last bits: said, not refused."""
    shard = Shard(CONFIG)
    say(shard, register(0, environment=("2.5", "AVX2")))
    answer = only(say(shard, register(1, environment=("2.5", "AVX512"))), events.Registered)
    assert "last bits" in answer.warning
    assert "AVX512" in answer.warning


def test_nothing_can_be_read_or_pushed_before_its_time() -> None:
    """State without a seed, a hello without a registration, a slice without a model: each is a protocol error."""
    shard = Shard(CONFIG)
    for event in (events.ReadState(), events.Hello(Worker(0, 1), 0), seed()):
        with pytest.raises(ProtocolError):
            say(shard, event)
    with pytest.raises(ProtocolError, match="no worker has registered"):
        _ = shard.slice


# --- rounds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_round_sums_in_rank_order_whoever_comes_first(order: tuple[int, ...]) -> None:
    """Float32 sums depend on their order, so it is the ranks' and not the network's: equal bits for any arrival."""
    values = [1e8, 1.0, -1e8]
    shard = training(workers=3)
    effects: list[Effect] = []
    for rank in order:
        effects = say(shard, push(rank, 0, values[rank]))
    update: Update = only(effects, events.Publish).update
    assert update.mean is not None
    expected = (torch.tensor(1e8) + torch.tensor(1.0) + torch.tensor(-1e8)) / 3
    assert torch.equal(update.mean.values, expected.expand(4))


def test_the_divisor_is_the_number_of_members_also_after_a_leave() -> None:
    """Three members divide by three; when one has left, by two."""
    shard = training(workers=3)
    effects: list[Effect] = []
    for rank in range(3):
        effects = say(shard, push(rank, 0, 3.0))
    assert only(effects, events.Publish).update.members == 3
    assert parameters(shard) == [-3.0] * 4
    say(shard, leave(2, 1, 100, 50))
    say(shard, push(0, 1, 3.0))
    update = only(say(shard, push(1, 1, 1.0)), events.Publish).update
    assert (update.members, update.mean.values.tolist()) == (2, [2.0] * 4)


def test_a_leave_closes_a_round_that_waited_for_nobody_else() -> None:
    """Uneven data: the last one to be waited for has none left, and the others go on without it."""
    shard = training()
    say(shard, push(1, 0, 4.0))
    effects = say(shard, leave(0, 0))
    assert only(effects, events.Left).version == 0
    update = only(effects, events.Publish).update
    assert (update.members, update.contributors) == (1, (1,))
    assert only(effects, events.Record).row.pull_bytes == 50  # the one who left reads no more


def test_a_skipped_push_counts_in_the_divisor() -> None:
    """SKIPPED is an arrival with weight 0."""
    shard = training()
    say(shard, push(0, 0, None))
    update = only(say(shard, push(1, 0, 4.0)), events.Publish).update
    assert (update.members, update.contributors, update.mean.values.tolist()) == (2, (1,), [2.0] * 4)


def test_when_all_skip_the_version_moves_and_the_model_does_not() -> None:
    """Also not by its momentum."""
    shard = training()
    effects: list[Effect] = []
    for step, gradient in enumerate([1.0, None]):
        for rank in (0, 1):
            effects = say(shard, push(rank, step, gradient))
    assert only(effects, events.Publish).update.mean is None
    assert only(effects, events.Record).row.skipped
    assert shard.statistics().version == 2
    assert parameters(shard) == [-1.0] * 4
    for rank in (0, 1):
        say(shard, push(rank, 2, 1.0))
    assert parameters(shard) == [-2.5] * 4  # momentum 0.5 of one step ago, not of two


def test_a_mean_alone_moves_the_version_and_nothing_else() -> None:
    """The mean comes back in the update; model, momentum, densities and total error are as if it had not been."""
    shard = training()
    effects: list[Effect] = []
    for step, only_mean in enumerate([False, True]):
        for rank in (0, 1):
            effects = say(shard, push(rank, step, 3.0 if only_mean else 1.0, only_mean=only_mean, residual_squared=1.0))
    update = only(effects, events.Publish).update
    assert update.only_mean
    assert update.mean.values.tolist() == [3.0] * 4
    assert only(effects, events.Record).row.only_mean
    assert (shard.statistics().version, parameters(shard)) == (2, [-1.0] * 4)
    assert shard.statistics().residual_squared_total == 1.0
    assert {(m.pushed_elements, m.pushable_elements) for m in shard.statistics().members} == {(4, 4)}
    for rank in (0, 1):
        say(shard, push(rank, 2, 1.0))
    assert parameters(shard) == [-2.5] * 4  # momentum 0.5 of the step before the mean


def test_members_that_disagree_on_a_mean_are_told() -> None:
    """A gradient is not averaged with a residual: the second one is REJECTED."""
    shard = training()
    say(shard, push(0, 0, 1.0, only_mean=True))
    result = only(say(shard, push(1, 0, 1.0)), Judged)
    assert result.verdict is Verdict.REJECTED
    assert "disagree in step 0: one wants a mean only" in result.reason


def test_a_schedule_travels_with_the_pushes() -> None:
    """The hyper-parameters in force are those of the round, and the snapshot shows them."""
    shard = training()
    effects: list[Effect] = []
    for rank in (0, 1):
        effects = say(shard, push(rank, 0, 1.0, overrides=(Override(0, "lr", 0.25),)))
    assert only(effects, events.Record).row.learning_rate == 0.25
    assert parameters(shard) == [-0.25] * 4
    assert state_of(shard).optimizer.groups[0]["lr"] == 0.25


def test_members_that_disagree_on_hyperparameters_are_told() -> None:
    """The second one is REJECTED with both values; once it agrees, the round closes."""
    shard = training()
    say(shard, push(0, 0, 1.0, overrides=(Override(0, "lr", 0.5),)))
    result = only(say(shard, push(1, 0, 1.0)), Judged)
    assert result.verdict is Verdict.REJECTED
    assert "members disagree on hyper-parameters in step 0" in result.reason
    assert "0.5" in result.reason
    assert only(say(shard, push(1, 0, 1.0, overrides=(Override(0, "lr", 0.5),))), events.Publish)


def test_a_switch_thrown_midway_that_torch_cannot_follow_fails_the_run() -> None:
    """Nobody waits for a round that cannot be applied: all are told, with the hyper-parameter in question."""
    adam = OptimizerSpec("Adam", ({"lr": 1.0, "amsgrad": False},))
    shard = Shard(replace(CONFIG, workers=1))
    for event in (register(0, workers=1, optimizer=adam), seed(), events.Hello(Worker(0, 1), 0), push(0, 0)):
        say(shard, event)
    effects = say(shard, push(0, 1, overrides=(Override(0, "amsgrad", True),)))
    assert "amsgrad" in only(effects, events.Failed).reason
    assert shard.statistics().version == 1


def test_a_mean_that_overflows_is_not_applied() -> None:
    """Finite pushes can sum to infinity: the run fails before the model is spoilt."""
    shard = training()
    say(shard, push(0, 0, 3e38))
    failed = only(say(shard, push(1, 0, 3e38)), events.Failed)
    assert "the mean of round 0 overflows float32" in failed.reason
    assert parameters(shard) == [0.0] * 4


def test_the_threshold_of_rank_0_holds_for_the_next_round() -> None:
    """One threshold per run: it travels in the update and stays until another is proposed."""
    shard = training()
    say(shard, push(0, 0, next_threshold=0.25))
    assert only(say(shard, push(1, 0)), events.Publish).update.next_threshold == 0.25
    say(shard, push(0, 1))
    effects = say(shard, push(1, 1))
    assert only(effects, events.Record).row.threshold == 0.25
    assert shard.statistics().threshold == 0.25


def test_counters_add_up() -> None:
    """Bytes and elements by worker, residuals by round, and the row agree."""
    shard = training()
    effects: list[Effect] = []
    for rank in (0, 1):
        effects = say(shard, push(rank, 0, residual_squared=4.0))
    row = only(effects, events.Record).row
    now = shard.statistics()
    assert [m.push_bytes for m in now.members] == [100, 100]
    assert [m.pull_bytes for m in now.members] == [50, 50]
    assert [m.pushed_elements for m in now.members] == [4, 4]
    assert (row.push_bytes, row.pull_bytes, row.pushed_elements) == (200, 100, 8)
    assert now.residual_squared_total == 4.0
    assert now.verdicts == {"applied": 2, "duplicate": 0, "returned": 0, "rejected": 0}
    assert now.last_row == row


def test_the_log_is_cut_at_the_slowest_member() -> None:
    """However long a dense run is, one update stays in memory when every member has read the rest."""
    shard = training()
    for step in range(300):
        for rank in (0, 1):
            say(shard, push(rank, step))
        assert shard.statistics().log_bytes <= 256 + 4 * NUMEL
    assert shard.statistics().version == 300


# --- bad days ----------------------------------------------------------------------------------------------


def failure(shard: Shard, now: float) -> str:
    return str(only(say(shard, events.Tick(), now), events.Failed).reason)


def test_a_worker_that_never_comes_is_named() -> None:
    """The first round waits as long as the start may take, then names worker, round and shard."""
    shard = Shard(CONFIG)
    for event in (register(0), seed(), events.Hello(Worker(0, 1), 0), push(0, 0)):
        say(shard, event)
    assert [type(effect) for effect in say(shard, events.Tick(), 99.0)] == [events.Notice]
    reason = failure(shard, 100.0)
    assert "round 0 of shard 0 was open for 100.0 s, its deadline: worker 1 has never registered" in reason


def test_a_worker_that_registered_and_stays_silent_is_named() -> None:
    """It has come, so the message says what it has not done."""
    shard = Shard(CONFIG)
    for event in (register(0), register(1), seed(), events.Hello(Worker(0, 1), 0), push(0, 0)):
        say(shard, event)
    assert "worker 1 (host:1) has registered but not begun to exchange" in failure(shard, 100.0)


def test_a_slow_worker_is_named_and_never_evicted() -> None:
    """Notices at 10, 20, 40 … seconds, then the deadline; a push in between is welcome."""
    shard = training(round_timeout=90.0)
    say(shard, push(0, 0), 0.0)
    noticed = [second for second in range(90) if say(shard, events.Tick(), float(second))]
    assert noticed == [10, 20, 40, 80]
    assert only(say(shard, push(1, 0), 89.0), events.Publish)
    say(shard, push(0, 1), 100.0)
    assert not say(shard, events.Tick(), 109.0)
    assert "worker 1 (host:1) is connected but has not pushed, after 1 steps" in failure(shard, 190.0)


def test_a_lost_worker_is_named_after_its_lease() -> None:
    """A broken connection may come back within the lease; then the run fails and every later event hears why."""
    shard = training()
    say(shard, push(0, 0), 0.0)
    say(shard, events.Disconnect(Worker(1, 1)), 1.0)
    assert say(shard, events.Tick(), 5.9) == []
    reason = failure(shard, 6.0)
    assert "round 0 of shard 0 cannot be closed: worker 1 (host:1) lost its connection 5.0 s ago" in reason
    for event in (push(1, 0), events.Hello(Worker(1, 1), 0), register(1), leave(0, 1)):
        with pytest.raises(RoundFailedError, match="worker 1"):
            say(shard, event, 7.0)
    assert say(shard, events.Tick(), 1000.0) == []


def test_a_worker_that_comes_back_within_its_lease_goes_on() -> None:
    """The same life on a new stream takes part again."""
    shard = training()
    say(shard, events.Disconnect(Worker(1, 1)), 1.0)
    say(shard, events.Hello(Worker(1, 1), 0), 4.0)
    assert say(shard, events.Tick(), 100.0) == []
    assert shard.statistics().members[1].state == "exchanging"


def test_the_reason_of_an_abort_is_passed_on() -> None:
    """The others read which worker stopped, when, and why, in its own words."""
    shard = training()
    reason = only(say(shard, events.Abort(Worker(1, 1), "CUDA out of memory")), events.Failed).reason
    assert reason == "worker 1 (host:1) stopped after 0 steps: CUDA out of memory"
    assert shard.statistics().failure == reason
    with pytest.raises(RoundFailedError, match="CUDA out of memory"):
        say(shard, push(0, 0))


def test_disagreeing_byte_counts_are_noticed() -> None:
    """Law 9 is checked at every leave: the operator hears both counts."""
    shard = training()
    for rank in (0, 1):
        say(shard, push(rank, 0))
    assert not [e for e in say(shard, leave(0, 1, 100, 50)) if isinstance(e, events.Notice)]
    notice = only(say(shard, leave(1, 1, 100, 51)), events.Notice)
    assert "worker 1 (host:1) counts 100 bytes pushed and 51 pulled, this shard 100 and 50" in notice.text


def test_a_run_that_everybody_has_left_is_finished() -> None:
    """Its state can still be read: that is how the final model is saved."""
    shard = training()
    for rank in (0, 1):
        say(shard, leave(rank, 0))
    assert shard.statistics().state == "finished"
    assert parameters(shard) == [0.0] * 4
    assert say(shard, events.Tick(), 1e6) == []


def test_buffers_come_with_the_leave_of_who_has_them() -> None:
    """Rank 0 hands over its BatchNorm statistics; they replace those of the seed."""
    shard = training()
    buffers: dict[str, Tensor] = {"bn.mean": torch.full((2,), 7.0)}
    say(shard, events.Leave(Worker(0, 1), 0, 0, 0, buffers))
    assert state_of(shard).untrained["bn.mean"].tolist() == [7.0, 7.0]


def test_validate_says_which_invariant_is_broken() -> None:
    """A test that damages the shard on purpose is told what does not hold."""
    shard = training()
    say(shard, push(0, 0))
    shard._open[1] = shard._open[0]
    with pytest.raises(AssertionError, match="a full round is closed"):
        shard.validate()
