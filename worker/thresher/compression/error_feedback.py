"""Error feedback: what is not sent now is added to the next gradient."""

from collections.abc import Mapping
from typing import Any, Protocol, final, runtime_checkable

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
)
from thresher.compression.feedback import Feedback, check_tensor
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@runtime_checkable
class Correcting(Protocol):
    """A compressor that adds, selects and keeps the rest in fewer passes over memory than one after the other."""

    def compress_corrected(self, gradient: Tensor, residual: Tensor, round: Round) -> SparseGradient:
        """``compress(gradient + residual, round)``, with what is not sent left in ``residual``; both [numel] float32.

        Raises:
            ConfigurationError: the round lacks what the compressor needs. Nothing has changed then.
        """
        ...


@final
class ErrorFeedback(Feedback):
    """Compresses gradient + residual, and keeps what was not sent as the next residual.

    Law: ``sent + residual_after == gradient + residual_before``, to the bit when the compressor is a sparsifier. Hence
    over any number of steps everything sent plus the residual is everything put in. A gradient that is refused changes
    nothing; if the compressor itself fails, nothing is sent, and the gradient is in the residual already unless the
    compressor is :class:`Correcting`.

    With a :class:`Correcting` compressor (the hard threshold) a step is one pass over memory, and one more to look for
    NaN and infinity; :meth:`compress_finite` leaves that one out.

    Args:
        compressor: what to send of each sum. Its ``guarantee`` must declare that it conserves.
        numel: the length of the vectors.
        device: where the residual lives and where gradients must be.

    Raises:
        ConfigurationError: ``numel`` is negative, or the compressor does not conserve.

    References:
        Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback fixes
        SignSGD", arXiv:1901.09847; in gradient units as in Algorithm 2 of arXiv:2108.00951, in update units as in its
        Algorithm 1.

    Examples:
        >>> from thresher.compression import HardThreshold
        >>> feedback = ErrorFeedback(HardThreshold(1.0), numel=2)
        >>> feedback.compress(torch.tensor([0.75, 2.0])).densify(), feedback.residual
        (tensor([0., 2.]), tensor([0.7500, 0.0000]))
        >>> feedback.compress(torch.tensor([0.75, 0.5])).densify(), feedback.residual
        (tensor([1.5000, 0.0000]), tensor([0.0000, 0.5000]))
    """

    def __init__(self, compressor: Compressor, numel: int, *, device: torch.device | str = "cpu") -> None:
        if numel < 0:
            raise ConfigurationError(f"numel must not be negative, not {numel}")
        check_compressor("ErrorFeedback", compressor)
        if not compressor.guarantee.conserves:
            raise ConfigurationError(f"{compressor.describe()} does not conserve, so it has no error to feed back")
        self._compressor = compressor
        self._residual = torch.zeros(numel, dtype=torch.float32, device=device)

    @property
    def compressor(self) -> Compressor:
        """What is applied to gradient + residual."""
        return self._compressor

    @property
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32: the buffer itself, which each step rewrites."""
        return self._residual

    @property
    def guarantee(self) -> Guarantee:
        """It conserves; with a memory there is no bound on the error of one input alone (baseline)."""
        return Guarantee(conserves=True)

    def describe(self) -> str:
        """Such as ``ErrorFeedback(HardThreshold(0.01))``."""
        return f"ErrorFeedback({self._compressor.describe()})"

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of ``gradient`` + residual; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)
        return self.compress_finite(gradient, round)

    def compress_finite(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """As :meth:`compress`, for a caller that has looked for NaN and infinity itself: they would be let in here.

        Raises:
            ConfigurationError: another shape, dtype or device.
        """
        self._check_fits(gradient)
        if isinstance(self._compressor, Correcting):
            return self._compressor.compress_corrected(gradient, self._residual, round)
        # In place, because a second vector as large as the model is what this class should not cost.
        corrected = self._residual.add_(gradient)
        sent = self._compressor.compress(corrected, round)
        if sent.count == sent.numel:
            corrected.sub_(sent.values)
        else:
            corrected[sent.indices] = corrected[sent.indices] - sent.values
        return sent

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: the residual, and the state of the compressor."""
        return {
            "method": self.describe(),
            "residual": self._residual.clone(),
            "compressor": self._compressor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "residual", "compressor"})
        residual = check_tensor("residual", state["residual"], self._residual)
        self._compressor.load_state_dict(state["compressor"])
        self._residual.copy_(residual)
