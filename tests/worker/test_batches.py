"""Shares of a pass: every sample once, everybody the same number of batches, one order for all."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from thresher.deploy.in_process import in_process
from thresher.protos.errors import ConfigurationError
from thresher.worker import batches
from thresher.worker.batches import keyed_batches, keyed_seed, seed_everything, share
from thresher.worker.progress import Progress


def loader_of(size: int, **options: Any) -> "DataLoader[Any]":
    return DataLoader(TensorDataset(torch.arange(size)), **options)


def shares(make: Any, workers: int, *, seed: int = 0, step: int = 0) -> list[list[list[int]]]:
    """Return each rank's batches; each rank has a loader of its own and another state of the global generators."""
    found = []
    for rank in range(workers):
        torch.manual_seed(rank)
        batches = []
        for batch in share(make(), seed=seed, step=step, rank=rank, workers=workers):
            batches.append(torch.as_tensor(batch[0] if isinstance(batch, list) else batch).view(-1).tolist())
            torch.rand(rank)  # what the training draws in between must not matter
        found.append(batches)
    return found


@settings(max_examples=40)
@given(st.integers(4, 30), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans())
def test_every_sample_once(size: int, workers: int, batch_size: int, shuffle: bool, drop_last: bool) -> None:
    """Up to the rest that cannot be dealt evenly, and on every rank the same number of batches of the same sizes."""

    def make() -> "DataLoader[Any]":
        return loader_of(size, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)

    found = shares(make, workers)
    samples = Counter(sample for batches in found for batch in batches for sample in batch)
    assert all(count == 1 for count in samples.values())
    each = size // workers
    assert samples.total() == workers * (each - each % batch_size if drop_last else each)
    assert len({tuple(len(batch) for batch in batches) for batches in found}) == 1


@settings(max_examples=15)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4))
def test_one_order_for_seed_and_step(seed: int, step: int, workers: int) -> None:
    """It is dealt round robin, so the same order comes out for any number of workers; another key, another order."""

    def order(seed: int, step: int, workers: int) -> list[int]:
        found = shares(lambda: loader_of(24, batch_size=1, shuffle=True), workers, seed=seed, step=step)
        return [batches[index][0] for index in range(24 // workers) for batches in found]

    assert order(seed, step, workers) == order(seed, step, 1)
    assert order(seed, step, 1) != order(seed, step + 1, 1)
    assert order(seed, step, 1) != order(seed + 1, step, 1)


class Lazy(BatchSampler):
    """A batch sampler that draws from torch's global generator whenever it is asked."""

    def __init__(self, size: int) -> None:
        super().__init__(SequentialSampler(range(size)), 2, drop_last=False)
        self._size = size

    def __iter__(self) -> Iterator[list[int]]:
        left = list(range(self._size))
        while left:
            yield [left.pop(int(torch.randint(len(left), ()))) for _ in range(min(2, len(left)))]


class Stream(IterableDataset[Tensor]):
    """Samples in an order drawn from the global generators as they are asked for."""

    def __iter__(self) -> Iterator[Tensor]:
        left = list(range(20))
        while left:
            place = int(torch.randint(len(left), ())) if len(left) % 2 else int(np.random.randint(len(left)))  # noqa: NPY002
            yield torch.tensor(left.pop(place))


LOADERS = {
    "sequential": lambda: loader_of(20, batch_size=2),
    "shuffled": lambda: loader_of(20, batch_size=2, shuffle=True),
    "own generator": lambda: loader_of(20, batch_size=2, shuffle=True, generator=torch.Generator()),
    "sampler with a generator": lambda: loader_of(
        20,
        batch_size=2,
        sampler=RandomSampler(range(20), generator=torch.Generator().manual_seed(torch.initial_seed())),
    ),
    "batch sampler": lambda: loader_of(20, batch_sampler=BatchSampler(RandomSampler(range(20)), 2, drop_last=False)),
    "lazy batch sampler": lambda: loader_of(20, batch_sampler=Lazy(20)),
    "no batches": lambda: loader_of(20, batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
}


@pytest.mark.parametrize("name", LOADERS)
def test_all_kinds_of_loaders_are_dealt_without_repetition(name: str) -> None:
    """Whatever the sampler draws from, and whatever state that is in on each rank: each sample once, to one rank."""
    found = shares(LOADERS[name], 2)
    assert sorted(sample for batches in found for batch in batches for sample in batch) == list(range(20))
    assert len(found[0]) == len(found[1])
    assert shares(LOADERS[name], 2) == found


RESIZED: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: loader_of(23, batch_size=2, shuffle=True),
    "uneven": lambda: loader_of(23, batch_size=3, shuffle=True),
    "dropped": lambda: loader_of(23, batch_size=2, shuffle=True, drop_last=True),
    "batch sampler": lambda: loader_of(23, batch_sampler=BatchSampler(RandomSampler(range(23)), 2, drop_last=False)),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
}


def test_a_weighted_sampler_draws_the_same_on_all_ranks() -> None:
    """Sampling with replacement: the ranks' shares interleave to the one sequence that one worker would see."""

    def make() -> "DataLoader[Any]":
        weights = torch.arange(1.0, 21.0).tolist()
        return loader_of(20, batch_size=1, sampler=WeightedRandomSampler(weights, 20, replacement=True))

    one, other = shares(make, 2)
    (whole,) = shares(make, 1)
    assert [batch for pair in zip(one, other, strict=True) for batch in pair] == whole


@settings(max_examples=25)
@given(st.integers(0, 17), st.integers(1, 4))
def test_streams_are_dealt_in_whole_hands(size: int, workers: int) -> None:
    """Everybody gets the same number of batches of an iterable data set; the last hand may be left out."""

    class Counting(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(size))

    found = shares(lambda: DataLoader(Counting(), batch_size=1), workers)
    assert [len(batches) for batches in found] == [size // workers] * workers
    assert sorted(sample for batches in found for batch in batches for sample in batch) == list(
        range(size - size % workers)
    )


@settings(max_examples=60)
@given(
    st.sampled_from(["shuffled", "uneven", "dropped", "batch sampler", "stream"]),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_what_is_left_of_a_pass_is_dealt_to_another_number_of_workers(
    name: str, earlier: list[tuple[int, int]], workers: int
) -> None:
    """No sample comes twice, and none is left out but a rest of each number; everybody has as many batches."""
    make = RESIZED[name]
    phases = [*earlier, (workers, 99)]
    seen: Counter[int] = Counter()
    for index, (dealt_for, taken) in enumerate(phases):
        counts = set()
        for rank in range(dealt_for):
            torch.manual_seed(rank)
            rest = share(make(), seed=1, step=5, rank=rank, workers=dealt_for, earlier=phases[:index])
            batches = [torch.as_tensor(one[0] if isinstance(one, list) else one) for one in islice(rest, taken)]
            counts.add(len(batches))
            seen.update(int(one) for batch in batches for one in batch.view(-1))
        assert len(counts) == 1
    assert all(count == 1 for count in seen.values())
    assert len(seen) > 23 - 2 * sum(dealt_for for dealt_for, _ in phases)


@pytest.mark.parametrize("name", ["shuffled", "dropped", "batch sampler", "stream"])
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_a_pass_that_was_over_is_over_for_any_number_of_workers(name: str, workers: int) -> None:
    """Its rest was too small to be dealt once, and is not dealt later: who was a step further is in the next pass."""
    each = len(shares(RESIZED[name], 4, seed=1)[0])
    assert not list(share(RESIZED[name](), seed=1, step=0, rank=0, workers=workers, earlier=[(4, each)]))
    if name != "stream":
        assert not list(share(RESIZED[name](), seed=1, step=0, rank=0, workers=3, earlier=[(4, each), (2, 0)]))


def test_the_users_sampler_is_left_as_it_was() -> None:
    """Its generator is the user's again after a pass, and has not been drawn from."""
    generator = torch.Generator().manual_seed(5)
    loader = loader_of(10, batch_size=2, shuffle=True, generator=generator)
    before = generator.get_state()
    list(share(loader, seed=0, step=0, rank=0, workers=1))
    assert isinstance(loader.sampler, RandomSampler)
    assert loader.sampler.generator is generator
    assert torch.equal(generator.get_state(), before)


class Augmented(torch.utils.data.Dataset[Tensor]):
    """Samples that are nothing but what was drawn for them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(())


def test_data_loading_processes_of_different_ranks_draw_differently() -> None:
    """Random augmentation in worker processes is keyed by rank and step, and repeats with the key."""

    def drawn(rank: int, step: int = 0) -> list[float]:
        loader = DataLoader(Augmented(), batch_size=1, num_workers=1, multiprocessing_context="fork")
        return [float(batch) for batch in share(loader, seed=0, step=step, rank=rank, workers=2)]

    first = drawn(0)
    assert drawn(0) == first
    assert not set(drawn(1)) & set(first)
    assert not set(drawn(0, step=1)) & set(first)


def drawn(progress: Progress, processes: int) -> list[tuple[float, dict[str, Any]]]:
    """What a rank's share of random samples is, and where its loop was at each."""
    context = "fork" if processes else None
    loader = DataLoader(Augmented(), batch_size=1, num_workers=processes, multiprocessing_context=context)
    seen = []
    for batch in keyed_batches(loader, progress, seed=0, rank=0):
        seen.append((float(batch), progress.state()))
        progress.end_step()
    return seen


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_a_pass_that_is_gone_on_with_draws_what_the_whole_one_drew(processes: int) -> None:
    """Random augmentation too, in however many processes it is drawn before and after a kill."""
    whole = drawn(Progress(2), 0)
    killed = Progress(2)
    killed.load(whole[1][1])  # in its second iteration, which is made again
    assert len(whole) == 4
    assert [value for value, _ in drawn(Progress(2), processes)] == [value for value, _ in whole]
    assert [value for value, _ in drawn(killed, processes)] == [value for value, _ in whole[1:]]


def test_worker_processes_beside_open_channels() -> None:
    """A loader that forks while gRPC is exchanging neither hangs nor disturbs the exchange."""

    def work(session: Any) -> tuple[list[int], int]:
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.wrap(model, optimizer)
        seen: list[int] = []
        loader = loader_of(12, batch_size=2, shuffle=True, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            for (batch,) in session.batches(loader):
                seen += batch.tolist()
                model(batch.float().view(-1, 1)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return seen, session.step

    with in_process(shards=2, workers=1) as cluster:
        ((seen, steps),) = cluster.run(work)
    assert steps == 12
    assert Counter(seen) == dict.fromkeys(range(12), 2)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"num_workers": 1, "multiprocessing_context": "fork"}, True),
        ({"num_workers": 1, "multiprocessing_context": "spawn"}, False),
        ({"num_workers": 0}, False),
    ],
    ids=["fork", "spawn", "no worker processes"],
)
def test_forks_that_grpc_may_abort_are_warned_of(
    options: dict[str, Any], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A script that imports gRPC before Thresher hears what may happen to its loader's worker processes."""
    loader = loader_of(2, **options)
    monkeypatch.setattr(batches, "FORKS_ARE_SAFE", False)
    next(share(loader, seed=0, step=0, rank=0, workers=1))
    assert ("gRPC was imported before thresher" in caplog.text) == warned
    caplog.clear()
    monkeypatch.setattr(batches, "FORKS_ARE_SAFE", True)
    next(share(loader, seed=0, step=0, rank=0, workers=1))
    assert not caplog.text


@settings(max_examples=20)
@given(st.integers(), st.integers())
def test_keyed_seeds(one: int, other: int) -> None:
    """A seed fits every generator, and is a function of its key."""
    assert 0 <= keyed_seed("a", one) < 2**32
    assert (keyed_seed("a", one) == keyed_seed("a", other)) == (one == other)
    assert keyed_seed("a", one) != keyed_seed("b", one)


def test_seeding_reaches_all_three_generators() -> None:
    """torch, numpy and random draw the same again after the same seed."""
    import random  # noqa: PLC0415 - used here only

    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    seed_everything(3)
    first = drawn()
    assert all(a != b for a, b in zip(drawn(), first, strict=True))
    seed_everything(3)
    assert drawn() == first


def test_fewer_samples_than_workers_are_refused() -> None:
    """Nothing to share: an error, instead of a loop that silently makes no step."""
    loader = loader_of(3, batch_size=1)
    with pytest.raises(ConfigurationError, match="3 samples cannot be shared by 4 workers"):
        next(share(loader, seed=0, step=0, rank=0, workers=4))
