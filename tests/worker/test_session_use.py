"""What a session refuses, and what it draws: wrong models, wrong moments, keyed randomness."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.worker.training import Scale, set_gradients, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thresher.deploy.in_process import InProcess, in_process
from thresher.protos.errors import (
    ConfigurationError,
    LayoutError,
    OptimizerError,
    ProtocolError,
)
from thresher.worker import Method, Session, Settings, connect


def alone(cluster: InProcess, work: Callable[[Session], Any]) -> Any:
    """Run with one worker, and return its result."""
    return cluster.run(work)[0]


# What is refused


def refused(
    model: nn.Module, optimizer: torch.optim.Optimizer, error: type[Exception], text: str, shards: int = 1
) -> None:
    """Expect `wrap` to fail before anything is registered."""
    with in_process(shards=shards, workers=1) as cluster:
        with pytest.raises(error, match=text), cluster.connect(0) as session:
            session.wrap(model, optimizer)
        assert all(not shard.model_numel for shard in cluster.statistics())


def test_more_shards_than_elements() -> None:
    """The message says how many there are of each."""
    model = Scale(1)
    refused(model, sgd(model), ConfigurationError, "3 shards are more than the model's 2 trained elements", shards=3)


def test_no_trainable_parameter() -> None:
    """A model whose parameters are all frozen has nothing to send."""
    model = Scale().requires_grad_(False)
    refused(model, torch.optim.SGD(model.parameters(), lr=1.0), LayoutError, "no trainable parameter")


@pytest.mark.parametrize("name", ["SparseAdam", "LBFGS", "NAdam"])
def test_unsupported_optimizers(name: str) -> None:
    """The message names it and lists those that the shards apply."""
    model = Scale()
    optimizer = getattr(torch.optim, name)(model.parameters())
    refused(model, optimizer, OptimizerError, rf"{name}.*they apply SGD, Adam, AdamW, Adagrad, RMSprop$")


def test_a_subclass_of_a_supported_optimizer() -> None:
    """It may do anything in its step, so it is not taken for its base class."""

    class MySGD(torch.optim.SGD):
        pass

    model = Scale()
    refused(model, MySGD(model.parameters(), lr=1.0), OptimizerError, "MySGD")


def test_a_tensor_of_another_model() -> None:
    """An optimizer that holds a tensor from elsewhere would train what nobody lays out."""
    optimizer = torch.optim.SGD([*Scale().parameters()], lr=1.0)
    refused(Scale(), optimizer, LayoutError, "2 tensors that are not parameters of the model")


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_a_parameter_group_that_is_added_later(placement: Any) -> None:
    """It is refused at the next step, before anything is sent or put into the residual."""

    def work(session: Session) -> None:
        model = Scale()
        optimizer = torch.optim.SGD([model.weight], lr=1.0)
        session.wrap(model, optimizer)
        optimizer.add_param_group({"params": [model.bias]})
        model.weight.grad = torch.ones(2)
        with pytest.raises(OptimizerError, match="added or removed after the optimizer was wrapped"):
            optimizer.step()
        assert sum(session.statistics().push_bytes) == 0
        assert not session.residual.any()

    with in_process(shards=1, workers=1, method=Method(threshold=5.0, placement=placement)) as cluster:
        alone(cluster, work)


def test_wrapping_twice() -> None:
    """One session is for one model."""

    def work(session: Session) -> None:
        model = Scale()
        session.wrap(model, sgd(model))
        with pytest.raises(ProtocolError, match="one session for one model"):
            session.wrap(model, sgd(model))

    with in_process(shards=1, workers=1) as cluster:
        alone(cluster, work)


def test_use_after_close() -> None:
    """A closed session neither steps nor wraps, says so, and may be closed again."""
    with in_process(shards=1, workers=1) as cluster:
        session = cluster.connect(0)
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        session.close()
        session.close()
        session.abort("too late")
        set_gradients(model, 1.0)
        with pytest.raises(ProtocolError, match="closed"):
            optimizer.step()
        assert torch.equal(model.weight, torch.ones(2))
        assert cluster.statistics()[0].state == "finished"

    with in_process(shards=1, workers=1) as cluster:
        session = cluster.connect(0)
        session.close()
        with pytest.raises(ProtocolError, match="closed"):
            session.wrap(model, sgd(model))
        assert cluster.statistics()[0].model_numel == 0


def test_use_before_wrapping() -> None:
    """Without a model there is no residual; rank, step and statistics are known."""
    session = connect(settings=Settings(("127.0.0.1:1",), rank=1, workers=3))
    assert (session.rank, session.workers, session.step, session.statistics().steps) == (1, 3, 0, 0)
    with pytest.raises(ProtocolError, match="wrap an optimizer first"):
        _ = session.residual
    session.close()


def test_connect_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``connect()`` takes everything from THRESHER_*, and an argument wins over THRESHER_SHARDS."""
    settings = Settings(("127.0.0.1:1", "127.0.0.1:2"), rank=2, workers=4, method=Method(threshold=0.5))
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert connect()._settings == settings
    assert connect("127.0.0.1:7")._settings == replace(settings, addresses=("127.0.0.1:7",))


def test_an_address_beyond_this_machine_must_be_asked_for() -> None:
    """Plain text over a network is refused before anything is sent, unless the settings allow it."""
    settings = Settings(("192.0.2.1:5000",), rank=0, workers=1)
    with pytest.raises(ConfigurationError, match="THRESHER_INSECURE"):
        connect(settings=settings)
    connect(settings=replace(settings, insecure=True)).close()


# Data and randomness


def test_batches_key_randomness_by_seed_rank_and_step() -> None:
    """What a step draws depends on (seed, rank, step) and on its place in the step, not on what was drawn before."""

    def drawn(cluster: InProcess, rank: int, draws: int, seed: int = 0) -> list[list[float]]:
        session = connect(settings=Settings(cluster.addresses, rank, 2, seed=seed))
        loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=1)
        found = []
        for _ in session.batches(loader):
            found.append(torch.rand(1).tolist())
            torch.rand(draws)
        return found

    with in_process(shards=1, workers=2) as cluster:
        reference = drawn(cluster, 0, draws=1)
        assert drawn(cluster, 0, draws=7) == reference
        assert len({value for (value,) in reference}) == len(reference), "batches of one step repeat each other"
        for other in (drawn(cluster, 1, draws=1), drawn(cluster, 0, draws=1, seed=1)):
            assert not {value for (value,) in other} & {value for (value,) in reference}


def test_randomness_of_a_step_is_its_own() -> None:
    """Two sessions that made the same number of steps draw the same in the next, however they came there."""

    def work(session: Session) -> list[float]:
        model = Scale()
        optimizer = sgd(model)
        session.wrap(model, optimizer)
        loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2, shuffle=True)
        found = []
        for _ in range(2):
            for (batch,) in session.batches(loader):
                found.append(float(torch.rand(()) + batch.sum()))
                set_gradients(model, 1.0)
                optimizer.step()
        return found

    runs = []
    for before in (1, 2):
        torch.manual_seed(before)
        with in_process(shards=1, workers=1) as cluster:
            runs.append(alone(cluster, work))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6
