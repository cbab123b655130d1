"""What a full round comes to: the update that everybody replays, and the line of the per-iteration file."""

from dataclasses import replace

import pytest
import torch

from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.sparse import SparseGradient
from thresher.server.aggregation import learning_rate_of, row_of, update_of
from thresher.server.events import Push, Worker


def push(rank: int, gradient: SparseGradient | None, presence: tuple[bool, ...] = (True, True)) -> Push:
    return Push(Worker(rank, 1), 3, 3, gradient, presence, residual_squared=rank + 1.0, wire_bytes=10 * (rank + 1))


ONES = SparseGradient.dense(torch.ones(4))


def test_presence_is_the_union_of_those_that_were_heard() -> None:
    """A tensor is stepped when one contributor has a gradient for it; who skips says nothing about it."""
    pushes = [push(0, ONES, (False, True)), push(1, ONES, (False, True)), push(2, None, (True, True))]
    update = update_of(pushes, 3, 4, None)
    assert update.presence == (False, True)
    assert update.contributors == (0, 1)
    assert update_of([*pushes[:2], push(2, ONES, (True, False))], 3, 4, None).presence == (True, True)


def test_a_skipped_push_counts_in_the_divisor_with_weight_zero() -> None:
    """Arrival counts, the gradient does not: one of two workers skipping halves the step."""
    update = update_of([push(0, ONES), push(1, None)], 2, 4, None)
    assert update.mean is not None
    assert update.mean.densify().tolist() == [0.5] * 4


def test_when_all_skip_there_is_no_mean() -> None:
    """The version moves, the model does not, and no tensor counts as absent."""
    update = update_of([push(0, None, (False, False)), push(1, None, (False, True))], 2, 4, 0.5)
    assert update.mean is None
    assert (update.version, update.contributors, update.presence) == (4, (), (True, True))
    assert update.next_threshold == 0.5


def test_the_first_proposed_threshold_is_taken_else_the_old_one_stays() -> None:
    """Rank 0 proposes; a round in which it says nothing keeps what is in force."""
    assert update_of([replace(push(0, ONES), next_threshold=0.25), push(1, ONES)], 2, 4, 0.5).next_threshold == 0.25
    assert update_of([push(0, ONES), push(1, ONES)], 2, 4, 0.5).next_threshold == 0.5


def test_a_row_sums_the_round() -> None:
    """Elements and bytes are sums, densities fractions of members times slice, the residual a mean."""
    pushes = [push(0, SparseGradient(torch.tensor([1]), torch.tensor([1.0]), 4)), push(1, ONES), push(2, None)]
    update = update_of(pushes, 3, 4, 0.5)
    row = row_of(update, pushes, shard=1, numel=4, threshold=0.25, learning_rate=0.1, round_seconds=1.5)
    assert (row.shard, row.version, row.members, row.contributors, row.skipped) == (1, 4, 3, (0, 1), False)
    assert (row.pushed_elements, row.push_density, row.push_bytes) == (5, 5 / 12, 60)
    assert (row.update_elements, row.update_density) == (4, 1.0)
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
