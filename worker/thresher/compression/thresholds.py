"""Where a threshold comes from: a rule, a precision, a quantile, or a calibration on the first steps."""

import math
from collections.abc import Mapping
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from thresher.compression.base import check_density, check_finite, check_flat, kept
from thresher.protos.errors import ConfigurationError

# Below this, processors may treat a float32 as zero, and every coordinate reaches a threshold of zero.
_SMALLEST_THRESHOLD: Final = torch.finfo(torch.float32).tiny


def paper_threshold(k: float) -> float:
    """The paper's rule λ = 1 / (2 √k), for k wanted elements per step in the whole model.

    Not free of scale: it presumes gradient noise with σ² = 1/16. Calibrate where gradients are of another size.

    Args:
        k: wanted number of elements, > 0.

    Raises:
        ConfigurationError: k is not a finite number above 0.

    References:
        Sahu et al., arXiv:2108.00951, appendix D.

    Examples:
        >>> paper_threshold(2500)
        0.01
    """
    if not (math.isfinite(k) and k > 0):
        raise ConfigurationError(f"k must be a finite number above 0, not {k}")
    return 1.0 / (2.0 * math.sqrt(k))


def precision_threshold(precision: float, numel: int, learning_rate: float) -> float:
    """The threshold λ = (1/γ) √(ε/d) for a target precision ε: the residual stays below it.

    With error feedback no coordinate of the residual reaches λ, so in units of the parameters ‖γe‖² < γ²dλ² = ε at
    every step, and ‖x - x*‖² is taken to end near ε too. Presumes a constant step size.

    Args:
        precision: ε, the squared distance to the optimum that is good enough, > 0.
        numel: d, the number of parameters, > 0.
        learning_rate: γ, > 0.

    Returns:
        λ in the unit of the gradient.

    Raises:
        ConfigurationError: an argument, or the threshold itself, is not a finite number above 0.

    References:
        Sahu et al., arXiv:2108.00951, appendix C.3 and Remark 5.

    Examples:
        >>> precision_threshold(precision=1e-4, numel=100, learning_rate=0.1)
        0.01
    """
    for name, value in (("precision", precision), ("numel", numel), ("learning rate", learning_rate)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"{name} must be a finite number above 0, not {value}")
    threshold = math.sqrt(precision / numel) / learning_rate
    if not (math.isfinite(threshold) and threshold > 0):
        raise ConfigurationError(
            f"precision {precision} over {numel} parameters at learning rate {learning_rate} gives no usable "
            f"threshold, {threshold}: choose another precision"
        )
    return threshold


def quantile_threshold(vector: Tensor, density: float) -> float:
    """The smallest threshold that at most k = max(1, ⌊density · numel⌋) coordinates of ``vector`` reach.

    Exactly k reach it if the k-th magnitude is larger than the next. Fewer do on a tie between these two, since all
    coordinates of that magnitude pass or none; and where fewer than k differ from zero. It is never 0, which all would
    reach: at least the smallest normal float32, 1.2e-38.

    Args:
        vector: [numel] float32, finite.
        density: wanted kept fraction, in (0, 1].

    Returns:
        A threshold > 0, exact in float32, in the unit of ``vector``.

    Raises:
        ConfigurationError: the density is outside (0, 1], or ``vector`` is not a flat float32 vector.
        NonFiniteGradientError: NaN or infinity in ``vector``.

    References:
        arXiv:2108.00951, Lemma 3: any λ with |x_(k+1)| < λ ≤ |x_(k)| keeps the k best.

    Examples:
        >>> vector = torch.tensor([4.0, -3.0, 2.0, 1.0])
        >>> threshold = quantile_threshold(vector, density=0.5)
        >>> (vector.abs() >= threshold).tolist()
        [True, True, False, False]
    """
    check_density(density)
    check_flat(vector)
    check_finite(vector)
    below = vector.numel() - kept(density, vector.numel())  # how many must stay below the threshold
    if below == 0:
        return _SMALLEST_THRESHOLD
    largest_below = vector.abs().kthvalue(below).values.item()
    return max(_SMALLEST_THRESHOLD, float(np.nextafter(np.float32(largest_below), np.float32(np.inf))))


@final
class Calibration:
    """Finds a constant threshold for a wanted density on the first steps of a run, then holds it.

    In each of the first ``steps`` rounds it takes the :func:`quantile_threshold` of gradient + residual, as one worker
    (rank 0) has them just before it compresses, and proposes that for the next round. The proposals rise while
    residuals build up, and follow the gradients as they change size; the last one is final. For the very first round
    there is no proposal yet: each worker uses the quantile of its own first gradient.

    What it promises: in each calibrated round that worker would have sent at most the wanted density at the proposed
    threshold. What it does not: the mean density of the run. Afterwards the density goes where the gradients go, as
    the threshold is constant, and a calibration shorter than the growth of the early gradients ends too low: the mean
    density can end up several times above or below the wanted one.

    A state machine without a clock: equal observations give equal thresholds.

    Args:
        density: wanted kept fraction, in (0, 1].
        steps: number of rounds to calibrate on, at least 1.

    Raises:
        ConfigurationError: an argument is out of its range.

    References:
        Sahu et al., arXiv:2108.00951, appendix D, leaves the threshold to a rule that presumes the size of the
        gradients (:func:`paper_threshold`); this is the baseline that measures it.

    Examples:
        >>> calibration = Calibration(density=0.5, steps=1)
        >>> threshold = calibration.observe(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> 2.0 < threshold <= 3.0, calibration.finished
        (True, True)
        >>> calibration.observe(torch.tensor([400.0, 300.0, 200.0, 100.0])) == threshold
        True
    """

    def __init__(self, density: float, steps: int) -> None:
        check_density(density)
        if steps < 1:
            raise ConfigurationError(f"a calibration takes at least one step, not {steps}")
        self.density = density
        self.steps = steps
        self._observed = 0
        self._threshold: float | None = None

    @property
    def threshold(self) -> float | None:
        """The threshold for the next round, in the unit of the gradient; None before the first observation."""
        return self._threshold

    @property
    def finished(self) -> bool:
        """Whether the threshold is final. Further observations are not looked at, and need not be made."""
        return self._observed >= self.steps

    def observe(self, corrected: Tensor) -> float:
        """Take in gradient + residual of one round, [numel] float32; returns the threshold for the next round.

        Raises:
            ConfigurationError: ``corrected`` is not a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in it. Nothing is changed.
        """
        if self._threshold is None or not self.finished:
            self._threshold = quantile_threshold(corrected, self.density)
            self._observed += 1
        return self._threshold

    def state_dict(self) -> dict[str, Any]:
        """The settings and what has been found, plain values only."""
        return {
            "density": self.density,
            "steps": self.steps,
            "observed": self._observed,
            "threshold": self._threshold,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to a calibration with other settings, or is not such a state; nothing
                is changed.
        """
        if set(state) != set(self.state_dict()):
            raise ConfigurationError(f"not the state of a Calibration: found the keys {sorted(state)}")
        if (state["density"], state["steps"]) != (self.density, self.steps):
            raise ConfigurationError(
                f"the state belongs to a calibration with density {state['density']} over {state['steps']} steps, "
                f"this one has density {self.density} over {self.steps}"
            )
        self._observed, self._threshold = state["observed"], state["threshold"]
