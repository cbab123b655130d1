"""The shard: the dialogues that a reader wants to see first. Modes, recovery and bad days have files of their own."""

from dataclasses import replace

import pytest
import torch
from tests.server.dialogues import (
    CONFIG,
    LAYOUT,
    LOCKSTEP,
    NUMEL,
    close_round,
    hello,
    history_of,
    leave,
    of,
    only,
    parameters,
    push,
    register,
    say,
    seed,
    snapshot_of,
    training,
)

from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError, LayoutError, OptimizerError, ProtocolError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.update import Membership
from thresher.server import effects, events
from thresher.server.effects import Effect
from thresher.server.events import History, Verdict, Worker
from thresher.server.shard import Shard

# --- joining -----------------------------------------------------------------------------------------------


def test_a_run_begins() -> None:
    """An example to read: two workers register, rank 0 seeds, both say hello, and the shard trains."""
    shard = Shard(CONFIG)
    assert shard.statistics().state == "waiting for workers"
    answer = only(effects.Registered, say(shard, register(1)))
    assert (answer.history, answer.seeded, answer.settled) == (History(run=7), False, 0)
    assert answer.membership == Membership(0, (0, 1))
    say(shard, register(0))
    assert shard.statistics().state == "waiting for the seed"
    say(shard, seed(values=2.0))
    assert only(effects.Registered, say(shard, register(1))).seeded
    for rank in (0, 1):
        assert say(shard, hello(rank)) == [effects.Backlog(())]
    assert shard.statistics().state == "training"
    assert parameters(shard) == [2.0] * 4


def test_the_first_worker_says_how_many_there_are_where_nobody_else_has() -> None:
    """Where the shards are started by somebody who does not start the workers."""
    shard = Shard(replace(CONFIG, workers=0))
    assert shard.statistics().state == "waiting for workers"
    answer = only(effects.Registered, say(shard, register(1, workers=3)))
    assert answer.membership == Membership(0, (0, 1, 2))
    for rank in (0, 2):
        say(shard, register(rank, workers=3))
    say(shard, seed())
    for rank in range(3):
        say(shard, hello(rank))
    assert shard.statistics().state == "training"


def test_the_second_seed_is_ignored() -> None:
    """Seeding is safe to repeat: the first one wins."""
    shard = training(seeded=1.0)
    assert say(shard, seed(values=9.0)) == [effects.Seeded(accepted=False)]
    assert parameters(shard) == [1.0] * 4


def test_only_rank_0_seeds() -> None:
    """The starting values are one worker's."""
    shard = Shard(CONFIG)
    say(shard, register(1))
    with pytest.raises(ProtocolError, match="rank 0 seeds the shards, not worker 1"):
        say(shard, seed(1))


@pytest.mark.parametrize("numel", [0, 3, 5])
def test_a_seed_of_another_size_is_refused(numel: int) -> None:
    """Nothing is begun with values that do not fit; the right ones may follow."""
    shard = Shard(CONFIG)
    say(shard, register(0))
    with pytest.raises(LayoutError):
        say(shard, seed(numel=numel))
    assert only(effects.Seeded, say(shard, seed())).accepted


def test_the_seed_is_on_disk_before_anybody_hears_of_it() -> None:
    """A shard that is killed after it said so must not ask for it again."""
    shard = Shard(CONFIG)
    say(shard, register(0))
    first, second = say(shard, seed())
    assert isinstance(first, effects.Checkpoint)
    assert first.wait
    assert second == effects.Seeded(accepted=True)


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
    say(shard, register(0, environment=("2.5", "AVX2", "1")))
    answer = only(effects.Registered, say(shard, register(1, environment=("2.5", "AVX512", "1"))))
    assert "last bits" in answer.warning
    assert "AVX512" in answer.warning


def test_nothing_can_be_read_or_pushed_before_its_time() -> None:
    """State without a seed, a hello or a seed without a registration, a push before the seed: protocol errors."""
    shard = Shard(CONFIG)
    for event in (events.ReadState(), hello(0), seed()):
        with pytest.raises(ProtocolError):
            say(shard, event)
    say(shard, register(0))
    say(shard, hello(0))
    with pytest.raises(ProtocolError, match="cannot push: it is exchanging, and the shard waiting for workers"):
        say(shard, push(0, 0))


# --- rounds in lockstep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_round_sums_in_rank_order_whoever_comes_first(order: tuple[int, ...]) -> None:
    """Float32 sums depend on their order, so it is the ranks' and not the network's: equal bits for any arrival."""
    values = [1e8, 1.0, -1e8]
    shard = training(workers=3)
    done: list[Effect] = []
    for rank in order:
        done = say(shard, push(rank, 0, values[rank]))
    update = only(effects.Publish, done).sealed.update
    assert update.mean is not None
    expected = (torch.tensor(1e8) + torch.tensor(1.0) + torch.tensor(-1e8)) / 3
    assert torch.equal(update.mean.values, expected.expand(4))


def test_an_update_is_appended_before_it_is_told() -> None:
    """Nobody hears what could be forgotten; the row follows, and the record says who was sent how much."""
    append, publish, row = close_round(training(), (0, 1), 0)
    assert isinstance(append, effects.Append)
    assert isinstance(publish, effects.Publish)
    assert isinstance(row, effects.WriteRow)
    assert publish.ranks == (0, 1)
    assert append.record.deliveries == tuple((rank, publish.sealed.wire_bytes) for rank in (0, 1))  # type: ignore[union-attr]
    assert row.row.pull_bytes == 2 * publish.sealed.wire_bytes


def test_a_row_says_how_long_each_push_has_waited() -> None:
    """From when it came whole until the round was closed; a skipped push waits too, but is no contributor."""
    shard = training(workers=3)
    say(shard, push(0, 0), 1.0)
    say(shard, push(1, 0, None), 2.5)
    done = say(shard, push(2, 0), 4.0)
    assert only(effects.WriteRow, done).row.barrier_seconds == (3.0, 0.0)
    waited = [(member.waits, member.wait_seconds) for member in shard.statistics().members]
    assert waited == [(1, 3.0), (1, 1.5), (1, 0.0)]


@pytest.mark.parametrize("mode", [LOCKSTEP, Consistency(downlink="shadow", shadow_threshold=0.1)], ids=str)
def test_an_update_is_counted_once_for_who_hears_it_later(mode: Consistency) -> None:
    """In lockstep who has pushed and lost its connection hears of the round when it comes back, and no sooner."""
    shard = training(consistency=mode)
    say(shard, push(1, 0))
    say(shard, events.Disconnect(Worker(1, 1)))
    done = say(shard, push(0, 0, 2.0))
    assert only(effects.Publish, done).ranks == (0,)
    pulled = [member.pull_bytes for member in shard.statistics().members]
    before = replace(history_of(shard), version=0, digest=b"")
    (missed,) = only(effects.Backlog, say(shard, hello(1, before))).updates
    assert pulled == [only(effects.Publish, done).sealed.wire_bytes, missed.wire_bytes]
    assert [member.pull_bytes for member in shard.statistics().members] == pulled


def test_the_divisor_is_the_number_of_members_also_after_a_leave() -> None:
    """Three members divide by three; when one has left, by two."""
    shard = training(workers=3)
    assert only(effects.Publish, close_round(shard, range(3), 0, 3.0)).sealed.update.members == 3
    assert parameters(shard) == [-3.0] * 4
    say(shard, leave(2))
    say(shard, push(0, 1, 3.0))
    update = only(effects.Publish, say(shard, push(1, 1, 1.0))).sealed.update
    assert update.mean is not None
    assert (update.members, update.mean.values.tolist()) == (2, [2.0] * 4)


def test_a_leave_closes_a_round_that_waited_for_nobody_else() -> None:
    """Uneven data: the last one to be waited for has none left, and the others go on without it."""
    shard = training()
    say(shard, push(1, 0, 4.0))
    done = say(shard, leave(0))
    assert only(effects.Left, done).version == 0
    publish = only(effects.Publish, done)
    assert (publish.sealed.update.members, publish.sealed.update.contributors) == (1, (1,))
    assert publish.ranks == (1,)  # the one who left reads no more


def test_a_leave_before_the_verdict_on_a_push_is_refused() -> None:
    """What a worker pushed is settled before it goes."""
    shard = training()
    say(shard, push(0, 0))
    with pytest.raises(ProtocolError, match="leaves, but its push of step 0 is open"):
        say(shard, leave(0))


def test_a_leave_is_safe_to_repeat() -> None:
    """Its answer may have been lost: the same life may say hello and leave again, which counts it nowhere."""
    shard = training()
    say(shard, leave(1))
    assert say(shard, leave(1)) == [effects.Left(0)]
    assert say(shard, hello(1)) == [effects.Backlog(())]
    assert say(shard, leave(1)) == [effects.Left(0)]
    assert only(effects.Publish, close_round(shard, [0], 0)).sealed.update.members == 1
    with pytest.raises(ProtocolError, match="cannot push: it is left"):
        say(shard, push(1, 1))


def test_when_all_skip_the_version_moves_and_the_model_does_not() -> None:
    """Also not by its momentum."""
    shard = training()
    close_round(shard, (0, 1), 0)
    say(shard, push(0, 1, None))
    done = say(shard, push(1, 1, None))
    assert only(effects.Publish, done).sealed.update.mean is None
    assert only(effects.WriteRow, done).row.skipped
    assert (shard.statistics().version, parameters(shard)) == (2, [-1.0] * 4)
    close_round(shard, (0, 1), 2)
    assert parameters(shard) == [-2.5] * 4  # momentum 0.5 of one step ago, not of two


def test_a_mean_alone_moves_the_version_and_nothing_else() -> None:
    """The mean comes back in the update; model, momentum, densities and residuals are as if it had not been."""
    shard = training()
    for rank in (0, 1):
        say(shard, push(rank, 0, residual_squared=1.0))
    row = shard.statistics().last_row
    assert row is not None
    say(shard, push(0, 1, 3.0, only_mean=True, residual_squared=1.0))
    done = say(shard, push(1, 1, 3.0, only_mean=True, residual_squared=1.0))
    update = only(effects.Publish, done).sealed.update
    assert update.mean is not None
    assert (update.only_mean, update.mean.values.tolist()) == (True, [3.0] * 4)
    assert only(effects.WriteRow, done).row.only_mean
    now = shard.statistics()
    assert (now.version, parameters(shard), now.residual_squared_total) == (2, [-1.0] * 4, 1.0)
    assert now.last_row == row
    assert {(m.pushed_elements, m.pushable_elements) for m in now.members} == {(4, 4)}
    close_round(shard, (0, 1), 2)
    assert parameters(shard) == [-2.5] * 4  # momentum 0.5 of the step before the mean


def test_a_schedule_travels_with_the_pushes() -> None:
    """The hyper-parameters in force are those of the round, and the snapshot shows them."""
    shard = training()
    say(shard, push(0, 0, overrides=(Override(0, "lr", 0.25),)))
    done = say(shard, push(1, 0, overrides=(Override(0, "lr", 0.25),)))
    assert only(effects.WriteRow, done).row.learning_rate == 0.25
    assert parameters(shard) == [-0.25] * 4
    assert snapshot_of(shard).optimizer.groups[0]["lr"] == 0.25


def test_once_members_agree_the_round_closes() -> None:
    """Who is REJECTED has pushed nothing, and may push what is right."""
    shard = training()
    say(shard, push(0, 0, overrides=(Override(0, "lr", 0.5),)))
    assert only(effects.Judged, say(shard, push(1, 0))).verdict is Verdict.REJECTED
    assert of(effects.Publish, say(shard, push(1, 0, overrides=(Override(0, "lr", 0.5),))))


def test_an_impossible_override_is_refused() -> None:
    """Before it takes part in anything."""
    with pytest.raises(OptimizerError):
        say(training(), push(0, 0, overrides=(Override(3, "lr", 0.1),)))


def test_the_threshold_of_rank_0_holds_for_the_next_round() -> None:
    """One threshold per run: it travels in the update and stays until another is proposed."""
    shard = training()
    say(shard, push(0, 0, next_threshold=0.25))
    assert only(effects.Publish, say(shard, push(1, 0))).sealed.update.next_threshold == 0.25
    assert only(effects.WriteRow, close_round(shard, (0, 1), 1)).row.threshold == 0.25
    assert (shard.statistics().threshold, snapshot_of(shard).threshold) == (0.25, 0.25)


def test_counters_add_up() -> None:
    """Bytes and elements by worker, residuals by round, and the row agree; verdicts count when a round closes."""
    shard = training()
    say(shard, push(0, 0, residual_squared=4.0))
    assert shard.statistics().verdicts == {"applied": 0, "duplicate": 0, "returned": 0, "rejected": 0}
    say(shard, push(0, 0))
    say(shard, push(0, 0, 2.0))
    row = only(effects.WriteRow, say(shard, push(1, 0, residual_squared=4.0))).row
    now = shard.statistics()
    assert [m.push_bytes for m in now.members] == [100, 100]
    assert [m.pull_bytes for m in now.members] == [row.pull_bytes // 2] * 2
    assert [m.pushed_elements for m in now.members] == [4, 4]
    assert (row.push_bytes, row.pushed_elements) == (200, 8)
    assert now.residual_squared_total == 4.0
    assert now.verdicts == {"applied": 2, "duplicate": 1, "returned": 0, "rejected": 1}
    assert now.last_row == row


def test_the_log_is_cut_at_the_slowest_member() -> None:
    """However long a dense run is, two updates stay in memory when every member has read the rest."""
    shard = training()
    close_round(shard, (0, 1), 0)
    one = shard.statistics().log_bytes
    for step in range(1, 100):
        close_round(shard, (0, 1), step)
    assert shard.statistics().version == 100
    assert shard.statistics().log_bytes <= 2 * one


def test_a_snapshot_is_all_that_a_worker_needs() -> None:
    """Where in the history, the tensors, the layout, who belongs to the run; and a copy."""
    shard = training()
    close_round(shard, (0, 1), 0)
    found = snapshot_of(shard)
    assert (found.history.run, found.history.version, len(found.history.digest)) == (7, 1, 16)
    assert (found.layout, found.membership) == (LAYOUT, Membership(0, (0, 1)))
    assert {"parameters", "untrained.bn.mean"} <= set(found.tensors)
    found.tensors["parameters"].zero_()
    assert parameters(shard) == [-1.0] * NUMEL


def test_buffers_come_with_the_leave_of_who_has_them() -> None:
    """Rank 0 hands over its BatchNorm statistics; they replace those of the seed."""
    shard = training()
    say(shard, leave(0, untrained={"bn.mean": torch.full((2,), 7.0)}))
    assert snapshot_of(shard).tensors["untrained.bn.mean"].tolist() == [7.0, 7.0]


def test_a_run_that_everybody_has_left_is_finished() -> None:
    """Its state can still be read: that is how the final model is saved."""
    shard = training()
    for rank in (0, 1):
        say(shard, leave(rank))
    assert shard.statistics().state == "finished"
    assert parameters(shard) == [0.0] * 4
    assert say(shard, events.Tick(), 1e6) == []


def test_adam_trains_too() -> None:
    """State of the optimizer is made at the first step, and is in the snapshot."""
    adam = OptimizerSpec("Adam", ({"lr": 1.0},))
    shard = Shard(replace(CONFIG, workers=1))
    say(shard, register(0, workers=1, optimizer=adam, consistency=Consistency()))
    for event in (seed(), hello(0), push(0, 0)):
        say(shard, event)
    assert "state.exp_avg.0" in snapshot_of(shard).tensors
