"""EF21: each worker sends how its gradient differs from what the server believes it to be."""

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
    check_finite,
    check_state,
    described,
)
from thresher.compression.feedback import Feedback, Where, check_tensor
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class EF21(Feedback):
    """Sends C(gradient - estimate) and adds it to the estimate; the server adds the mean of what it gets to its own.

    The server's memory is the mean of the workers' estimates, and that is what the optimizer sees, not the message. It
    exists in the simulator only: a shard keeps no memory beside its optimizer. With full gradients and a contraction C
    the estimates converge to the gradients, also where these differ among the workers for ever. It does not conserve:
    a gradient that has passed is nobody's debt.

    The estimate starts at zero. The official code starts it at the first gradient, sent whole.

    Args:
        compressor: C, what to send of each difference.
        numel: the length of the vectors.
        device: where the estimate lives and where gradients must be.

    Raises:
        ConfigurationError: ``compressor`` is none, or ``numel`` is negative.

    References:
        Richtárik, Sokolov and Fatkhullin, "EF21: A new, simpler, theoretically better, and practically faster error
        feedback", arXiv:2106.05203.

    Examples:
        >>> from thresher.compression import TopK
        >>> feedback = EF21(TopK(0.5), numel=2)
        >>> feedback.compress(torch.tensor([1.0, 3.0])).densify(), feedback.estimate
        (tensor([0., 3.]), tensor([0., 3.]))
        >>> feedback.compress(torch.tensor([1.0, 3.0])).densify(), feedback.estimate
        (tensor([1., 0.]), tensor([1., 3.]))
    """

    runs_in: ClassVar[frozenset[Where]] = frozenset({"simulator"})

    compressor: Compressor
    numel: int
    _: KW_ONLY
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_compressor("EF21", self.compressor)
        if self.numel < 0:
            raise ConfigurationError(f"numel must not be negative, not {self.numel}")
        self._estimate = torch.zeros(self.numel, device=self.device)
        self._residual = torch.zeros(self.numel, device=self.device)

    @property
    def estimate(self) -> Tensor:
        """g_i, what the server believes this worker's gradient to be, [numel] float32: the buffer itself."""
        return self._estimate

    @property
    def residual(self) -> Tensor:
        """Last gradient - estimate, [numel] float32: the buffer itself, which each step rewrites."""
        return self._residual

    @property
    def guarantee(self) -> Guarantee:
        """It does not conserve; with a memory there is no bound on the error of one input alone."""
        return Guarantee(conserves=False)

    def describe(self) -> str:
        """Such as ``EF21(TopK(0.01))``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of ``gradient`` - estimate; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)
        sent = self.compressor.compress(torch.sub(gradient, self._estimate, out=self._residual), round)
        self._estimate.index_add_(0, sent.indices, sent.values)
        self._residual.index_add_(0, sent.indices, sent.values, alpha=-1)
        return sent

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: estimate, residual, and the state of the compressor."""
        return {
            "method": self.describe(),
            "estimate": self._estimate.clone(),
            "residual": self._residual.clone(),
            "compressor": self.compressor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "estimate", "residual", "compressor"})
        estimate = check_tensor("estimate", state["estimate"], self._estimate)
        residual = check_tensor("residual", state["residual"], self._residual)
        self.compressor.load_state_dict(state["compressor"])
        self._estimate.copy_(estimate)
        self._residual.copy_(residual)
