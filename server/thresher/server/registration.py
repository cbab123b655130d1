"""What a worker must agree on with this shard, and with the worker that registered first. Nothing here changes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from thresher.protos.bookmark import Bookmark
from thresher.protos.errors import LayoutError, OptimizerError, ProtocolError, RegistrationError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import OptimizerSpec
from thresher.server.events import Register


def check_registration(request: Register, first: Register | None, shard: int, shards: int) -> None:
    """Refuse a registration that does not fit.

    Args:
        request: What the worker says.
        first: The registration that all others must agree with; None when this one is the first.
        shard: Position of this shard.
        shards: Number of shards.

    Raises:
        RegistrationError: for another shard, optimizer, method or consistency.
        LayoutError: for another model; the difference is listed.
        OptimizerError: for an optimizer that cannot be built for this model.
    """
    if (request.shard, request.shards) != (shard, shards):
        raise RegistrationError(
            f"worker {request.worker.rank} takes this for shard {request.shard} of {request.shards}, it is shard "
            f"{shard} of {shards}; give shards and workers the same list of shards in the same order"
        )
    if first is None:
        _check_optimizer(request)
    else:
        _check_agreement(request, first)


def doubts(request: Register, first: Register | None, bookmark: Bookmark | None) -> str:
    """Say what the operator should know of a worker that is let in; empty when there is nothing.

    Args:
        request: What the worker says.
        first: The registration that came first; None when this one is.
        bookmark: Where the members' loops are; None where nobody has told.
    """
    found = []
    if first is not None and request.environment != first.environment:
        found.append(
            f"worker {request.worker.rank} runs on {request.environment}, the first one registered on "
            f"{first.environment}: results may differ in the last bits"
        )
    if bookmark is not None and bookmark.workers != request.workers:
        found.append(
            f"worker {request.worker.rank} takes its share of the data as one of {request.workers}, so far they were "
            f"dealt for {bookmark.workers}: where all are started with that number, the rest of the pass is dealt anew"
        )
    return "; ".join(found)


def check_bringer(rank: int, shard: int) -> None:
    """Refuse the buffers of a leave, unless they come from rank 0 to the first shard. Raises ProtocolError."""
    if rank or shard:
        raise ProtocolError(f"buffers come from rank 0 to the first shard, not from worker {rank} to shard {shard}")


def check_untrained(untrained: Mapping[str, Tensor], layout: Layout, shard: int, rank: int) -> None:
    """Refuse tensors that are not among the untrained ones of the model, which the first shard keeps.

    A worker that joins copies them into its model: one that does not fit would break every later join.

    Args:
        untrained: By name; some may be missing.
        layout: As it was registered.
        shard: Position of this shard.
        rank: Of the worker that brings them.

    Raises:
        ProtocolError: when one has another name, shape or dtype.
    """
    kept = {(spec.name, spec.shape, spec.dtype) for spec in layout.untrained} if shard == 0 else set()
    for name, value in untrained.items():
        brought = TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        if (brought.name, brought.shape, brought.dtype) not in kept:
            raise ProtocolError(
                f"worker {rank} brings {brought}, which is none of the {len(kept)} untrained tensors that shard "
                f"{shard} keeps; a buffer has to have the name, shape and dtype that it had at wrap()"
            )


def _check_agreement(request: Register, first: Register) -> None:
    if request.layout != first.layout:
        lines = "\n  ".join(first.layout.differences(request.layout))
        raise LayoutError(
            f"the model of worker {request.worker.rank} differs from the one that "
            f"worker {first.worker.rank} registered:\n  {lines}"
        )
    if (request.optimizer, request.method) != (first.optimizer, first.method):
        raise RegistrationError(
            f"worker {request.worker.rank} wants {request.optimizer.name} {list(request.optimizer.groups)} with "
            f"{request.method}; worker {first.worker.rank} registered {first.optimizer.name} "
            f"{list(first.optimizer.groups)} with {first.method}; use the same on all workers"
        )
    if request.consistency != first.consistency:
        raise RegistrationError(
            f"worker {request.worker.rank} wants {request.consistency.describe()}; worker {first.worker.rank} "
            f"registered {first.consistency.describe()}; use the same on all workers"
        )


def _check_optimizer(request: Register) -> None:
    """Step it once with each group, over nothing that matters: as it was registered it must not fail later."""
    spec = request.optimizer
    for tensor in request.layout.trained:
        if tensor.group >= len(spec.groups):
            raise OptimizerError(
                f"tensor {tensor.name} is in parameter group {tensor.group}; the optimizer has {len(spec.groups)}"
            )
    for group in spec.groups:
        leaf = torch.zeros(1)
        leaf.grad = torch.zeros(1)
        try:
            OptimizerSpec(spec.name, (group,)).build([[leaf]]).step()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise OptimizerError(f"{spec.name} cannot run with {dict(group)}: {error}") from error
