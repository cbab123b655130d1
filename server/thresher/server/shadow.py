"""The shadow: the model as all workers see it, kept near the parameters by assignments to few coordinates.

The shard's optimizer moves every coordinate a little in every round: momentum, weight decay, Adam's moments. To send
all of that would undo what sparse gradients save. So a coordinate is sent when it has moved away from what the workers
hold by the threshold, and then as its value, not as a difference: what a worker holds is a copy on any device, whatever
it missed, and no optimizer state is needed there.
"""

from collections import deque
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thresher.protos.errors import BehindError, ConfigurationError, LayoutError, ProtocolError
from thresher.protos.kernels import kernel
from thresher.protos.sparse import SparseGradient

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_LARGEST_THRESHOLD: Final = float(np.finfo(np.float32).max)
_ENTRY_BYTES: Final = 512  # more than the objects around one version's indices take


@final
class Shadow:
    """One vector w that follows the parameters x of a slice: ``w_j := x_j`` wherever ``|x_j - w_j| >= threshold``.

    Law (design law 10): after `advance`, each coordinate has ``|x_j - w_j| < threshold``, strictly, or x_j's own bits.
    Law: w of version u, followed by ``since(u)``, is w of the present version, bit for bit, for every u that is kept.

    With a threshold of 0 every coordinate whose bits differ is assigned, so that w is x: 0.0 is then told from -0.0,
    and one NaN from another. With any threshold, NaN and infinity are assigned when they come and when they go, and not
    again while they stay.

    Assignments are a `SparseGradient` whose values replace instead of being added. Its codec keeps their bits, those of
    -0.0, infinities and NaN included.

    What is kept of a version is the coordinates it assigned; their latest values are in w. After a crash, w is read
    back from a checkpoint like the parameters, and advanced with them as the log is replayed.

    Args:
        parameters: w to begin with, [numel] float32, on CPU: the parameters of `version`, or a shadow's `values`.
        threshold: In units of the parameters, at least 0; taken as float32.
        version: The version that ``parameters`` belong to.
        cap_bytes: Bytes that the kept coordinates may take; the oldest versions are forgotten first.

    Raises:
        LayoutError: when ``parameters`` are not a float32 vector.
        ConfigurationError: when ``threshold`` or ``cap_bytes`` is out of its range.

    Examples:
        >>> shadow = Shadow(torch.zeros(3), threshold=0.5)
        >>> shadow.advance(torch.tensor([0.4, 0.5, -2.0]), version=1).indices
        tensor([1, 2])
        >>> shadow.advance(torch.tensor([0.6, 0.7, -2.0]), version=2).indices
        tensor([0])
        >>> shadow.since(0).values
        tensor([ 0.6000,  0.5000, -2.0000])
    """

    def __init__(self, parameters: Tensor, threshold: float, version: int = 0, cap_bytes: int = 256 << 20) -> None:
        """Copy ``parameters``."""
        if parameters.ndim != 1 or parameters.dtype != torch.float32:
            raise LayoutError(f"a shadow is a float32 vector, found {parameters.dtype} {list(parameters.shape)}")
        if not 0.0 <= threshold <= _LARGEST_THRESHOLD:
            raise ConfigurationError(f"the threshold of the shadow is at least 0 and finite, {threshold} is not")
        if cap_bytes < 0:
            raise ConfigurationError(f"cap_bytes is at least 0, {cap_bytes} is not")
        self.version = version
        self._values = parameters.detach().clone(memory_format=torch.contiguous_format)  # [numel] float32
        self._threshold = np.float32(threshold)
        self._cap_bytes = cap_bytes
        self._assigned: deque[tuple[int, Tensor]] = deque()  # (version, its indices [k] int64), none of them empty
        self._assigned_bytes = 0
        self._oldest = version  # what came after it can be told

    @property
    def values(self) -> Tensor:
        """The vector w itself, [numel] float32: `advance` writes to it, so copy what is to stay."""
        return self._values

    def advance(self, parameters: Tensor, version: int) -> SparseGradient:
        """Follow the parameters to a later version; what was assigned on the way is what the workers have to hear.

        Reads both vectors once, in one pass. The cost does not depend on how many versions were left out.

        Args:
            parameters: x, [numel] float32, on CPU.
            version: The one they belong to, later than the present one.

        Raises:
            LayoutError: when ``parameters`` are not what the shadow follows; nothing has changed then.
            ProtocolError: when ``version`` is not a later one; nothing has changed then.
        """
        if parameters.shape != self._values.shape or parameters.dtype != torch.float32:
            raise LayoutError(
                f"the shadow follows float32 parameters {list(self._values.shape)}, "
                f"found {parameters.dtype} {list(parameters.shape)}"
            )
        if version <= self.version:
            raise ProtocolError(f"the shadow is at version {self.version} and cannot advance to {version}")
        assigned = self._copies(self._follow(parameters.detach().contiguous()))
        self.version = version
        if assigned.count:
            self._assigned.append((version, assigned.indices))
            self._assigned_bytes += _bytes(assigned.indices)
        while self._assigned_bytes > self._cap_bytes:
            self._forget_oldest()
        return assigned

    def since(self, version: int) -> SparseGradient:
        """Return all that was assigned after ``version``, each coordinate once, with its latest value.

        Raises:
            ProtocolError: when ``version`` has not come yet.
            BehindError: when what came after it is not kept any more.
        """
        self._check_come(version)
        if version < self._oldest:
            raise BehindError(
                f"assignments are kept from version {self._oldest} on, a worker at {version} needs a snapshot"
            )
        missed = [indices for at, indices in self._assigned if at > version]
        if len(missed) == 1:
            return self._copies(missed[0])
        touched = torch.zeros(self._values.numel(), dtype=torch.bool)
        for indices in missed:
            touched[indices] = True
        return self._copies(touched.nonzero().view(-1))

    def cut(self, version: int) -> None:
        """Forget what a worker at ``version`` knows: nobody is behind it any more. Twice changes nothing more.

        Raises:
            ProtocolError: when ``version`` has not come yet.
        """
        self._check_come(version)
        while self._assigned and self._assigned[0][0] <= version:
            self._forget_oldest()
        self._oldest = max(self._oldest, version)

    def _follow(self, parameters: Tensor) -> Tensor:
        """Assign what has moved far enough, and return its indices, [k] int64."""
        # Room for all of them; what is not written to is never handed out by the operating system.
        indices = torch.empty(parameters.numel(), dtype=torch.int64)
        count = _assign(parameters.numpy(), self._values.numpy(), self._threshold, indices.numpy())
        return indices[:count].clone()

    def _copies(self, indices: Tensor) -> SparseGradient:
        """The present values at ``indices``."""
        if indices.numel() == self._values.numel():
            return SparseGradient.dense(self._values.clone())
        return SparseGradient(indices, self._values[indices], self._values.numel())

    def _forget_oldest(self) -> None:
        version, indices = self._assigned.popleft()
        self._assigned_bytes -= _bytes(indices)
        self._oldest = version

    def _check_come(self, version: int) -> None:
        if version > self.version:
            raise ProtocolError(f"version {version} has not come yet, the shadow is at {self.version}")


def _bytes(indices: Tensor) -> int:
    return indices.nbytes + _ENTRY_BYTES


@kernel
def _assign(parameters: Floats, shadow: Floats, threshold: np.float32, indices: Integers) -> int:
    """Copy into ``shadow`` what is not nearer than ``threshold``, and where into ``indices``; returns how many.

    "Not nearer" is true of NaN, and of everything when the threshold is 0; what has the same bits is left out of both.
    """
    bits, shadow_bits, found = parameters.view(np.int32), shadow.view(np.int32), 0
    for at in range(parameters.size):
        place = np.uint64(at)  # numba would ask of a signed one whether it counts from the end
        if bits[place] != shadow_bits[place] and not abs(parameters[place] - shadow[place]) < threshold:
            shadow[place] = parameters[place]
            indices[np.uint64(found)] = at
            found += 1
    return found
