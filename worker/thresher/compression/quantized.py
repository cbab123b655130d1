"""Sparsify, then quantise what was kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Compressor,
    Guarantee,
    Quantizer,
    Round,
    Sparsifier,
    check_finite,
    check_state,
)
from thresher.compression.hard_threshold import HardThreshold
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient

Bound = Callable[[int], float] | None


@final
@dataclass(frozen=True, slots=True)
class Quantized(Compressor):
    """Chooses coordinates with a sparsifier and rounds their values, as one vector, with a quantizer.

    A coordinate whose value rounds away is not sent; under error feedback it stays in the residual. To cut by layers,
    put this inside: ``LayerWise(Quantized(TopK(0.01), QSGD()))``.

    Args:
        sparsifier: what is kept; its values must be those of the vector, so that they are rounded once.
        quantizer: what becomes of the values kept, [k] float32, in the same round.

    Raises:
        ConfigurationError: one of the two is something else.

    References:
        Basu et al., "Qsparse-local-SGD", arXiv:1906.02367; the bound of a hard threshold with bounded
        rounding is derived from Sahu et al., arXiv:2108.00951, equation (9).

    Examples:
        >>> import torch
        >>> from thresher.compression.top_k import TopK
        >>> from thresher.compression.scaled_sign import ScaledSign
        >>> Quantized(TopK(0.5), ScaledSign()).compress(torch.tensor([3.0, 0.1, -1.0, 0.2])).densify()
        tensor([ 2.,  0., -2.,  0.])
    """

    sparsifier: Sparsifier
    quantizer: Quantizer

    def __post_init__(self) -> None:
        if not isinstance(self.sparsifier, Sparsifier):
            raise ConfigurationError(
                f"Quantized chooses with a sparsifier such as TopK(0.01), which leaves values as they are; "
                f"{_named(self.sparsifier)} is none. A layer-wise method goes around: LayerWise(Quantized(...))"
            )
        if not isinstance(self.quantizer, Quantizer):
            raise ConfigurationError(
                f"Quantized rounds with a quantizer such as QSGD(), and {_named(self.quantizer)} is none: "
                "give it as the first argument if it chooses coordinates"
            )

    @property
    def guarantee(self) -> Guarantee:
        """Derived from both; it conserves if both do, and bounds need both to have one.

        κ: dropped and rounded coordinates are different ones, so κ² = κ_S² + κ_Q². A hard threshold drops less than λ
        in each coordinate; with rounding to κ_Q = √numel · ε that is κ² = numel · max(λ, ε)² (from arXiv:2108.00951,
        equation (9)).

        δ: of ‖x‖² the sparsifier keeps a fraction of at least δ_S, and of this the quantizer a fraction of at least
        δ_Q, so δ = δ_S · δ_Q. ω: (1 + ω_S)(1 + ω_Q) - 1 (both by conditioning on what was chosen).

        The number of values that are kept varies; these bounds take it to be numel, where a quantizer's is weakest.
        """
        kept, rounded = self.sparsifier.guarantee, self.quantizer.guarantee
        join = max if isinstance(self.sparsifier, HardThreshold) else math.hypot
        return Guarantee(
            conserves=kept.conserves and rounded.conserves,
            kappa=_both(kept.kappa, rounded.kappa, join),
            delta=_both(kept.delta, rounded.delta, lambda s, q: s * q),
            omega=_both(kept.omega, rounded.omega, lambda s, q: (1 + s) * (1 + q) - 1),
        )

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The coordinates of ``gradient``, [numel] float32, that were kept, and did not round away.

        Raises:
            ConfigurationError: as by the sparsifier and the quantizer.
            NonFiniteGradientError: NaN or infinity among the values kept; names the index in ``gradient``.
        """
        kept = self.sparsifier.compress(gradient, round)
        try:
            rounded = self.quantizer.compress(kept.values, round)
        except NonFiniteGradientError:
            check_finite(gradient)  # the quantizer can only name the place among the values it was given
            raise
        if rounded.count == kept.count:
            return SparseGradient(kept.indices, rounded.values, kept.numel, rounded.levels, kept.seeds)
        return SparseGradient(kept.indices[rounded.indices], rounded.values, kept.numel, rounded.levels)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the states of both."""
        return {
            "method": self.describe(),
            "sparsifier": self.sparsifier.state_dict(),
            "quantizer": self.quantizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method (both are named), or is not such a state; nothing
                is changed.
        """
        check_state(self.describe(), state, {"method", "sparsifier", "quantizer"})
        # The quantizer first: it has no state to change, so if the sparsifier refuses its own, nothing is changed.
        self.quantizer.load_state_dict(state["quantizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])


def _both(first: Bound, second: Bound, join: Callable[[float, float], float]) -> Bound:
    if first is None or second is None:
        return None
    return lambda numel: join(first(numel), second(numel))


def _named(method: object) -> str:
    return method.describe() if isinstance(method, Compressor) else repr(method)
