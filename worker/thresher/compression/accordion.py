"""Accordion: much is sent while a tensor's gradient changes in size, little while it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import isfinite, prod
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
    check_flat,
    check_state,
    check_whole,
    described,
)
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.feedback import Feedback, check_tensor
from thresher.compression.layer_wise import check_numel, fitted, restored, states
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class Accordion(Feedback):
    """Error feedback that switches each tensor between two compressors; the residual is kept on a switch.

    Every ``every_epochs`` epochs, from the first on, the raw gradients (without residual) of the first ``window`` steps
    of the epoch are summed for each tensor; N is the norm of the sum. When the window is full, the tensor is in a
    critical regime if |N_before - N| / N_before ≥ ``threshold``, where N_before is from the check before: ``high``
    applies from this very step until the next check, otherwise ``low``. Before the first check, at the first one, and
    where N_before is 0, a tensor is critical. Steps and epochs follow :attr:`Round.step`.

    The second rule: when the learning rate falls, all tensors are critical until the next check. It is seen in
    :attr:`Round.rate`, which the hook for DistributedDataParallel does not know: there this rule never applies. A
    schedule that lowers the rate in each step keeps all tensors critical.

    In the official code rank 0 decides and tells the others, as their collective needs messages of one size. Here each
    worker decides from its own gradients: supports are its own anyhow, and law 1 does not depend on who sends more.

    Args:
        low: the compressor for calm regimes, which sends little. It must declare that it conserves.
        high: the compressor for critical regimes, which sends more. It must declare that it conserves.
        shapes: of the trained tensors, in the order in which they make up the flat vector.
        steps_per_epoch: rounds of an epoch, ≥ 1.
        every_epochs: epochs from one check to the next, ≥ 1; 10 in the paper, 5 for its language model.
        window: steps whose gradients are summed, 1 … steps_per_epoch. None: the whole epoch, as in Accordion's official
            code. 1: the first mini-batch, as in that of arXiv:2108.00951 (which asks for > instead of ≥).
        threshold: relative change of the norm that is critical, ≥ 0.
        device: where the buffers live and where gradients must be.

    Raises:
        ConfigurationError: a setting is out of its range, or a compressor does not conserve.

    References:
        Agarwal et al., "Accordion: Adaptive gradient communication via critical learning regime identification",
        arXiv:2010.16248, and its official code.

    Examples:
        >>> from thresher.compression import TopK
        >>> feedback = Accordion(TopK(0.25), TopK(0.5), [(4,)], steps_per_epoch=1, every_epochs=1)
        >>> [feedback.compress(torch.full((4,), size), Round(step)).count for step, size in enumerate([1.0, 1.2, 0.5])]
        [2, 1, 2]
    """

    low: Compressor
    high: Compressor
    shapes: Sequence[Sequence[int]]
    steps_per_epoch: int
    every_epochs: int = 10
    window: int | None = None
    threshold: float = 0.5
    _: KW_ONLY
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._check_settings()
        self.threshold = float(self.threshold) + 0.0
        self._choice = Choice(self.low, self.high, self.shapes)
        numel = sum(self._choice.sizes)
        self._feedback = ErrorFeedback(self._choice, numel, device=self.device)
        self._sum = torch.zeros(numel, device=self.device)
        self._norms = torch.zeros(len(self.shapes), dtype=torch.float64)  # N_before; 0 at first, which is critical
        self._rate = 0.0

    def _check_settings(self) -> None:
        for name in ("steps_per_epoch", "every_epochs"):
            setattr(self, name, check_whole(name, getattr(self, name), least=1))
        if self.window is not None:
            self.window = check_whole("window", self.window, least=1, most=self.steps_per_epoch)
        if not (isfinite(self.threshold) and self.threshold >= 0.0):
            raise ConfigurationError(f"threshold must be a finite number >= 0, not {self.threshold}")

    @property
    def critical(self) -> Tensor:
        """Which tensors are in a critical regime, [tensors] bool: the buffer itself."""
        return self._choice.critical

    @property
    def guarantee(self) -> Guarantee:
        """It conserves, whatever it switches between."""
        return self._feedback.guarantee

    @property
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32: the buffer itself, which each step rewrites."""
        return self._feedback.residual

    def describe(self) -> str:
        """Such as ``Accordion(TopK(0.01), TopK(0.1), 391)``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of ``gradient`` + residual, tensor by tensor; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient; names the first index and how many.
        """
        self._check_fits(gradient)
        check_finite(gradient)
        self._observe(gradient, round.step % (self.steps_per_epoch * self.every_epochs))
        if round.rate < self._rate:
            self.critical.fill_(True)  # noqa: FBT003 - the value to fill with
        self._rate = round.rate
        return self._feedback.compress_finite(gradient, round)

    def _observe(self, gradient: Tensor, position: int) -> None:
        """Take in the raw gradient of the step at ``position`` since a check began; decide when the window is full."""
        window = self.window or self.steps_per_epoch
        if position >= window:
            return
        if position == 0:
            self._sum.zero_()
        self._sum.add_(gradient)
        if position == window - 1:
            norms = [float(piece.norm()) for piece in torch.split(self._sum.double(), self._choice.sizes)]
            now = torch.tensor(norms, dtype=torch.float64)
            # Not "at least" but "not below": the same for numbers, and critical where N_before is 0.
            self.critical.copy_(((self._norms - now).abs() / self._norms).lt(self.threshold).logical_not_())
            self._norms = now

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: residual, regimes, norms, the sum, and the states of all compressors."""
        return {
            "method": self.describe(),
            "sum": self._sum.clone(),
            "norms": self._norms.clone(),
            "rate": self._rate,
            "feedback": self._feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another layout (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "sum", "norms", "rate", "feedback"})
        total = check_tensor("sum", state["sum"], self._sum)
        norms = check_tensor("norms", state["norms"], self._norms)
        self._feedback.load_state_dict(state["feedback"])
        self._sum.copy_(total)
        self._norms.copy_(norms)
        self._rate = float(state["rate"])


@final
class Choice(Compressor):
    """For each tensor one of two compressors, with state of its own; ``critical`` says which.

    Args:
        low: where a tensor is not critical.
        high: where it is; all of them at first.
        shapes: of the tensors, in the order in which they make up the vector.

    Raises:
        ConfigurationError: one of the two is no compressor, or is bound to the tensors of a model.

    References:
        Baseline: a selection between two compressors.
    """

    __slots__ = ("_highs", "_lows", "critical", "high", "low", "sizes")

    def __init__(self, low: Compressor, high: Compressor, shapes: Sequence[Sequence[int]]) -> None:
        check_compressor("Accordion", low)
        check_compressor("Accordion", high)
        self.low, self.high = low, high
        self.sizes = [prod(shape) for shape in shapes]
        self.critical = torch.ones(len(shapes), dtype=torch.bool)
        self._lows = tuple(fitted("Accordion", low, [shape]) for shape in shapes)
        self._highs = tuple(fitted("Accordion", high, [shape]) for shape in shapes)

    @property
    def guarantee(self) -> Guarantee:
        """It conserves if both do."""
        return Guarantee(conserves=self.low.guarantee.conserves and self.high.guarantee.conserves)

    def describe(self) -> str:
        """Such as ``Choice(TopK(0.01), TopK(0.1))``."""
        return f"Choice({self.low.describe()}, {self.high.describe()})"

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of each tensor in ``gradient``, [numel] float32, put together.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector of these sizes.
        """
        check_flat(gradient)
        check_numel("Accordion", sum(self.sizes), gradient.numel())
        chosen = [
            high if critical else low
            for low, high, critical in zip(self._lows, self._highs, self.critical.tolist(), strict=True)
        ]
        return SparseGradient.concatenate(
            [
                compressor.compress(tensor, replace(round, tensor=number))
                for number, (compressor, tensor) in enumerate(
                    zip(chosen, torch.split(gradient, self.sizes), strict=True)
                )
                if tensor.numel()
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: the choice, and the states of all compressors."""
        return {
            "method": self.describe(),
            "critical": self.critical.clone(),
            "lows": states(self._lows),
            "highs": states(self._highs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another number of tensors (both are named), or is
                not such a state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "critical", "lows", "highs"})
        critical = check_tensor("choice", state["critical"], self.critical)
        lows = restored("compressors", self._lows, state["lows"])
        self._highs = restored("compressors", self._highs, state["highs"])
        self._lows = lows
        self.critical.copy_(critical)
