"""What one worker sends of each step: error feedback around a compressor whose threshold may come from the run."""

from typing import final

from torch import Tensor

from thresher.compression import ErrorFeedback, HardThreshold, quantile_threshold
from thresher.protos.layout import Layout
from thresher.protos.sparse import SparseGradient
from thresher.worker.method import Method


@final
class Selection:
    """A method at work. One λ per run: rank 0 proposes it, it travels in the update, everybody adopts it.

    Args:
        method: What to send.
        layout: The model.
    """

    def __init__(self, method: Method, layout: Layout) -> None:
        """Begin with an empty residual."""
        self._feedback = ErrorFeedback(method.compressor_for(layout), layout.numel)
        self._calibration = method.calibration()
        self._density = method.density
        self._thresholded = method.compressor == "hard-threshold"
        self.threshold = method.fixed_threshold(layout)  # in the unit of the gradient; None until it is calibrated

    @property
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32."""
        return self._feedback.residual

    def select(self, message: Tensor, scale: float) -> SparseGradient:
        """Return what is sent of ``message`` + residual, and keep the rest.

        Args:
            message: [numel] float32, finite.
            scale: The unit of messages in units of gradients; the threshold is λ·scale (arXiv:2108.00951, C_γ).
        """
        if scale == 0.0:
            return SparseGradient.empty(message.numel())  # a step of size 0; a threshold of 0 would send the residual
        if self._thresholded:
            self._feedback.compressor = HardThreshold(self._lambda(message, scale) * scale)
        return self._feedback.compress(message)

    def propose(self, sent: SparseGradient | None, scale: float) -> float | None:
        """Return rank 0's λ for the next round, after ``sent`` was selected; None for methods without one."""
        if self._calibration is None or self._calibration.finished or sent is None or scale == 0.0:
            return self.threshold
        corrected = self.residual.clone()
        corrected[sent.indices] += sent.values
        return self._calibration.observe(corrected.div_(scale))

    def adopt(self, threshold: float | None) -> None:
        """Take the run's λ for the next step."""
        if threshold is not None:
            self.threshold = threshold

    def _lambda(self, message: Tensor, scale: float) -> float:
        if self.threshold is not None or self._density is None:
            return self.threshold or 0.0
        # Nobody has proposed one yet: each worker keeps the largest of its own first gradient.
        return quantile_threshold(message, self._density) / scale
