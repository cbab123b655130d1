"""One bucket's way to the other workers and back: a header each, then a frame each.

A process group whose backend serves the CPU (gloo) sends from there; another (nccl) from where the gradients are.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, cast, final

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.protos.codec import decode
from thresher.protos.mean import mean_of


@final
class Header(NamedTuple):
    """What each worker says before it sends a frame.

    Attributes:
        length: Of the frame, in bytes.
        failed: Whether there is none, because something went wrong.
        agreement: A checksum of what must be equal on all workers.
    """

    length: int
    failed: bool
    agreement: int


HEADER_BYTES: Final = len(Header._fields) * torch.int64.itemsize


def gather_headers(group: dist.ProcessGroup | None, header: Header, device: torch.device) -> list[Header]:
    """The headers of all workers, by rank; waits until each worker has called this.

    Args:
        group: The workers; None: torch's default group.
        header: This worker's.
        device: Where the gradients are.
    """
    own = torch.tensor(header, dtype=torch.int64, device=_sending_device(group, device))
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    return [Header(length, bool(failed), agreement) for length, failed, agreement in torch.stack(gathered).tolist()]


@final
class Transfer:
    """The frames of one bucket on their way.

    What is to happen when they arrive is no callback: torch would run that on a thread of the process group, and a
    group that ends meanwhile waits for that thread, or is ended by it.

    Args:
        group: The workers; None: torch's default group.
        frame: This worker's.
        lengths: Of all workers' frames, by rank.
        gradients: Where the mean belongs, in the order of the vector that the frames hold.
        buffer: What they are views of.

    Attributes:
        future: Of ``buffer``, done when it holds the mean.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        frame: bytes,
        lengths: Sequence[int],
        gradients: Sequence[Tensor],
        buffer: Tensor,
    ) -> None:
        self._lengths, self._gradients, self._buffer = lengths, gradients, buffer
        padded = bytearray(frame.ljust(max(lengths), b"\0"))
        self._own = torch.frombuffer(padded, dtype=torch.uint8).to(_sending_device(group, buffer.device))
        self._gathered = [torch.empty_like(self._own) for _ in lengths]
        self._work = cast("dist.Work", dist.all_gather(self._gathered, self._own, group=group, async_op=True))
        self.future: torch.futures.Future[Tensor] = torch.futures.Future()

    def finish(self) -> None:
        """Wait for the frames, and write their mean.

        Raises:
            FrameError: a frame did not arrive as it was sent.
        """
        self._work.wait()
        sizes = [gradient.numel() for gradient in self._gradients]
        frames = (padded[:length] for padded, length in zip(self._gathered, self._lengths, strict=True))
        sent = [decode(frame.numpy(force=True).data, numel=sum(sizes)) for frame in frames]
        pieces = torch.split(mean_of(sent, len(sent)).densify(), sizes)
        for gradient, piece in zip(self._gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))
        self.future.set_result(self._buffer)


def _sending_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    return torch.device("cpu") if "cpu" in dist.get_backend_config(group) else device
