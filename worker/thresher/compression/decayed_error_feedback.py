"""Decayed error feedback: what was not sent long ago counts less."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Compressor,
    Guarantee,
    Round,
    check_compressor,
    check_finite,
    check_state,
    described,
)
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.feedback import Feedback
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class DecayedErrorFeedback(Feedback):
    """Compresses gradient + decay · residual, and keeps what was not sent as the next residual.

    Law: ``sent + residual_after == gradient + decay · residual_before``. With decay 1 it is :class:`ErrorFeedback`, to
    the bit; with 0 nothing is remembered. Below 1 the old is forgotten by and by: it does not conserve.

    Args:
        compressor: what to send of each sum. Its ``guarantee`` must declare that it conserves.
        numel: the length of the vectors.
        decay: β in [0, 1].
        device: where the residual lives and where gradients must be.

    Raises:
        ConfigurationError: the decay is outside [0, 1], ``numel`` is negative, or the compressor does not conserve.

    References:
        Peng, Quesnelle and Kingma, "DeMo: Decoupled momentum optimization", arXiv:2411.19870; "SparseLoCo",
        arXiv:2508.15706, on pseudo-gradients.

    Examples:
        >>> from thresher.compression import HardThreshold
        >>> feedback = DecayedErrorFeedback(HardThreshold(1.0), numel=1, decay=0.5)
        >>> feedback.compress(torch.tensor([0.75])).count
        0
        >>> feedback.compress(torch.tensor([0.75])).densify()  # 0.5 · 0.75 + 0.75
        tensor([1.1250])
    """

    compressor: Compressor
    numel: int
    decay: float
    _: KW_ONLY
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_compressor("DecayedErrorFeedback", self.compressor)
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigurationError(f"the decay of the residual must be in [0, 1], not {self.decay}")
        self.decay = float(self.decay) + 0.0
        self._feedback = ErrorFeedback(self.compressor, self.numel, device=self.device)

    @property
    def guarantee(self) -> Guarantee:
        """It conserves with decay 1 only."""
        return Guarantee(conserves=self.decay == 1.0)

    @property
    def residual(self) -> Tensor:
        """What the last step did not send, not decayed yet, [numel] float32: the buffer itself."""
        return self._feedback.residual

    def describe(self) -> str:
        """Such as ``DecayedErrorFeedback(TopK(0.01), 0.95)``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of ``gradient`` + decay · residual; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)  # before the residual decays: a refused gradient changes nothing
        self._feedback.residual.mul_(self.decay)
        return self._feedback.compress_finite(gradient, round)

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
