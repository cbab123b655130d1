"""The contract of a feedback: what becomes of what is not sent."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from thresher.compression.base import FIRST_ROUND, Guarantee, Round, check_flat
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient

Where = Literal["gradient", "update", "hook", "simulator"]
"""Where a feedback can run: gradient-placed or update-placed under ``thresher launch``, in the hook for torch's
DistributedDataParallel, or in the simulator."""


class Feedback(ABC):
    """A compressor with a memory for what it did not send: one worker's side of a method.

    Attributes:
        runs_in: where it makes sense; anything else is refused by name.
        detached: c of x - c·residual, the point at which the model takes its gradients (0: at x itself).
    """

    runs_in: ClassVar[frozenset[Where]] = frozenset({"gradient", "update", "hook", "simulator"})
    detached: float = 0.0

    @property
    @abstractmethod
    def guarantee(self) -> Guarantee:
        """What holds for every sequence of inputs; with a memory, bounds on one input alone are None."""

    @property
    @abstractmethod
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32: the buffer itself, which each step rewrites."""

    @abstractmethod
    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of ``gradient`` and the memory; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many. Nothing has
                changed then.
        """

    def compress_finite(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """As :meth:`compress`, for a caller that has looked for NaN and infinity itself; it may save that pass.

        Raises:
            ConfigurationError: another shape, dtype or device.
        """
        return self.compress(gradient, round)

    @abstractmethod
    def describe(self) -> str:
        """Such as ``ErrorFeedback(HardThreshold(0.01))``: the call that makes it, without what the model brings."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: tensors, plain values and such dictionaries, and what it belongs to."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, and go on bit for bit as the one it was taken from.

        Raises:
            ConfigurationError: the state belongs to another method or another layout (the difference is named), or is
                not such a state; nothing is changed.
        """

    def _check_fits(self, vector: Tensor) -> None:
        check_flat(vector)
        if vector.numel() != self.residual.numel():
            raise ConfigurationError(f"expected a vector of numel {self.residual.numel()}, found {vector.numel()}")
        if vector.device != self.residual.device:
            raise ConfigurationError(f"expected a vector on {self.residual.device}, found one on {vector.device}")


def check_tensor(name: str, value: object, like: Tensor) -> Tensor:
    """Return ``value`` if a state may put it where ``like`` is.

    Raises:
        ConfigurationError: it is no tensor, or has another shape or dtype; both are named.
    """
    if not isinstance(value, Tensor):
        raise ConfigurationError(f"the {name} in the state is a {type(value).__name__}, not a tensor")
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ConfigurationError(
            f"the {name} in the state is {value.dtype} of shape {tuple(value.shape)}, "
            f"expected {like.dtype} of shape {tuple(like.shape)}: it belongs to another model"
        )
    return value
