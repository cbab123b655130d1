"""A worker's share of the data, in an order that depends on (seed, step) alone, and randomness that adds the rank."""

import hashlib
import logging
import multiprocessing
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from thresher.protos.bookmark import Share
from thresher.protos.errors import ConfigurationError
from thresher.protos.transport import FORK_VARIABLE, FORKS_ARE_SAFE
from thresher.worker.progress import Progress

_logger = logging.getLogger(__name__)


def keyed_seed(*key: object) -> int:
    """Return a seed below 2³² that differs for different keys and is the same on every machine.

    >>> keyed_seed("order", 7, 0) == keyed_seed("order", 7, 0) != keyed_seed("order", 7, 1)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


def seed_everything(seed: int) -> None:
    """Seed torch, numpy's legacy generator and random: what scripts draw from without thinking of it."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the user's script may draw from it
    random.seed(seed)


def share(
    loader: "DataLoader[Any]",
    *,
    seed: int,
    step: int,
    rank: int,
    workers: int,
    skip: int = 0,
    earlier: Sequence[Share] = (),
) -> Iterator[Any]:
    """Return one pass over rank's share of ``loader``'s data.

    All workers draw the same order from the loader's own sampler; worker ``rank`` takes every ``workers``-th sample,
    beginning with the rank-th. The last few samples of a pass are left out where they cannot be dealt evenly, so that
    every worker makes the same number of steps. Iterable data sets and custom batch samplers are dealt batch by batch.

    Args:
        loader: A torch loader; its data set, collate function, worker processes and other settings are kept.
        seed: The run's; equal on all workers.
        step: Where the pass begins; equal on all workers.
        rank: Which share.
        workers: How many shares.
        skip: How many batches of the share were taken before, and are left out.
        earlier: What was taken of this pass when it was dealt for other numbers of workers; what that left is dealt.

    Raises:
        ConfigurationError: when there is not one sample for each worker.
    """
    if loader.num_workers and not FORKS_ARE_SAFE and _start_method(loader) == "fork":
        _logger.warning(
            "gRPC was imported before thresher, and its fork handlers may abort the worker processes of a DataLoader; "
            "import thresher first, or set %s=0",
            FORK_VARIABLE,
        )
    order_seed = keyed_seed("order", seed, step)
    if isinstance(loader.dataset, IterableDataset):
        return islice(_dealt(loader, order_seed, rank, workers, earlier), skip, None)
    plain = loader.batch_size is None or type(loader.batch_sampler) is BatchSampler
    source: Any = loader.sampler if plain else loader.batch_sampler
    with _ordered(source, order_seed):
        order = list(source)
    size = (loader.batch_size or 1) if plain else 1
    left = _left(order, earlier, size, drop_last=plain and loader.drop_last)
    mine = left[: len(left) - len(left) % workers][rank::workers]
    if order and not mine and not earlier:
        what = "samples" if plain else "batches"
        raise ConfigurationError(f"{len(order)} {what} cannot be shared by {workers} workers: each needs one at least")
    batching: dict[str, Any] = {"batch_sampler": mine[skip:]}
    if plain:
        batching = {"sampler": mine[skip * size :], "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    return _loading(loader, batching, (seed, rank, step), skip + sum(taken for _, taken in earlier))


def _loading(
    loader: "DataLoader[Any]", batching: dict[str, Any], key: tuple[int, int, int], first: int
) -> Iterator[Any]:
    """Load what ``batching`` names, as ``loader`` does; its first batch is number ``first`` of the pass ``key``."""
    # What a loader hands to its processes as their seed is drawn now, and must not be the same on all ranks.
    seed_everything(keyed_seed("loader", *key))
    keyed = _KeyedProcess(loader, key, first)
    return iter(
        DataLoader(
            loader.dataset,
            **batching,
            num_workers=loader.num_workers,
            collate_fn=keyed.collate if loader.num_workers else loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=keyed.begin,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )
    )


def _left(order: list[Any], earlier: Sequence[Share], size: int, *, drop_last: bool) -> list[Any]:
    """Return what is left of an order; nothing of a pass that was over for those among whom it was dealt."""
    for workers, taken in earlier:
        each = len(order) // workers
        over = taken >= (each // size if drop_last else -(-each // size))
        order = [] if over else order[taken * size * workers : each * workers]
    return order


def keyed_batches(loader: "DataLoader[Any]", progress: Progress, *, seed: int, rank: int) -> Iterator[Any]:
    """Yield one pass over rank's share, or the rest of the one in which this worker was killed, as far as it stays.

    The global generators are seeded anew for each batch, before it is fetched, in whichever process that is, and before
    it is yielded.

    Args:
        loader: A torch loader.
        progress: Where this worker is; it is told of the pass and of each batch.
        seed: The run's; equal on all workers.
        rank: Which share.

    Raises:
        ProtocolError: when another pass is not over yet.
    """
    if not progress.begin_pass():
        return
    try:
        yield from _rest_of_pass(loader, progress, seed=seed, rank=rank)
    finally:
        progress.end_pass()


def _rest_of_pass(loader: "DataLoader[Any]", progress: Progress, *, seed: int, rank: int) -> Iterator[Any]:
    shared: Iterator[Any] = iter(())
    dealt: int | None = None
    while progress.inside:  # this worker may go to a place in another pass
        if dealt != progress.moves:
            dealt = progress.moves
            shared = share(
                loader,
                seed=seed,
                step=progress.pass_step,
                rank=rank,
                workers=progress.dealt_for,
                skip=progress.taken,
                earlier=progress.earlier,
            )
        seed_everything(keyed_seed("data", seed, rank, progress.pass_step, progress.fetched))
        try:
            batch = next(shared)
        except StopIteration:
            return
        seed_everything(keyed_seed("step", seed, rank, progress.step, progress.batch))
        progress.begin_batch()
        yield batch


@final
class _KeyedProcess:
    """Seeds a process of a loader for each batch that it fetches: then neither their number nor the first one matters.

    A loader hands batch after batch to its processes in turn, and has no place of its own in front of a fetch: so each
    is prepared for at the end of the one before.

    Args:
        loader: Whose processes they will be.
        key: Of the pass: seed, rank, step.
        first: Number of the first batch that is fetched.
    """

    def __init__(self, loader: "DataLoader[Any]", key: tuple[int, int, int], first: int) -> None:
        """Begin in front of the first batch."""
        self._init, self._collate, self._processes = loader.worker_init_fn, loader.collate_fn, loader.num_workers
        self._key, self._number = key, first

    def begin(self, process: int) -> None:
        """Begin a process."""
        if self._init is not None:
            self._init(process)
        self._prepare(self._number + process)

    def collate(self, samples: Any) -> Any:  # noqa: ANN401 - whatever the data set and the loader make
        """Put samples together as the loader does."""
        batch = self._collate(samples)
        self._prepare(self._number + self._processes)
        return batch

    def _prepare(self, number: int) -> None:
        self._number = number
        seed_everything(keyed_seed("data", *self._key, number))


def _start_method(loader: "DataLoader[Any]") -> str:
    context: Any = loader.multiprocessing_context or multiprocessing
    return str(context.get_start_method())


@contextmanager
def _ordered(sampler: object, seed: int) -> Iterator[None]:
    """Make what a sampler draws depend on ``seed`` alone: torch's by a generator, others by the global ones."""
    seed_everything(seed)
    inner: Any = getattr(sampler, "sampler", sampler)  # a batch sampler usually draws from another one
    if not hasattr(inner, "generator"):
        yield
        return
    before = inner.generator
    inner.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        inner.generator = before


def _dealt(batches: Iterable[Any], seed: int, rank: int, workers: int, earlier: Sequence[Share]) -> Iterator[Any]:
    """Yield every workers-th batch, and none of a last hand that does not reach everybody.

    Every worker draws every batch, so they all must draw from the same randomness.
    """
    seed_everything(seed)
    stream = iter(batches)
    first = 0
    for players, taken in earlier:
        hands = _hands(stream, seed, players, first)
        deque(islice(hands, taken), maxlen=0)
        following = next(hands, None)
        if following is None:
            return
        stream, first = chain(following, stream), first + taken + 1
    for hand in _hands(stream, seed, workers, first):
        yield hand[rank]


def _hands(stream: Iterator[Any], seed: int, workers: int, first: int) -> Iterator[list[Any]]:
    """Yield batches for one worker each, as long as there are enough; ``first`` hands were dealt before."""
    for number in count(first):
        seed_everything(keyed_seed("hand", seed, number))
        hand = list(islice(stream, workers))
        if len(hand) < workers:
            return
        yield hand
