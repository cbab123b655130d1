"""Sizes and lengths beyond everyday: models of many chunks, runs of many rounds. `make test-slow` runs them."""

import gc
import resource

import pytest
import torch
from torch import nn

from thresher.deploy.in_process import in_process
from thresher.worker import Method, Session

pytestmark = pytest.mark.slow


def memory_mb() -> float:
    """Return the largest resident memory this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.timeout(600)
@pytest.mark.parametrize("threshold", [0.0, 1e-3])
def test_a_shard_of_a_hundred_million_parameters(threshold: float) -> None:
    """One shard, two workers, 100 M elements: every element arrives, in hundreds of chunks up and down."""
    numel = 100_000_000

    def work(session: Session) -> float:
        model = nn.ParameterDict({"x": nn.Parameter(torch.zeros(numel))})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
        gradient = torch.full((numel,), 0.5)
        gradient[:: 1 if threshold == 0.0 else 1000] = float(session.rank + 1)
        if threshold:
            gradient[gradient == 0.5] = threshold / 4
        model["x"].grad = gradient
        optimizer.step()
        value: float = model["x"].detach()[::1000].mean().item()
        return value

    with in_process(shards=1, workers=2, method=Method(threshold=threshold), round_timeout=300.0) as cluster:
        values = cluster.run(work)
        assert cluster.statistics()[0].numel == numel
    assert values == [-1.5, -1.5]


@pytest.mark.timeout(600)
def test_five_thousand_dense_rounds_do_not_eat_the_machine() -> None:
    """The log is cut as workers read it: memory after 5,000 rounds is what it was after 500."""
    seen: list[float] = []

    def work(session: Session) -> None:
        model = nn.Linear(250, 200)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        session.wrap(model, optimizer)
        generator = torch.Generator().manual_seed(session.rank)
        for step in range(5000):
            optimizer.zero_grad()
            model(torch.randn(4, 250, generator=generator)).square().mean().backward()
            optimizer.step()
            if session.rank == 0 and step + 1 in (500, 5000):
                gc.collect()
                seen.append(memory_mb())

    with in_process(shards=2, workers=2, method=Method(threshold=0.0)) as cluster:
        cluster.run(work)
        assert max(shard.log_bytes for shard in cluster.statistics()) < 1 << 20
    # 4,500 more rounds carry 1.8 GB; what stays of them is noise of the allocator.
    assert seen[1] - seen[0] < 50
