"""Momentum correction: each worker accumulates its own velocity instead of its gradients."""

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
from thresher.compression.feedback import Feedback, Where, check_tensor
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class MomentumCorrection(Feedback):
    """Error feedback on a worker's own momentum: v accumulates u, the velocity, and C(v) is sent.

    ``u ← momentum · u + g; v ← v + u``, or in DGC's Nesterov form ``u ← momentum · (u + g); v ← v + u + g``. With
    masking, a coordinate that is sent forgets its velocity, so that it does not go on in a direction which is old by
    the time it is sent again. The optimizer behind it must be plain SGD: the momentum is here already.

    It does not conserve its input: what it sends and keeps are velocities, each gradient counted 1/(1 - momentum) times
    in the end. Without masking it conserves these, and with everything sent it is heavy-ball (or Nesterov) SGD. With
    masking and everything sent there is no momentum left at all.

    Args:
        compressor: what to send of v. Its ``guarantee`` must declare that it conserves.
        numel: the length of the vectors.
        momentum: β in [0, 1).
        nesterov: DGC's Nesterov form.
        masking: momentum factor masking.
        device: where the buffers live and where gradients must be.

    Raises:
        ConfigurationError: the momentum is outside [0, 1), ``numel`` is negative, or the compressor does not conserve.

    References:
        Lin et al., "Deep gradient compression", arXiv:1712.01887, sections 3.2 (correction) and 3.3 (masking);
        Algorithm 3 of arXiv:2108.00951.

    Examples:
        >>> from thresher.compression import HardThreshold
        >>> feedback = MomentumCorrection(HardThreshold(2.0), numel=1, momentum=0.5)
        >>> [feedback.compress(torch.ones(1)).densify().item() for _ in range(4)]
        [0.0, 2.5, 0.0, 2.5]
    """

    runs_in: ClassVar[frozenset[Where]] = frozenset({"gradient", "hook", "simulator"})

    compressor: Compressor
    numel: int
    momentum: float = 0.9
    _: KW_ONLY
    nesterov: bool = False
    masking: bool = True
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_compressor("MomentumCorrection", self.compressor)
        self.momentum = checked_momentum(self.momentum)
        self._feedback = ErrorFeedback(self.compressor, self.numel, device=self.device)
        self._velocity = torch.zeros(self.numel, device=self.device)

    @property
    def guarantee(self) -> Guarantee:
        """It does not conserve its input; with a memory there is no bound on the error of one input alone."""
        return Guarantee(conserves=False)

    @property
    def residual(self) -> Tensor:
        """v, the accumulated velocity that has not been sent, [numel] float32: the buffer itself."""
        return self._feedback.residual

    @property
    def velocity(self) -> Tensor:
        """u, [numel] float32; each step makes a new one."""
        return self._velocity

    def describe(self) -> str:
        """Such as ``MomentumCorrection(TopK(0.01), nesterov=True)``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of the accumulated velocity; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient, or in a velocity that outgrows float32; names the
                first index and how many. Nothing has changed then.
        """
        self._check_fits(gradient)
        velocity, moved = advanced(self._velocity, gradient, self.momentum, nesterov=self.nesterov)
        sent = self._feedback.compress(moved, round)
        if self.masking:
            velocity[sent.indices] = 0.0
        self._velocity = velocity
        return sent

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: u, v, and the state of the compressor."""
        return {
            "method": self.describe(),
            "velocity": self._velocity.clone(),
            "feedback": self._feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "velocity", "feedback"})
        velocity = check_tensor("velocity", state["velocity"], self._velocity)
        self._feedback.load_state_dict(state["feedback"])
        self._velocity = velocity.to(self.device, copy=True)


def checked_momentum(momentum: float) -> float:
    """``momentum`` as a float in [0, 1).

    Raises:
        ConfigurationError: it is outside, or NaN.
    """
    if not 0.0 <= momentum < 1.0:
        raise ConfigurationError(f"momentum must be in [0, 1), not {momentum}")
    return float(momentum) + 0.0


def advanced(velocity: Tensor, gradient: Tensor, momentum: float, *, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The next velocity and what it moves by, each [numel] float32; without Nesterov they are one tensor."""
    if not nesterov:
        velocity = torch.add(gradient, velocity, alpha=momentum)
        return velocity, velocity
    velocity = torch.add(gradient, velocity).mul_(momentum)
    return velocity, velocity + gradient
