"""Detached error feedback: the model takes its gradients where part of its own residual is applied already."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Compressor,
    Guarantee,
    Round,
    check_compressor,
    check_state,
    described,
)
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.feedback import Feedback, Where
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class DetachedErrorFeedback(Feedback):
    """:class:`ErrorFeedback` on updates, whose model stands at x - coefficient · residual.

    What is sent and kept is that of :class:`ErrorFeedback`, to the bit; only the point at which a worker takes its next
    gradient differs, and whoever runs the model moves it there (:attr:`detached`). x stays what all workers share.

    Args:
        compressor: what to send of update + residual. Its ``guarantee`` must declare that it conserves.
        numel: the length of the vectors.
        coefficient: c in [0, 1]. 0 is error feedback with local momentum, 1 is SAEF (step-ahead error feedback).
        device: where the residual lives and where updates must be.

    Raises:
        ConfigurationError: the coefficient is outside [0, 1], ``numel`` is negative, or the compressor does not
            conserve.

    References:
        Xu and Huang, "Detached error feedback for distributed SGD with random sparsification", arXiv:2004.05298; 0.3 is
        the value in its official scripts.

    Examples:
        >>> from thresher.compression import TopK
        >>> DetachedErrorFeedback(TopK(0.01), numel=100).detached
        0.3
    """

    runs_in: ClassVar[frozenset[Where]] = frozenset({"update", "simulator"})

    compressor: Compressor
    numel: int
    coefficient: float = 0.3
    _: KW_ONLY
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_compressor("DetachedErrorFeedback", self.compressor)
        if not 0.0 <= self.coefficient <= 1.0:
            raise ConfigurationError(f"the coefficient of the residual must be in [0, 1], not {self.coefficient}")
        self.coefficient = self.detached = float(self.coefficient) + 0.0
        self._feedback = ErrorFeedback(self.compressor, self.numel, device=self.device)

    @property
    def guarantee(self) -> Guarantee:
        """It conserves, as :class:`ErrorFeedback` does."""
        return self._feedback.guarantee

    @property
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32: the buffer itself, which each step rewrites."""
        return self._feedback.residual

    def describe(self) -> str:
        """Such as ``DetachedErrorFeedback(TopK(0.01), coefficient=0.5)``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of ``gradient`` + residual; ``gradient``, [numel] float32, is a finished update.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the update; names the first index and how many.
        """
        return self._feedback.compress(gradient, round)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: that of an :class:`ErrorFeedback`."""
        return {"method": self.describe(), "feedback": self._feedback.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "feedback"})
        self._feedback.load_state_dict(state["feedback"])
