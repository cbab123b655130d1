"""No feedback: what is not sent is lost."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
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
from thresher.compression.feedback import Feedback
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class NoFeedback(Feedback):
    """Compresses each gradient alone and remembers nothing.

    This is how unbiased compressors (QSGD, TernGrad) are meant to run: their errors average out. With a biased one it
    is the baseline that shows what error feedback is for, and need not converge.

    Args:
        compressor: what to send of each gradient; any.
        numel: the length of the vectors.
        device: where gradients must be.

    Raises:
        ConfigurationError: ``compressor`` is none, or ``numel`` is negative.

    References:
        Baseline; Alistarh et al., "QSGD", arXiv:1610.02132, for unbiased compressors; Beznosikov et al.,
        arXiv:2002.12410, for a biased one that diverges.

    Examples:
        >>> from thresher.compression import TopK
        >>> feedback = NoFeedback(TopK(0.5), numel=2)
        >>> feedback.compress(torch.tensor([1.0, 2.0])).densify(), feedback.residual
        (tensor([0., 2.]), tensor([0., 0.]))
    """

    compressor: Compressor
    numel: int
    _: KW_ONLY
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_compressor("NoFeedback", self.compressor)
        if self.numel < 0:
            raise ConfigurationError(f"numel must not be negative, not {self.numel}")
        self._residual = torch.zeros(1, device=self.device).expand(self.numel)  # one zero in memory, whatever numel

    @property
    def guarantee(self) -> Guarantee:
        """The compressor's own bounds, as each input stands alone; but it does not conserve, as the rest is lost."""
        return replace(self.compressor.guarantee, conserves=False)

    @property
    def residual(self) -> Tensor:
        """Zero, [numel] float32; it cannot be written to."""
        return self._residual

    def describe(self) -> str:
        """Such as ``NoFeedback(QSGD())``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What the compressor sends of ``gradient``, [numel] float32.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)
        return self.compressor.compress(gradient, round)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: that of the compressor."""
        return {"method": self.describe(), "numel": self.numel, "compressor": self.compressor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "numel", "compressor"})
        if state["numel"] != self.numel:
            raise ConfigurationError(f"the state belongs to vectors of numel {state['numel']}, these have {self.numel}")
        self.compressor.load_state_dict(state["compressor"])
