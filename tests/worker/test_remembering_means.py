"""A worker that is killed where the virtual point is evaluated: in rounds of which no push is kept."""

from pathlib import Path

import pytest
import torch
from tests.worker.training import Killed, Scale, cluster, set_gradients, sgd
from torch import Tensor

from thresher.protos import faults
from thresher.worker import Method, Session

STEPS, EVALUATIONS = 4, 2
UPDATES = Method(threshold=0.3, placement="update")


def train(session: Session) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Make steps, and look at the virtual point twice after each."""
    model = Scale(4)
    optimizer = sgd(model, lr=0.1)
    session.wrap(model, optimizer)
    seen: dict[tuple[int, int], Tensor] = {}
    while session.step < STEPS:
        set_gradients(model, 1.0 + session.step + session.rank)
        optimizer.step()
        for number in range(EVALUATIONS):
            with session.evaluating("virtual"):
                seen[session.step, number] = model.weight.detach().clone()
    session.close()
    return model.weight.detach().clone(), seen


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    with cluster(2, 2, method=UPDATES) as served:
        return served.run(train)[0]


@pytest.mark.parametrize(
    ("phase", "count"),
    [
        ("gradient", 4),
        *(("in flight", count) for count in range(13, 19)),  # two shards: a push and two means
        *(("flip", count) for count in range(11, 16)),  # of the push, and before and after each mean
    ],
)
def test_killed_beside_a_mean(
    phase: str, count: int, undisturbed: tuple[Tensor, dict[tuple[int, int], Tensor]], tmp_path: Path
) -> None:
    """A mean that was made is remembered, one that had begun is asked for once more: same model, same points."""
    reached = 0

    def strike(who: str, where: str) -> None:
        nonlocal reached
        reached += (who, where) == ("worker 0", phase)
        if (who, where, reached) == ("worker 0", phase, count):
            reached += 1
            raise Killed

    with cluster(2, 2, tmp_path, method=UPDATES, worker_memory=True) as served, faults.plan(strike):
        results = served.run(train)
        versions = [served.statistics(shard).version for shard in range(2)]
    assert reached > count
    assert versions == [STEPS * (1 + EVALUATIONS)] * 2
    model, points = undisturbed
    for found, seen in results:
        assert torch.equal(found, model)
        assert all(torch.equal(point, points[at]) for at, point in seen.items())
