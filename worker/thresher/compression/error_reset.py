"""Error reset: residuals are applied at once by their own worker, and brought together from time to time."""

from collections.abc import Mapping
from copy import deepcopy
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
    check_whole,
    described,
)
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.feedback import Feedback, Where
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class ErrorReset(Feedback):
    """CSER: each worker applies its own error whole, and every ``period`` rounds part of it is exchanged and reset.

    In each round ``update`` chooses what is sent of the new update, and the rest joins the residual. In the last round
    of each period ``reset`` also chooses what is sent of the residual. The model stands at x - residual
    (:attr:`detached` is 1), so it has moved by all of its own updates, and by the means of what was sent of others'.

    The paper writes the local models x_k and errors of the other sign; with x = x_k + residual, which all workers
    share, its steps are these. In this form it conserves. With ``period`` 1 and no ``update`` it is SAEF,
    :class:`~thresher.compression.detached_error_feedback.DetachedErrorFeedback` with coefficient 1, to the bit.

    Args:
        reset: C1, what to send of the residual at the end of a period. It must declare that it conserves.
        numel: the length of the vectors.
        period: H ≥ 1 rounds from one reset to the next, counted by :attr:`Round.step`.
        update: C2, what to send of each update; it must declare that it conserves, and should not draw from the seed of
            ``reset``. None: nothing, as in the official runs.
        device: where the residual lives and where updates must be.

    Raises:
        ConfigurationError: the period is no whole number ≥ 1, ``numel`` is negative, or a compressor is none, or does
            not conserve.

    References:
        Xie et al., "CSER: Communication-efficient SGD with error reset", arXiv:2007.13221, and the code for
        it in the official repository of arXiv:2004.05298.

    Examples:
        >>> from thresher.compression import Identity
        >>> feedback = ErrorReset(Identity(), numel=1, period=2)
        >>> [feedback.compress(torch.ones(1), Round(step)).densify().item() for step in range(4)]
        [0.0, 2.0, 0.0, 2.0]
    """

    runs_in: ClassVar[frozenset[Where]] = frozenset({"update", "simulator"})
    detached = 1.0

    reset: Compressor
    numel: int
    period: int = 1
    update: Compressor | None = None
    _: KW_ONLY
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_compressor("ErrorReset", self.reset)
        self.period = check_whole("period", self.period, least=1)
        if self.update is not None:
            check_compressor("ErrorReset", self.update)
            if not self.update.guarantee.conserves:
                raise ConfigurationError(f"{self.update.describe()} does not conserve, so it leaves no error to reset")
        self._feedback = ErrorFeedback(self.reset, self.numel, device=self.device)

    @property
    def guarantee(self) -> Guarantee:
        """It conserves."""
        return self._feedback.guarantee

    @property
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32: the buffer itself, which each step rewrites."""
        return self._feedback.residual

    def describe(self) -> str:
        """Such as ``ErrorReset(RandomBlock(0.015625), period=4)``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What ``update`` sends of ``gradient``, a finished update [numel] float32, and at a reset of the residual too.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the update; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)
        sent, rest = SparseGradient.empty(self.numel), gradient
        if self.update is not None:
            sent = self.update.compress(gradient, round)
            rest = gradient.index_add(0, sent.indices, sent.values, alpha=-1)
        if (round.step + 1) % self.period == 0:
            return _sum(sent, self._feedback.compress(rest, round))
        self._feedback.residual.add_(rest)
        return sent

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: the residual, and the states of both compressors."""
        state = {"method": self.describe(), "feedback": self._feedback.state_dict()}
        return state if self.update is None else state | {"update": self.update.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "feedback"} | ({"update"} if self.update else set()))
        update = deepcopy(self.update)  # so that nothing has changed if the other part is refused
        if update is not None:
            update.load_state_dict(state["update"])
        self._feedback.load_state_dict(state["feedback"])
        self.update = update


def _sum(one: SparseGradient, other: SparseGradient) -> SparseGradient:
    """Both messages as one; where both hold a coordinate, their sum."""
    if one.count == 0:
        return other  # as it is, with what the codec knows about it
    held = torch.zeros(one.numel, dtype=torch.bool, device=one.indices.device)
    held[one.indices] = True
    held[other.indices] = True
    indices = held.nonzero().squeeze(1)
    total = one.densify().index_add(0, other.indices, other.values)
    return SparseGradient(indices, total[indices], one.numel)
