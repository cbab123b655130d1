"""Real processes under DistributedDataParallel: the parameter server's bits, resumption, and what ends a run."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ddp.ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thresher.ddp import CompressionState, compress
from thresher.deploy.in_process import in_process
from thresher.worker import Method, Session

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_digits.py"
FEATURES, CLASSES, BATCH = 6, 3, 5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


def network() -> nn.Module:
    """Always the same weights; torch's own generator belongs to all threads."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.3))
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def hooked(method: str, **options: Any) -> tuple[DistributedDataParallel, torch.optim.Optimizer, CompressionState]:
    model = DistributedDataParallel(network(), **options)
    state = CompressionState(model, method)
    model.register_comm_hook(state, compress)
    return model, sgd(model), state


def train_hooked(method: str, steps: int, cap: float) -> list[Tensor]:
    model, optimizer, state = hooked(method, bucket_cap_mb=cap)
    for step in range(steps):
        take_step(model, optimizer, dist.get_rank(), step)
    assert state.statistics().density > 0
    return values(model)


def train_served(session: Session, steps: int) -> list[Tensor]:
    model = network()
    optimizer = sgd(model)
    session.wrap(model, optimizer)
    for step in range(steps):
        take_step(model, optimizer, session.rank, step)
    return values(model)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Equal bits are promised for an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("method", ["HardThreshold(0.05)", "Identity()", "TopK(0.1)", "RandomK(0.1)"])
def test_parameters_are_those_of_a_parameter_server(ranks: Ranks, method: str, workers: int) -> None:
    """Bit for bit, for the same model, data and layer-wise method: the mean is the same sum in rank order."""
    with in_process(shards=2, workers=workers, method=Method(f"LayerWise({method})")) as cluster:
        served = cluster.run(lambda session: train_served(session, 6))
    for cap in (1e-4, 25.0):
        hooked = ranks.run(train_hooked, method, 6, cap, workers=workers)
        assert all(equal(parameters, served[0]) for parameters in hooked)


def train_and_save(method: str, first: int, last: int, folder: str) -> list[Tensor]:
    """Steps ``first`` … ``last`` - 1, from what was saved before to what is saved after them."""
    model, optimizer, state = hooked(method)
    path = Path(folder) / f"{dist.get_rank()}.pt"
    if first:
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.load_state_dict(saved["compression"])
    for step in range(first, last):
        take_step(model, optimizer, dist.get_rank(), step)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "compression": state.state_dict()}
    torch.save(saved, path)
    return values(model)


def test_new_processes_go_on_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Six steps are three steps, a file, new processes, and three more."""
    folders = {method: tmp_path / method for method in ("HardThreshold(0.1)", "TopK(0.1)")}
    straight = {}
    for method, folder in folders.items():
        folder.mkdir()
        straight[method] = ranks.run(train_and_save, method, 0, 6, str(folder), workers=2)
        ranks.run(train_and_save, method, 0, 3, str(folder), workers=2)
    with Ranks(2) as others:
        for method, folder in folders.items():
            resumed = others.run(train_and_save, method, 3, 6, str(folder))
            assert all(equal(one, other) for one, other in zip(straight[method], resumed, strict=True))


def train_until_one_dies() -> None:
    model, optimizer, _ = hooked("HardThreshold(0.1)")
    for step in range(4):
        if step == 2 and dist.get_rank() == 1:
            os._exit(1)
        take_step(model, optimizer, dist.get_rank(), step)


def test_a_worker_that_dies_ends_the_others(ranks: Ranks) -> None:
    """Gloo notices that the connection is gone; nobody waits for what will not come."""
    outcomes = ranks.outcomes(train_until_one_dies, workers=3)
    assert isinstance(outcomes[1], EOFError)
    assert all(isinstance(outcomes[rank], RuntimeError) for rank in (0, 2))


def test_the_example_runs() -> None:
    """Under torchrun, as its first lines say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    done = run([*command, "--epochs", "2"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
