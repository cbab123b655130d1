"""What a step costs the machine, and how many bytes it moves: the code of a real step, timed part by part.

Nothing is sent. Gradients are standard normal numbers, so that each threshold has the density that is asked for.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Final, final

import numpy as np
import torch
from torch import Tensor, nn

from thresher.compression import Feedback, Round, parse_feedback
from thresher.deploy.advise.model import Model
from thresher.deploy.advise.samples import Sample
from thresher.deploy.advise.settings import Setting
from thresher.protos.codec import decode, encode
from thresher.protos.layout import Slice
from thresher.protos.mean import mean_of
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import PARAMETERS, Replica
from thresher.protos.sealed import SealedUpdate, sealed, update_from_message
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.client import push_bytes_of
from thresher.worker.parameters import ModelParameters

MOST_ELEMENTS: Final = 4 << 20
"""Of a larger model the first tensors are rehearsed, to this size; the rest takes as much for each of its elements."""
_REPETITIONS: Final = 7
_PAUSE_SECONDS: Final = 0.02
_MEETING_SECONDS: Final = 120.0  # for one that rehearses at the same time, and first has to begin


@final
@dataclass(frozen=True, slots=True)
class Costs:
    """What one step costs with one setting, but for computing and the network.

    Attributes:
        setting: Which one.
        update_density: Elements of an update over those of the model.
        push_bytes: Of the messages of one worker's push, to each shard.
        pull_bytes: Of the messages of an update to one worker, from each shard.
        compress: Seconds at the worker until frames are ready: gather, look for NaN, select, encode.
        shard: Seconds at a shard from the last byte of the pushes to the first of the update: decode, add, apply,
            encode.
        replay: Seconds at the worker from the last byte of the updates on: decode, apply, copy into the model.
    """

    setting: Setting
    update_density: float
    push_bytes: tuple[int, ...]
    pull_bytes: tuple[int, ...]
    compress: Sample
    shard: Sample
    replay: Sample


@final
class Rehearsal:
    """Steps of one worker with its shards, on this machine.

    Args:
        model: What is trained; a stand-in with tensors of these sizes is made.
        shards: How many share it.
        workers: How many push.
    """

    def __init__(self, model: Model, shards: int, workers: int) -> None:
        """Make what a worker and its first shard have in memory."""
        self._workers = workers
        sizes = first_tensors(model.sizes, MOST_ELEMENTS)
        self._numel = sum(sizes)
        self._scale = model.numel / self._numel
        self._tensors = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        self._parameters = ModelParameters(self._tensors, model.optimizer.build([list(self._tensors)]))
        self._slices = self._parameters.layout.slices(shards)
        self._replicas = [_Copy(piece, model.optimizer, workers) for piece in self._slices]
        self._shard = _Copy(self._slices[0], model.optimizer, workers)
        generator = torch.Generator().manual_seed(0)
        for tensor in self._tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        self._others = torch.randn(self._numel, generator=generator)
        self._order = torch.rand(self._numel, generator=generator)

    def costs(self, setting: Setting, update_density: float) -> Costs:
        """Time the parts of a step, after one that warms up.

        Args:
            setting: What is sent.
            update_density: What fraction of the elements the update holds.
        """
        layout = self._parameters.layout
        feedback = parse_feedback(setting.compressor, [spec.shape for spec in layout.trained])
        frames = self._compressed(feedback, setting)
        means = self._means(frames, update_density)
        told = [replica.sealed(mean) for replica, mean in zip(self._replicas, means, strict=True)]

        def shard() -> None:
            pushes = [decode(bytearray(frames[0]), numel=self._slices[0].numel) for _ in range(self._workers)]
            mean_of(pushes, self._workers)
            self._shard.apply(means[0])
            self._shard.sealed(means[0])

        def replay() -> None:
            for replica, one in zip(self._replicas, told, strict=True):
                replica.hear(one)
            self._parameters.assign([(replica.piece, replica.parameters) for replica in self._replicas])

        taken = self._timed(feedback.residual.zero_, lambda: self._compressed(feedback, setting), shard, replay)
        push = pb.Push(step=1, version=1, residual_squared=1.0, next_threshold=1.0)
        header = push_bytes_of(push, b"")
        return Costs(
            setting,
            update_density,
            tuple(header + round((push_bytes_of(push, frame) - header) * self._scale) for frame in frames),
            tuple(round(one.wire_bytes * self._scale) for one in told),
            *taken,
        )

    def _compressed(self, feedback: Feedback, setting: Setting) -> list[bytes]:
        """Return the frames of a push: what a worker does between two passes over the data."""
        gradient, _ = self._parameters.gather()
        self._parameters.check_finite(0, 0)
        sent = feedback.compress_finite(gradient, Round(threshold=setting.threshold))
        torch.dot(feedback.residual, feedback.residual)
        return [encode(sent.slice(piece.begin, piece.end)) for piece in self._slices]

    def _means(self, frames: Sequence[bytes], density: float) -> list[SparseGradient]:
        """Return a mean for each shard: of one worker, what it sent; of several, other numbers where any has sent."""
        if self._workers == 1:
            return [decode(bytearray(f), numel=piece.numel) for f, piece in zip(frames, self._slices, strict=True)]
        if density >= 1.0:
            whole = SparseGradient.dense(self._others)
        else:
            indices = (self._order < density).nonzero().view(-1)
            whole = SparseGradient(indices, self._others[indices], self._numel)
        return [whole.slice(piece.begin, piece.end) for piece in self._slices]

    def _timed(self, prepare: Callable[[], object], *parts: Callable[[], object]) -> list[Sample]:
        """Return the seconds of each part in each repetition, for the whole model.

        As in a step the parts take turns, and a pause comes before them: caches are as cold as they will be.
        """
        taken = []
        for _ in range(_REPETITIONS + 1):
            prepare()
            time.sleep(_PAUSE_SECONDS)
            times = []
            for part in parts:
                _together()
                begin = time.perf_counter()
                part()
                times.append(time.perf_counter() - begin)
            taken.append(times)
        return list(np.array(taken[1:]).T * self._scale)


def first_tensors(sizes: Sequence[int], most: int) -> list[int]:
    """Return the sizes of the first tensors that come to ``most`` elements together; the last of them is clipped.

    >>> first_tensors([4, 5, 6], 7), first_tensors([4, 5, 6], 90)
    ([4, 3], [4, 5, 6])
    """
    ends = np.minimum(np.cumsum(sizes), most)
    return [int(size) for size in np.diff(ends, prepend=0) if size]


def rehearse(
    model: Model, shards: int, workers: int, here: int, settings: Sequence[tuple[Setting, float]]
) -> list[Costs]:
    """Return the costs of each setting, where ``here`` workers share this machine, its cores and its memory.

    So many processes rehearse at once, part by part as in lockstep, and each tells its own seconds.

    Args:
        model: What is trained.
        shards: How many share it.
        workers: How many push.
        here: How many of them are on this machine.
        settings: Each with the density of its updates.
    """
    if here == 1:
        return _rehearsed(model, shards, workers, settings)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(here, context, _meet_at, (context.Barrier(here),)) as pool:
        going = [pool.submit(_rehearsed, model, shards, workers, settings) for _ in range(here)]
        each = [one.result() for one in going]
    return [_joined(of_setting) for of_setting in zip(*each, strict=True)]


def _alone() -> None:
    """Wait for nobody."""


_together: Callable[[], object] = _alone
"""Waits for those that rehearse at the same time, in other processes; called before each part."""


def _meet_at(meeting: Barrier) -> None:
    """Let this process rehearse with others."""
    global _together  # noqa: PLW0603 - a barrier can be handed to a process only when that begins
    _together = partial(meeting.wait, _MEETING_SECONDS)


def _rehearsed(model: Model, shards: int, workers: int, settings: Sequence[tuple[Setting, float]]) -> list[Costs]:
    rehearsal = Rehearsal(model, shards, workers)
    return [rehearsal.costs(setting, update_density) for setting, update_density in settings]


def _joined(costs: Sequence[Costs]) -> Costs:
    """Return the costs of one setting with the seconds of all that have rehearsed it."""
    compress, shard, replay = (
        np.concatenate([getattr(one, part) for one in costs]) for part in ("compress", "shard", "replay")
    )
    return replace(costs[0], compress=compress, shard=shard, replay=replay)


@final
class _Copy:
    """A replica of one slice that makes and takes updates, one after the other."""

    def __init__(self, piece: Slice, optimizer: OptimizerSpec, workers: int) -> None:
        self.piece = piece
        self._workers = workers
        self._replica = Replica(piece, optimizer, {PARAMETERS: torch.zeros(piece.numel)})

    @property
    def parameters(self) -> Tensor:
        """[piece.numel] float32."""
        return self._replica.parameters

    def apply(self, mean: SparseGradient) -> None:
        """Apply the next update, with this mean."""
        self._replica.apply(self._next(mean))

    def sealed(self, mean: SparseGradient) -> SealedUpdate:
        """Return it as a shard tells it."""
        return sealed(self._next(mean), b"")

    def hear(self, told: SealedUpdate) -> None:
        """Apply one as a worker hears it, whatever its version."""
        read = update_from_message(told.body, bytearray(told.frame), self.piece)
        self._replica.apply(replace(read, version=self._replica.version + 1))

    def _next(self, mean: SparseGradient) -> Update:
        everyone, presence = tuple(range(self._workers)), (True,) * len(self.piece.segments)
        return Update(self._replica.version + 1, self._workers, everyone, mean, presence)
