"""What a model is made of, and which slice of it lives on which shard.

A model's trained tensors lie one after the other in one flat float32 vector. A shard owns a contiguous slice of it;
tensors may begin, end and be cut anywhere in a slice.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest
from typing import final

from thresher.protos.errors import ConfigurationError, LayoutError


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model: dotted ``name``, ``shape``, ``dtype`` ("float32", …) and optimizer ``group``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """For people: ``conv.weight float32 [8, 1, 3, 3]``."""
        return f"{self.name} {self.dtype} {list(self.shape)}"


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """The part of one trained tensor that lies in one slice.

    ``begin`` and ``end`` count from the slice's own start; ``offset`` is where the part begins inside its tensor.
    """

    tensor: int
    group: int
    begin: int
    end: int
    offset: int


@final
@dataclass(frozen=True, slots=True)
class Slice:
    """The part ``[begin, end)`` of the flat vector that one shard owns, cut into the segments of its tensors."""

    begin: int
    end: int
    segments: tuple[Segment, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.end - self.begin


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and order of a model's tensors.

    ``trained`` tensors lie in the flat vector in this order; ``untrained`` ones (frozen parameters and buffers) go
    with the model but are not exchanged step by step.

    Raises:
        LayoutError: when there is nothing to train, or a name occurs twice.
    """

    trained: tuple[TensorSpec, ...]
    untrained: tuple[TensorSpec, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a model that cannot be trained."""
        if not any(spec.numel for spec in self.trained):
            raise LayoutError(
                "the model has no trainable parameter: every parameter is frozen (requires_grad=False), empty, or "
                "missing from the optimizer; unfreeze at least one and hand it to the optimizer"
            )
        names = [spec.name for spec in (*self.trained, *self.untrained)]
        if len(names) != len(set(names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise LayoutError(f"tensor names must be unique, these occur twice: {', '.join(twice)}")

    @property
    def numel(self) -> int:
        """Elements of the flat vector."""
        return sum(spec.numel for spec in self.trained)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each trained tensor begins in the flat vector, and at last where the vector ends: [tensors + 1]."""
        return (0, *accumulate(spec.numel for spec in self.trained))

    @property
    def fingerprint(self) -> str:
        """Equal for equal layouts, on every machine: 16 hexadecimal digits of SHA-256."""
        parts = [
            [(s.name, s.shape, s.dtype, s.group, s.aliases) for s in specs] for specs in (self.trained, self.untrained)
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def shard_slice(self, shard: int, shards: int) -> Slice:
        """Return what shard ``shard`` of ``shards`` owns; the slices differ in size by one element at most.

        Raises:
            ConfigurationError: when there are more shards than elements, or no such shard.
        """
        if not 0 <= shard < shards:
            raise ConfigurationError(f"there is no shard {shard} among {shards} shards")
        if shards > self.numel:
            raise ConfigurationError(
                f"{shards} shards are more than the model's {self.numel} trained elements; start at most {self.numel}"
            )
        begin, end = self.numel * shard // shards, self.numel * (shard + 1) // shards
        segments = tuple(
            Segment(index, spec.group, max(low, begin) - begin, min(high, end) - begin, max(low, begin) - low)
            for index, (spec, (low, high)) in enumerate(zip(self.trained, pairwise(self.offsets), strict=True))
            if max(low, begin) < min(high, end)
        )
        return Slice(begin, end, segments)

    def slices(self, shards: int) -> tuple[Slice, ...]:
        """Return all slices, shard by shard. Raises as `shard_slice` does."""
        return tuple(self.shard_slice(shard, shards) for shard in range(shards))

    def differences(self, other: "Layout", limit: int = 8) -> list[str]:
        """Say for people what ``other`` has differently, at most ``limit`` lines; empty for an equal layout."""
        lines = _differences("trained", self.trained, other.trained)
        lines += _differences("untrained", self.untrained, other.untrained)
        hidden = len(lines) - limit
        return lines if hidden <= 0 else [*lines[:limit], f"and {hidden} more"]


def _differences(kind: str, ours: Iterable[TensorSpec], theirs: Iterable[TensorSpec]) -> list[str]:
    """Compare by name first, so that one missing tensor is one line; the order only where the names agree."""
    mine, yours = {s.name: s for s in ours}, {s.name: s for s in theirs}
    lines = [f"{kind} tensor {mine[name]} is registered but missing here" for name in mine if name not in yours]
    lines += [f"{kind} tensor {yours[name]} is not registered" for name in yours if name not in mine]
    lines += [_changed(kind, mine[n], yours[n]) for n in mine if n in yours and mine[n] != yours[n]]
    if not lines:
        lines = [
            f"{kind} tensors come in another order: {a} is registered where {b} is here"
            for a, b in zip_longest(mine, yours)
            if a != b
        ]
    return lines


def _changed(kind: str, ours: TensorSpec, theirs: TensorSpec) -> str:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return f"{kind} tensor {ours} is registered, here it is {theirs.dtype} {list(theirs.shape)}"
    return (
        f"{kind} tensor {ours.name} is registered in parameter group {ours.group} with aliases {list(ours.aliases)}, "
        f"here it is in group {theirs.group} with {list(theirs.aliases)}"
    )
