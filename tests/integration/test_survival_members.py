"""A member that dies where rounds close by a quorum: the others go on at every shard, and nothing is lost."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.training import abandon
from torch import Tensor, nn

from thresher.deploy.in_process import in_process
from thresher.protos.consistency import Consistency
from thresher.protos.layout import Layout, Slice, TensorSpec
from thresher.server.facts import Closed, record_from_bytes
from thresher.server.history import read_history
from thresher.worker import Method, Session

SIZE, WORKERS, DEAD = 30, 3, 2


@dataclass(frozen=True)
class Trained:
    """What one worker computed, and what of it was never sent."""

    inputs: Tensor
    residual: Tensor
    steps: int


def train(session: Session) -> Trained:
    """Push until the dead member does not belong to the run any more, and a little longer; the dead one dies."""
    model = nn.Linear(SIZE, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    inputs, generator, left = torch.zeros(SIZE), torch.Generator().manual_seed(session.rank), 4
    while left:
        # Multiples of 6, so that sums, and means over 3, 2 or 1 members, are exact.
        values = 6.0 * torch.randint(-3, 4, (SIZE,), generator=generator)
        inputs += values
        model.weight.grad = values.view(1, SIZE)
        optimizer.step()
        left -= session.rank == DEAD or DEAD not in session._rounds.membership.ranks
        time.sleep(0.01)  # so that a lease is tens of steps and not hundreds
    residual = session.residual.clone()
    if session.rank == DEAD:
        abandon(session)
    else:
        session.close()
    return Trained(inputs, residual, session.step)


def closed_rounds(folder: Path, piece: Slice) -> list[Closed]:
    """All rounds that the journal of a shard has on record."""
    records = [record_from_bytes(data, piece) for _, data in read_history(folder).records()]
    return [record for record in records if isinstance(record, Closed)]


@pytest.mark.parametrize("quorum", [2, 3])
def test_a_quorum_outlives_a_member(quorum: int, tmp_path: Path) -> None:
    """Within its lease it is a part of the divisor, and rounds below the quorum wait; then it is of neither.

    Sum of applied means · their members + all residuals, that of the dead one included, = sum of all inputs, exactly.
    """
    consistency = Consistency(quorum=quorum, grace=0.02)
    options: dict[str, Any] = {
        "method": Method(threshold=13.0),
        "consistency": consistency,
        "state_dir": tmp_path,
        "lease": 0.3,
    }
    with in_process(shards=2, workers=WORKERS, **options) as cluster:
        results = cluster.run(train)
        steps = [[member.steps for member in shard.members] for shard in cluster.statistics()]
        states = [[member.state for member in shard.members] for shard in cluster.statistics()]
    pieces = Layout((TensorSpec("weight", (1, SIZE), "float32"),)).slices(2)
    rounds = [closed_rounds(tmp_path / f"shard-{shard}", piece) for shard, piece in enumerate(pieces)]
    assert states == [["left", "left", "lost"]] * 2
    assert steps == [[one.steps for one in results]] * 2
    sent = torch.zeros(SIZE)
    for piece, closed in zip(pieces, rounds, strict=True):
        updates = [one.sealed.update for one in closed]
        assert [update.version for update in updates] == list(range(1, len(updates) + 1))
        assert updates[0].members == WORKERS
        assert WORKERS - 1 in [update.members for update in updates]
        for update in updates:
            if update.mean is not None:
                sent[piece.begin : piece.end] += update.mean.densify() * update.members
    assert torch.equal(sent, sum((one.inputs - one.residual for one in results), torch.zeros(SIZE)))
