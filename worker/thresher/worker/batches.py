"""A worker's share of the data, in an order that depends on (seed, step) alone, and randomness that adds the rank."""

import hashlib
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset


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


def share(loader: "DataLoader[Any]", *, order_seed: int, rank: int, workers: int) -> Iterator[Any]:
    """Yield one pass over rank's share of ``loader``'s data.

    All workers draw the same order from the loader's own sampler; worker ``rank`` takes every ``workers``-th sample,
    beginning with the rank-th. The last few samples of a pass are left out where they cannot be dealt evenly, so that
    every worker makes the same number of steps. Iterable data sets and custom batch samplers are dealt batch by batch.

    Args:
        loader: A torch loader; its data set, collate function, worker processes and other settings are kept.
        order_seed: Equal on all workers.
        rank: Which share.
        workers: How many shares.
    """
    if loader.batch_size is None or isinstance(loader.dataset, IterableDataset) or not _plain_batches(loader):
        seed_everything(order_seed)
        yield from _dealt(iter(loader), rank, workers)
        return
    seed_everything(order_seed)
    if loader.generator is not None:
        loader.generator.manual_seed(order_seed)
    order = list(loader.sampler)
    mine = order[: len(order) - len(order) % workers][rank::workers]
    yield from DataLoader(
        loader.dataset,
        sampler=mine,
        batch_size=loader.batch_size,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _plain_batches(loader: "DataLoader[Any]") -> bool:
    return type(loader.batch_sampler) is BatchSampler


def _dealt(batches: Iterator[Any], rank: int, workers: int) -> Iterator[Any]:
    """Yield every workers-th batch, and none of a last hand that does not reach everybody."""
    while len(hand := list(islice(batches, workers))) == workers:
        yield hand[rank]
