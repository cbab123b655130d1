"""Rounds: one push to every shard, one answer from every shard, and means that leave the model as it is."""

import re
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from thresher.deploy.in_process import in_process
from thresher.protos.consistency import Consistency
from thresher.protos.errors import RoundFailedError
from thresher.protos.update import Update
from thresher.worker import Method, Session


def begin(session: Session, size: int = 7) -> tuple[nn.Module, torch.optim.SGD]:
    model = nn.Linear(size, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session.wrap(model, optimizer)
    return model, optimizer


def test_the_mean_of_what_the_workers_bring() -> None:
    """Whole again over all shards, equal everywhere, summed in rank order and divided by the members."""

    def work(session: Session) -> Tensor:
        begin(session)
        mean = session._rounds.mean(torch.arange(8.0) * (session.rank + 1))
        assert mean is not None
        return mean

    with in_process(shards=3, workers=2) as cluster:
        for found in cluster.run(work):
            assert torch.equal(found, torch.arange(8.0) * 1.5)


@pytest.mark.parametrize("consistency", [Consistency(), Consistency("async")], ids=Consistency.describe)
def test_an_agreement_that_one_never_asks_for(consistency: Consistency) -> None:
    """The other is told by the shards who is missing, in which agreement, and what to do."""
    told = threading.Event()
    found: list[str] = []

    def work(session: Session) -> None:
        begin(session)
        if session.rank == 1:
            assert told.wait(60)
            return
        try:
            session.mean({"loss": 1.0})
        except RoundFailedError as error:
            found.append(str(error))
        told.set()

    failed = pytest.raises(RoundFailedError)  # the one that never asked finds so when it leaves
    served = in_process(shards=2, workers=2, consistency=consistency, round_timeout=0.4, lease=0.1)
    with served as cluster, failed:
        cluster.run(work)
    assert re.search(
        r"agreement 0 of shard [01] was open for .* worker 1 \(.*\) is connected but has not asked", found[0]
    )
    assert "All must ask alike, in mean() and stop(). Look at the log of who is missing" in found[0]


def test_a_mean_leaves_the_model_and_its_optimizer_as_they_are() -> None:
    """It is a round of the log: versions move, parameters and momenta do not, and densities don't see it."""

    def work(session: Session) -> tuple[Tensor, Tensor, int, int]:
        model = nn.Linear(7, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
        session.wrap(model, optimizer)
        for step in range(2):
            model.weight.grad = torch.ones(1, 7)
            optimizer.step()
            if step == 0:
                session._rounds.mean(torch.full((7,), 100.0))
        momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
        return model.weight.detach(), momentum, session.step, session._rounds.number

    with in_process(shards=2, workers=2, method=Method(threshold=0.5)) as cluster:
        for weight, momentum, steps, rounds in cluster.run(work):
            assert torch.equal(weight, torch.full((1, 7), -2.5))
            assert torch.equal(momentum, torch.full((1, 7), 1.5))
            assert (steps, rounds) == (2, 3)
        for shard in cluster.statistics():
            assert shard.version == 3
            assert {member.pushed_elements for member in shard.members} == {2 * shard.numel}
            assert {member.pushable_elements for member in shard.members} == {2 * shard.numel}


def test_what_was_pushed_is_in_the_update() -> None:
    """Each worker learns how many elements, in how many bytes, all of them pushed: what a budget counts."""

    def work(session: Session) -> tuple[int, int]:
        model, optimizer = begin(session)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(session.rank))  # rank 0 has nothing to send
        found: list[Update] = []
        adopt = session._selecting.adopt

        def listen(updates: Sequence[Update], pulled_bytes: int = 0) -> None:
            found.extend(updates)
            adopt(updates, pulled_bytes)

        session._selecting.adopt = listen  # type: ignore[method-assign]
        optimizer.step()
        return sum(update.pushed_elements for update in found), sum(update.push_bytes for update in found)

    with in_process(shards=2, workers=3, method=Method(threshold=0.5)) as cluster:
        results = cluster.run(work)
        pushed = sum(member.push_bytes for shard in cluster.statistics() for member in shard.members)
    assert set(results) == {(2 * 8, pushed)}
