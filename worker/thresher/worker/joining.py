"""How a worker joins: find all shards, register with each, and begin from the same state as everybody."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from thresher.protos.bookmark import Bookmark
from thresher.protos.errors import ConfigurationError, DataLossError, LayoutError
from thresher.protos.layout import Slice
from thresher.protos.messages import (
    REGISTRATION_BYTES,
    consistency_to_message,
    layout_to_message,
    optimizer_to_message,
)
from thresher.protos.optimizers import OptimizerSpec, Override
from thresher.protos.snapshots import pack_state
from thresher.protos.timeouts import check_timeouts
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.calls import ShardCalls
from thresher.worker.client import ShardClient
from thresher.worker.following import Following, following
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import Placement
from thresher.worker.settings import Settings

_logger = logging.getLogger(__name__)


@final
@dataclass(slots=True)
class JoinedShard:
    """One shard as this worker exchanges with it.

    Attributes:
        client: The conversation.
        slice: The shard's.
        follower: The slice as this worker knows it; replaced where it fell too far behind.
        answer: What the shard said to this worker's registration.
        epoch: Of the membership that the shard is known to know.
        overrides: Hyper-parameters in force that differ from the registered ones.
        threshold: Of the coming round; None for methods without one.
        bookmark: Where the members' loops are; None where nobody has told, and for other than the first shard.
        repeats: Its newest update is in the follower already, and will come once more.
        forgot: This worker has lost its state, and no push has told the shard so yet.
    """

    client: ShardClient
    slice: Slice
    follower: Following
    answer: pb.RegisterResponse
    epoch: int
    overrides: tuple[Override, ...]
    threshold: float | None
    bookmark: Bookmark | None = None
    repeats: bool = False
    forgot: bool = False


def join(
    settings: Settings,
    model: ModelParameters,
    spec: OptimizerSpec,
    placement: Placement,
    metrics_address: str,
    *,
    run: int | None = None,
) -> list[JoinedShard]:
    """Join all shards; afterwards ``model`` holds what rank 0 brought, or what the shards had already.

    Args:
        settings: Of this worker.
        model: The user's.
        spec: The user's optimizer.
        placement: Where it runs.
        metrics_address: Where this worker serves its metrics; empty if it does not.
        run: That this worker took part in before; it has no starting values to give then.

    Raises:
        ConnectionTimeoutError: when a shard does not come up before ``settings.connect_timeout``.
        ConfigurationError: when this worker's time-outs and those of a shard cannot work together.
        LayoutError: when the model's tensors are too many to be registered, or as a shard refused.
        RegistrationError, OptimizerError, FencedError: as a shard refused.
        DataLossError: when the shards are in another run than ``run``, unless the worker's folder is a local one.
    """
    slices = model.layout.slices(len(settings.addresses))
    request = _registration(settings, model, spec, placement)
    request.metrics_address = metrics_address
    calls = _calls(settings)
    joined: list[JoinedShard] = []
    clients: list[ShardClient] = []
    try:
        answers = _registered(calls, request, time.monotonic() + settings.connect_timeout, clients, settings)
        run = _fitting(run, answers[0].run, settings)
        if settings.rank == 0 and run is None and not any(answer.version for answer in answers):
            empty = [one for one, answer in zip(calls, answers, strict=True) if not answer.seeded]
            _seed(empty, slices, request, model, placement)
        for one, client, piece, answer in zip(calls, clients, slices, answers, strict=True):
            snapshot = one.snapshot(settings.connect_timeout)
            model.assign_untrained(snapshot.untrained)
            client.history.CopyFrom(snapshot.history)
            optimizer = placement.shard_optimizer
            follower, overrides = following(piece, optimizer, snapshot), optimizer.overrides(snapshot.optimizer.groups)
            epoch, threshold, place = answer.membership.epoch, snapshot.threshold, snapshot.bookmark
            joined.append(JoinedShard(client, piece, follower, answer, epoch, overrides, threshold, place))
            _look_back(joined[-1], settings, is_back=run is not None)
        for shard in reversed(joined):  # the first shard decides who belongs to the run: by then all others know us
            shard.client.open(shard.slice, shard.client.history)
    except BaseException as error:
        _give_up(calls, clients, slices, f"{type(error).__name__}: {error}")
        raise
    replaced = model.replace([(shard.slice, shard.follower.parameters) for shard in joined])
    if replaced and settings.rank != 0:
        _logger.info("worker %d: the shards' values replaced those of %s", settings.rank, _listed(replaced))
    return joined


def _fitting(mine: int | None, theirs: int, settings: Settings) -> int | None:
    """Return the run that this worker remembers, where it is that of the shards; None where its memory is discarded."""
    if mine in (None, theirs):
        return mine
    what = f"worker {settings.rank} remembers run {mine:x} in {settings.state_dir}, the shards are in run {theirs:x}"
    if not settings.state_is_local:
        raise DataLossError(f"{what}; give it the folder of this run, or an empty one")
    _logger.warning("%s: its memory is of no use here, and is discarded", what)
    return None


def _look_back(shard: JoinedShard, settings: Settings, *, is_back: bool) -> None:
    """Ask again what became of the last push, now that the snapshot is older than the answer; and what it came to.

    A shard that has lost its state meanwhile is so told again who this worker is. A worker that was killed before it
    had learned from the update of its last round is told it once more.
    """
    client, follower = shard.client, shard.follower
    shard.answer = client.calls.register(client.registration)
    settled = shard.answer.settled_steps
    if is_back and settings.consistency.lockstep and follower.version and settled == follower.version:
        client.history.version, client.history.digest = follower.version - 1, b""
        shard.repeats = True


def _calls(settings: Settings) -> list[ShardCalls]:
    caller, patience = f"worker {settings.rank}", settings.reconnect_timeout
    return [
        ShardCalls(shard, address, caller, settings.credentials, patience, insecure=settings.insecure)
        for shard, address in enumerate(settings.addresses)
    ]


def _registered(
    calls: Sequence[ShardCalls],
    request: pb.RegisterRequest,
    deadline: float,
    clients: list[ShardClient],
    settings: Settings,
) -> list[pb.RegisterResponse]:
    for one in calls:
        one.wait_ready(deadline)
    answers = []
    for one in calls:
        request.shard = one.shard
        answer = one.register(request)
        clients.append(ShardClient(one, request, answer.answer_timeout))
        _check_order(one, answer, settings)
        answers.append(answer)
    return answers


def _check_order(one: ShardCalls, answer: pb.RegisterResponse, settings: Settings) -> None:
    """Hold the time-outs that this worker was told against those of a shard, which it learns here."""
    try:
        check_timeouts(
            lease=answer.lease,
            round_timeout=answer.round_timeout,
            grace=settings.consistency.grace,
            reconnect_timeout=settings.reconnect_timeout,
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"worker {settings.rank} and {one} cannot work together: {error}") from None


def _seed(
    empty: Sequence[ShardCalls],
    slices: Sequence[Slice],
    request: pb.RegisterRequest,
    model: ModelParameters,
    placement: Placement,
) -> None:
    for one in empty:
        state = placement.seed(model.state(slices[one.shard]))
        data = pack_state(state, model.untrained() if one.shard == 0 else {})
        request.shard = one.shard
        one.seed(request, data)


def _give_up(calls: Sequence[ShardCalls], clients: Sequence[ShardClient], slices: Sequence[Slice], reason: str) -> None:
    """Tell those shards that know this worker already, so that the others need not wait for it."""
    for client, piece in zip(clients, slices, strict=False):
        client.open(piece, client.history)
        client.abort(reason)
    for client in clients:
        client.close()
    for one in calls:
        one.close()


def _registration(
    settings: Settings, model: ModelParameters, spec: OptimizerSpec, placement: Placement
) -> pb.RegisterRequest:
    request = pb.RegisterRequest(
        rank=settings.rank,
        workers=settings.workers,
        incarnation=secrets.randbits(63) | 1,
        shards=len(settings.addresses),
        layout=layout_to_message(model.layout),
        fingerprint=model.layout.fingerprint,
        optimizer=optimizer_to_message(placement.shard_optimizer),
        method=f"{spec.name} with {settings.method.describe()}",
        consistency=consistency_to_message(settings.consistency),
        origin=f"{socket.gethostname()}:{os.getpid()}",
        environment=pb.Environment(
            torch_version=torch.__version__,
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            threads=torch.get_num_threads(),
        ),
    )
    if request.ByteSize() >= REGISTRATION_BYTES:
        raise LayoutError(
            f"names and shapes of {len(model.layout.trained)} trained and {len(model.layout.untrained)} other tensors "
            f"take {request.ByteSize():,} bytes, a registration holds {REGISTRATION_BYTES:,}; join small parameters "
            "into larger ones, or shorten their names"
        )
    return request


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
