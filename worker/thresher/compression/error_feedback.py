"""Error feedback: what is not sent now is added to the next gradient."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from thresher.compression.base import Compressor, Guarantee, check_finite, check_flat
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
class ErrorFeedback:
    """Compresses gradient + residual, and keeps what was not sent as the next residual.

    Law: ``sent + residual_after == gradient + residual_before``, to the bit when the compressor is a sparsifier. Hence
    over any number of steps everything sent plus the residual is everything put in. A gradient that is refused changes
    nothing; if the compressor itself fails, nothing is sent and the gradient is in the residual already.

    ``compressor`` may be replaced between steps, for instance by one with another threshold; the residual stays.

    Args:
        compressor: what to send of each sum. Its ``guarantee`` must declare that it conserves.
        numel: the length of the vectors.
        device: where the residual lives and where gradients must be.

    Raises:
        ConfigurationError: ``numel`` is negative, or the compressor does not conserve.

    References:
        Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; Karimireddy et al., "Error feedback fixes
        SignSGD", arXiv:1901.09847; in gradient units as in Algorithm 2 of arXiv:2108.00951.

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
        self.compressor = compressor
        self._residual = torch.zeros(numel, dtype=torch.float32, device=device)

    @property
    def compressor(self) -> Compressor:
        """What is applied to gradient + residual."""
        return self._compressor

    @compressor.setter
    def compressor(self, compressor: Compressor) -> None:
        if not compressor.guarantee.conserves:
            raise ConfigurationError(f"{compressor.describe()} does not conserve, so it has no error to feed back")
        self._compressor = compressor

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
        return f"ErrorFeedback({self.compressor.describe()})"

    def compress(self, gradient: Tensor) -> SparseGradient:
        """What is sent of ``gradient`` + residual; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)
        # In place, because a second vector as large as the model is what this class should not cost.
        corrected = self._residual.add_(gradient)
        sent = self.compressor.compress(corrected)
        if sent.count == sent.numel:
            corrected.sub_(sent.values)
        else:
            corrected.index_add_(0, sent.indices, sent.values, alpha=-1)
        return sent

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: the residual, and the description of the compressor it belongs to."""
        return {"compressor": self.compressor.describe(), "residual": self._residual.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another compressor or another numel (both are named), or is not
                such a state; nothing is changed.
        """
        if set(state) != {"compressor", "residual"}:
            raise ConfigurationError(f"not the state of an ErrorFeedback: found the keys {sorted(state)}")
        if state["compressor"] != self.compressor.describe():
            raise ConfigurationError(
                f"the state belongs to {state['compressor']}, this is {self.compressor.describe()}: "
                "load it with its own compressor, then replace that"
            )
        residual = state["residual"]
        if not isinstance(residual, Tensor):
            raise ConfigurationError(f"the residual in the state is a {type(residual).__name__}, not a tensor")
        self._check_fits(residual.to(self._residual.device))
        self._residual.copy_(residual)

    def _check_fits(self, vector: Tensor) -> None:
        check_flat(vector)
        if vector.numel() != self._residual.numel():
            raise ConfigurationError(f"expected a vector of numel {self._residual.numel()}, found {vector.numel()}")
        if vector.device != self._residual.device:
            raise ConfigurationError(f"expected a vector on {self._residual.device}, found one on {vector.device}")
