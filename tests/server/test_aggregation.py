"""What a full round comes to: the update that everybody replays, and the line of the per-iteration file."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.consistency import Consistency
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sealed import sealed
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Update
from thresher.server.aggregation import closed_round, learning_rate_of, row_of, update_of
from thresher.server.events import Push, Worker


def push(rank: int, gradient: SparseGradient | None, presence: tuple[bool, ...] = (True, True)) -> Push:
    return Push(Worker(rank, 1), 3, 3, gradient, presence, residual_squared=rank + 1.0, wire_bytes=10 * (rank + 1))


ONES = SparseGradient.dense(torch.ones(4))


SGD = OptimizerSpec("SGD", ({"lr": 1.0, "momentum": 0.25},))
LOCKSTEP = Consistency()


IN_FORCE = (Override(0, "lr", 0.125),)


def combined(
    pushes: list[Push], members: int, threshold: float | None = None, consistency: Consistency = LOCKSTEP
) -> Update:
    return update_of(pushes, members, 4, threshold, None, overrides=IN_FORCE, consistency=consistency, spec=SGD)


def test_presence_is_the_union_of_those_that_were_heard() -> None:
    """A tensor is stepped when one contributor has a gradient for it; who skips says nothing about it."""
    pushes = [push(0, ONES, (False, True)), push(1, ONES, (False, True)), push(2, None, (True, True))]
    update = combined(pushes, 3)
    assert update.presence == (False, True)
    assert update.contributors == (0, 1)
    assert combined([*pushes[:2], push(2, ONES, (True, False))], 3).presence == (True, True)


def test_a_skipped_push_counts_in_the_divisor_with_weight_zero() -> None:
    """Arrival counts, the gradient does not: one of two workers skipping halves the step."""
    update = combined([push(0, ONES), push(1, None)], 2)
    assert update.mean is not None
    assert update.mean.densify().tolist() == [0.5] * 4


def test_when_all_skip_there_is_no_mean() -> None:
    """The version moves, the model does not, and no tensor counts as absent."""
    update = combined([push(0, None, (False, False)), push(1, None, (False, True))], 2, 0.5)
    assert update.mean is None
    assert (update.version, update.contributors, update.presence) == (4, (), (True, True))
    assert update.next_threshold == 0.5


def test_the_first_proposed_threshold_is_taken_else_the_old_one_stays() -> None:
    """Rank 0 proposes; a round in which it says nothing keeps what is in force."""
    assert combined([replace(push(0, ONES), next_threshold=0.25), push(1, ONES)], 2, 0.5).next_threshold == 0.25
    assert combined([push(0, ONES), push(1, ONES)], 2, 0.5).next_threshold == 0.5


def test_who_follows_does_not_say_what_is_in_force() -> None:
    """Where nobody else is there to say it, that stays; nor does a push that is lost say anything."""
    mine, theirs = (Override(0, "lr", 0.5),), (Override(0, "lr", 0.25),)
    follows = replace(push(0, ONES), overrides=mine, follows=True)
    assert combined([follows, replace(push(1, ONES), overrides=theirs)], 2).overrides == theirs
    assert combined([follows], 1).overrides == IN_FORCE
    assert combined([replace(push(0, None), lost=True)], 1).overrides == IN_FORCE


def test_a_row_sums_the_round() -> None:
    """Elements and bytes are sums, densities fractions of pushes times slice, the residual a mean."""
    pushes = [push(0, SparseGradient(torch.tensor([1]), torch.tensor([1.0]), 4)), push(1, ONES), push(2, None)]
    update = combined(pushes, 3, 0.5)
    closed = closed_round(sealed(update, b""), pushes, threshold=0.25, version=5, round_seconds=1.5)
    row = row_of(replace(closed, deliveries=((0, 30), (2, 12))), 1, 4, OptimizerSpec("SGD", ({"lr": 0.1},)))
    assert (row.shard, row.version, row.members, row.contributors, row.skipped) == (1, 4, 3, (0, 1), False)
    assert (row.pushed_elements, row.push_density, row.push_bytes) == (5, 5 / 12, 60)
    assert (row.update_elements, row.update_density) == (4, 1.0)
    assert (row.pull_bytes, row.staleness) == (42, 2)
    assert (row.residual_squared, row.threshold, row.learning_rate, row.round_seconds) == (2.0, 0.25, 0.1, 1.5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), 0.1), ((Override(0, "lr", 0.3),), 0.3), ((Override(1, "lr", 0.3), Override(0, "momentum", 0.4)), 0.1)],
)
def test_the_learning_rate_is_the_first_groups(overrides: tuple[Override, ...], expected: float) -> None:
    """What a display shows is the first group's rate as it was in force."""
    spec = OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 0.0}, {"lr": 0.2, "momentum": 0.0}))
    assert learning_rate_of(spec, overrides) == expected


def test_an_optimizer_without_a_rate_has_none() -> None:
    """Finished updates carry their rate inside."""
    assert learning_rate_of(OptimizerSpec("Subtract", ({},)), ()) is None


def test_out_of_lockstep_the_update_says_who_arrived() -> None:
    """Heard or skipped, with its step: a worker finds its push in it."""
    pushes = [push(0, ONES), replace(push(2, None), step=1)]
    membership = Membership(3, (0, 2))
    update = update_of(pushes, 3, 4, None, membership, overrides=(), consistency=Consistency("async"), spec=SGD)
    assert (update.arrivals, update.contributors, update.membership) == (((0, 3), (2, 1)), (0,), membership)
    assert combined(pushes, 3).arrivals == ()


def test_more_pushes_than_members_divide_by_the_pushes() -> None:
    """Who is being let in counts already, and the update says by how much was divided."""
    update = combined([push(0, ONES), push(1, ONES), push(2, None)], 1)
    assert update.mean is not None
    assert (update.members, update.mean.values.tolist()) == (3, [pytest.approx(2 / 3)] * 4)


def test_the_newest_push_says_what_is_in_force() -> None:
    """Who is late has the schedule of its step, and a stand-in for a lost push has none."""
    rate = (Override(0, "lr", 0.5),)
    late, newest = push(0, ONES), replace(push(1, ONES), version=5, overrides=rate)
    stand_in = replace(push(2, None), version=9, lost=True)
    assert combined([late, newest, stand_in], 3).overrides == rate


def test_where_each_push_is_a_round_its_density_is_its_own() -> None:
    """One of four pushes every element: that is a density of 1, not of a quarter."""
    pushes = [push(0, ONES)]
    update = combined(pushes, 4, consistency=Consistency("async"))
    closed = closed_round(sealed(update, b""), pushes, threshold=None, version=3, round_seconds=0.0)
    assert row_of(closed, 0, 4, SGD).push_density == 1.0


@given(members=st.integers(1, 8), staleness=st.integers(0, 20))
def test_a_stale_push_is_divided_by_its_staleness(members: int, staleness: int) -> None:
    """Law: a gradient weighs 1/max(N, τ); as long as it is not staler than there are members, nothing changes."""
    version = 21
    stale = replace(push(0, ONES), version=version - 1 - staleness)
    updates = [
        update_of([stale], members, version, None, None, overrides=(), consistency=consistency, spec=SGD)
        for consistency in (Consistency("async", staleness_aware=True), Consistency("async"))
    ]
    weighed, plain = updates
    assert weighed.mean is not None
    assert weighed.mean.values.tolist() == [pytest.approx(1 / max(members, staleness))] * 4
    assert weighed.members == max(members, staleness)
    if staleness <= members:
        assert sealed(weighed, b"").update.digest == sealed(plain, b"").update.digest


def test_momentum_per_push_is_that_of_the_members_however_stale_the_push() -> None:
    """What everybody replays has the numbers of the push; the divisor of a stale one is no number of members."""
    consistency = Consistency("async", momentum_per_push=True, staleness_aware=True)
    stale = replace(push(0, ONES), version=0, overrides=(Override(0, "lr", 3.0),))
    update = update_of([stale], 2, 9, None, None, overrides=(), consistency=consistency, spec=SGD)
    assert update.members == 8
    assert update.overrides == (Override(0, "lr", 3.0 * (0.5 / 0.75)), Override(0, "momentum", 0.5))
    alone = update_of(
        [stale], 1, 9, None, None, overrides=(), consistency=Consistency("async", momentum_per_push=True), spec=SGD
    )
    assert alone.overrides == stale.overrides
