"""Values ↔ protobuf messages, and payloads ↔ chunks. The only module, beside the gRPC edges, that knows protobuf."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, cast, final

from thresher.protos.bookmark import Bookmark
from thresher.protos.codec import frame_bytes_bound
from thresher.protos.consistency import Consistency, Downlink, Mode
from thresher.protos.errors import FrameError, LayoutError, OptimizerError, ProtocolError
from thresher.protos.layout import Layout, Slice, TensorSpec
from thresher.protos.optimizers import Hyperparameter, OptimizerSpec, Override
from thresher.v1 import aggregation_pb2 as pb

CHUNK_BYTES: Final = 1 << 20
"""Largest part of a payload in one message: 1 MiB reaches most of loopback TCP, unary messages of 10 MB do not."""

REGISTRATION_BYTES: Final = 3 << 20
"""Largest registration: gRPC takes messages of 4 MiB, and a snapshot begins with the layout beside a first chunk."""


def layout_to_message(layout: Layout) -> pb.Layout:
    """Write a layout."""
    return pb.Layout(
        trained=[_tensor_to_message(spec) for spec in layout.trained],
        untrained=[_tensor_to_message(spec) for spec in layout.untrained],
    )


def layout_from_message(message: pb.Layout) -> Layout:
    """Read a layout. Raises LayoutError when it makes no sense."""
    return Layout(
        tuple(_tensor_from_message(tensor) for tensor in message.trained),
        tuple(_tensor_from_message(tensor) for tensor in message.untrained),
    )


def _tensor_to_message(spec: TensorSpec) -> pb.Tensor:
    return pb.Tensor(name=spec.name, shape=spec.shape, dtype=spec.dtype, group=spec.group, aliases=spec.aliases)


def _tensor_from_message(message: pb.Tensor) -> TensorSpec:
    if any(size < 0 for size in message.shape):
        raise LayoutError(f"tensor {message.name} has a negative size: {list(message.shape)}")
    return TensorSpec(message.name, tuple(message.shape), message.dtype, message.group, tuple(message.aliases))


def optimizer_to_message(spec: OptimizerSpec) -> pb.Optimizer:
    """Write an optimizer."""
    groups = [
        pb.ParameterGroup(hyperparameters={name: _value_to_message(value) for name, value in group.items()})
        for group in spec.groups
    ]
    return pb.Optimizer(name=spec.name, groups=groups)


def optimizer_from_message(message: pb.Optimizer) -> OptimizerSpec:
    """Read an optimizer. Raises OptimizerError when the shards do not apply it."""
    groups = tuple(
        {name: _value_from_message(value) for name, value in sorted(group.hyperparameters.items())}
        for group in message.groups
    )
    return OptimizerSpec(message.name, groups)


def consistency_to_message(consistency: Consistency) -> pb.Consistency:
    """Write when rounds close."""
    return pb.Consistency(
        mode=consistency.mode,
        quorum=consistency.quorum,
        grace_seconds=consistency.grace,
        staleness=consistency.staleness,
        max_staleness=consistency.max_staleness,
        downlink=consistency.downlink,
        shadow_threshold=consistency.shadow_threshold,
        momentum_per_push=consistency.momentum_per_push,
        staleness_aware=consistency.staleness_aware,
    )


def consistency_from_message(message: pb.Consistency) -> Consistency:
    """Read when rounds close. Raises ConfigurationError when it makes no sense."""
    return Consistency(
        mode=cast("Mode", message.mode),
        quorum=message.quorum,
        grace=message.grace_seconds,
        staleness=message.staleness,
        max_staleness=message.max_staleness,
        downlink=cast("Downlink", message.downlink),
        shadow_threshold=message.shadow_threshold,
        momentum_per_push=message.momentum_per_push,
        staleness_aware=message.staleness_aware,
    )


def overrides_to_messages(overrides: Sequence[Override]) -> list[pb.Override]:
    """Write hyper-parameters that differ from the registered ones."""
    return [pb.Override(group=o.group, name=o.name, value=_value_to_message(o.value)) for o in overrides]


def overrides_from_messages(messages: Iterable[pb.Override]) -> tuple[Override, ...]:
    """Read hyper-parameters that differ from the registered ones."""
    return tuple(Override(m.group, m.name, _value_from_message(m.value)) for m in messages)


def bookmark_to_message(bookmark: Bookmark) -> pb.Bookmark:
    """Write a bookmark."""
    return pb.Bookmark(
        step=bookmark.step,
        passes=bookmark.passes,
        begun=bookmark.begun,
        pass_step=bookmark.pass_step,
        shares=[pb.Share(workers=workers, taken=taken) for workers, taken in bookmark.shares],
        agreements=bookmark.agreements,
        since=bookmark.since,
    )


def bookmark_from_message(message: pb.Bookmark) -> Bookmark:
    """Read a bookmark. Raises ProtocolError when it is no place in a pass over data."""
    shares = tuple((share.workers, share.taken) for share in message.shares)
    if not message.begun or not shares or not all(workers for workers, _ in shares) or message.pass_step > message.step:
        raise ProtocolError(
            f"a bookmark in pass {message.begun} from step {message.pass_step} of {list(shares)} is told"
        )
    return Bookmark(
        message.step, message.passes, message.begun, message.pass_step, shares, message.agreements, message.since
    )


def _value_to_message(value: Hyperparameter) -> pb.Value:
    match value:
        case bool():
            return pb.Value(flag=value)
        case str():
            return pb.Value(text=value)
        case tuple():
            return pb.Value(numbers=pb.Numbers(items=value))
        case _:
            return pb.Value(number=value)


def _value_from_message(message: pb.Value) -> Hyperparameter:
    match message.WhichOneof("kind"):
        case "number":
            return message.number
        case "flag":
            return message.flag
        case "text":
            return message.text
        case "numbers":
            return tuple(message.numbers.items)
        case _:
            raise OptimizerError("a hyper-parameter without a value")


def chunks(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut a payload into chunks, the first with the total length; an empty payload is one empty chunk."""
    view = memoryview(payload)
    yield len(payload), bytes(view[:CHUNK_BYTES])
    for begin in range(CHUNK_BYTES, len(payload), CHUNK_BYTES):
        yield 0, bytes(view[begin : begin + CHUNK_BYTES])


def payload_bound(piece: Slice) -> int:
    """Return the size of the largest frame that can be right for a slice: a longer one is refused unread."""
    return frame_bytes_bound(piece.numel)


@final
class Payload:
    """Puts the chunks of one payload together, and never holds more than was announced and allowed.

    Raises:
        FrameError: when the announced size is above ``bound``.
    """

    def __init__(self, total_bytes: int, bound: int) -> None:
        """Announce ``total_bytes``; memory grows with the chunks that really come."""
        if total_bytes > bound:
            raise FrameError(f"a payload of {total_bytes} bytes is announced; at most {bound} are possible here")
        self._total = total_bytes
        self.data = bytearray()

    def add(self, chunk: bytes) -> bool:
        """Take the next chunk; True when the payload is complete.

        Raises:
            FrameError: when it is longer than announced.
        """
        if len(self.data) + len(chunk) > self._total:
            raise FrameError(f"a payload of {self._total} bytes was announced, more came")
        self.data += chunk
        return len(self.data) == self._total
