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

from thresher.protos.errors import LayoutError, ProtocolError
from thresher.protos.layout import Slice
from thresher.protos.messages import REGISTRATION_BYTES, layout_to_message, optimizer_to_message
from thresher.protos.optimizers import OptimizerSpec
from thresher.protos.replica import Replica
from thresher.protos.snapshots import pack_state
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.client import ShardClient
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import Placement
from thresher.worker.settings import Settings

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class JoinedShard:
    """One shard as this worker exchanges with it: the stream, the slice, the replica that follows the shard's log."""

    client: ShardClient
    slice: Slice
    replica: Replica


def join(
    settings: Settings, model: ModelParameters, spec: OptimizerSpec, placement: Placement, metrics_address: str
) -> list[JoinedShard]:
    """Join all shards; afterwards ``model`` holds what rank 0 brought, or what the shards had already.

    Raises:
        ConnectionTimeoutError: when a shard does not come up before ``settings.connect_timeout``.
        LayoutError: when the model's tensors are too many to be registered, or as a shard refused.
        RegistrationError, OptimizerError: as a shard refused.
    """
    layout = model.layout
    slices = layout.slices(len(settings.addresses))
    request = _registration(settings, model, spec, placement)
    request.metrics_address = metrics_address
    clients = [
        ShardClient(shard, address, settings.rank, request.incarnation)
        for shard, address in enumerate(settings.addresses)
    ]
    registered: list[ShardClient] = []
    try:
        deadline = time.monotonic() + settings.connect_timeout
        for client in clients:
            client.wait_ready(deadline)
        for client, piece in zip(clients, slices, strict=True):
            request.shard = client.shard
            answer = client.register(request)
            registered.append(client)
            if settings.rank == 0 and not answer.seeded:
                client.seed(
                    pack_state(placement.seed(model.state(piece)), model.untrained() if client.shard == 0 else {})
                )
        joined = [
            _begin(client, piece, model, placement.shard_optimizer, settings.connect_timeout)
            for client, piece in zip(clients, slices, strict=True)
        ]
        _check_versions(joined)
        for shard in joined:
            shard.client.open(shard.replica.version)
    except BaseException as error:
        for client in registered:  # the others must not wait for this worker
            client.open(0)
            client.abort(f"{type(error).__name__}: {error}")
        for client in clients:
            client.close()
        raise
    replaced = model.replace([(shard.slice, shard.replica.parameters) for shard in joined])
    if replaced and settings.rank != 0:
        _logger.info("worker %d: the shards' values replaced those of %s", settings.rank, _listed(replaced))
    return joined


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


def _begin(
    client: ShardClient, piece: Slice, model: ModelParameters, optimizer: OptimizerSpec, wait_seconds: float
) -> JoinedShard:
    """Make a replica of the shard's state."""
    snapshot = client.snapshot(wait_seconds)
    model.assign_untrained(snapshot.untrained)
    return JoinedShard(client, piece, Replica(piece, optimizer, snapshot.state, snapshot.version))


def _check_versions(joined: Sequence[JoinedShard]) -> None:
    versions = {shard.replica.version for shard in joined}
    if len(versions) > 1 or versions != {0}:
        found = ", ".join(f"{shard.client} is at version {shard.replica.version}" for shard in joined)
        raise ProtocolError(f"a worker can join at the start of a run only, but {found}; start shards and workers anew")


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
