"""SIDCo: a threshold for a wanted density, from a distribution fitted to the gradient."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Guarantee,
    Round,
    Sparsifier,
    check_density,
    check_finite,
    check_flat,
    check_state,
)
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient

# The settings of the official code of arXiv:2101.10761.
_FIRST_DENSITY: Final = 0.25  # what the first of several stages aims at
_WINDOW: Final = 5  # rounds between two looks at the number of stages
_TOLERANCE: Final = 0.2  # how far the mean density of a window may be off


@final
@dataclass(slots=True)
class SIDCo(Sparsifier):
    """Keeps about density · numel coordinates, those above a threshold that costs a few passes and no sort.

    The magnitudes are taken for draws from a distribution that is fitted in stages, each to the excesses over the last
    threshold: the first stage aims at 1/4, the others share the rest of the way evenly. At least the largest coordinate
    is sent, and of a zero vector nothing.

    After every five rounds the number of stages changes by one, unless the mean density was within 20 % of the wanted
    one. The first step is the paper's: one less where too much was sent, one more where too little. That is the way for
    light tails; with heavy ones, where each stage more sends less, it would end at one stage and send many times too
    much. So further steps go on in the direction of the last one as long as that brings the density nearer, and turn
    round where it doesn't, or where there is no step to take.

    The number of stages is state, and belongs to one vector; in
    :class:`~thresher.compression.layer_wise.LayerWise` to each tensor.

    Args:
        density: wanted kept fraction, in (0, 1].
        fit: what is fitted: ``"exponential"`` or ``"pareto"`` (generalised) in every stage, or ``"gamma"`` in the
            first and a generalised Pareto in the others.

    Raises:
        ConfigurationError: the density is outside (0, 1], or there is no such fit.

    References:
        Abdelmoniem et al., "An efficient statistical-based gradient compression technique for distributed training
        systems", arXiv:2101.10761, and its official code, of which it has the settings; the quantile of the gamma
        distribution is computed, not approximated.

    Examples:
        >>> sent = SIDCo(0.25).compress(torch.linspace(-1.0, 1.0, 1000) ** 5)
        >>> 200 < sent.count < 300
        True
    """

    density: float
    fit: str = "exponential"
    _stages: int = field(default=1, init=False, repr=False)
    _rounds: int = field(default=0, init=False, repr=False)  # since the last look
    _measured: float = field(default=0.0, init=False, repr=False)  # Σ density of these
    _direction: int = field(default=0, init=False, repr=False)  # of the last step, 0 after none
    _off: float = field(default=math.inf, init=False, repr=False)  # |mean / wanted - 1| before that step

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.fit not in _FITS:
            raise ConfigurationError(f"there is no fit {self.fit!r}; there are {', '.join(map(repr, _FITS))}")
        self.density = float(self.density)  # describe() must not depend on who computed it

    @property
    def guarantee(self) -> Guarantee:
        """Relative: the largest coordinate is sent, so δ ≥ 1 / numel; where the fit is good, far more (baseline)."""
        return Guarantee(conserves=True, delta=lambda numel: 1 / numel if numel else 1.0)

    @property
    def stages(self) -> int:
        """How many fits the next threshold takes, ≥ 1."""
        return self._stages

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The coordinates of ``gradient``, [numel] float32, that reach the fitted threshold, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector.
            NonFiniteGradientError: it holds NaN or infinity, to which nothing can be fitted; the state is as before.
        """
        check_flat(gradient)
        check_finite(gradient)
        magnitude = gradient.abs()
        largest = float(magnitude.max()) if magnitude.numel() else 0.0
        if largest == 0.0:
            return SparseGradient(magnitude.nonzero().squeeze(1), gradient[:0].clone(), gradient.numel())
        # The fits know no unit; with the largest for one, neither squares nor logarithms leave the range of float32.
        relative = magnitude.div_(largest)
        indices = relative.ge(min(1.0, self._threshold(relative))).nonzero().squeeze(1)
        self._adapt(indices.numel() / gradient.numel())
        return SparseGradient(indices, gradient[indices], gradient.numel())

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: the number of stages, and what is known of where it should go."""
        return {
            "method": self.describe(),
            "stages": self._stages,
            "rounds": self._rounds,
            "measured": self._measured,
            "direction": self._direction,
            "off": self._off,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method (both are named), or is not such a state; nothing
                is changed.
        """
        check_state(self.describe(), state, {"method", "stages", "rounds", "measured", "direction", "off"})
        stages, rounds, direction = state["stages"], state["rounds"], state["direction"]
        measured, off = state["measured"], state["off"]
        valid = {
            "stages": isinstance(stages, int) and 1 <= stages <= self._most_stages(),
            "rounds": isinstance(rounds, int) and 0 <= rounds < _WINDOW,
            "measured": isinstance(measured, float) and 0.0 <= measured <= _WINDOW,
            "direction": isinstance(direction, int) and -1 <= direction <= 1,
            "off": isinstance(off, float) and off >= 0.0,
        }
        for name, is_valid in valid.items():
            if not is_valid:
                raise ConfigurationError(f"not a state of {self.describe()}: {name} is {state[name]!r}")
        self._stages, self._rounds, self._measured = stages, rounds, measured
        self._direction, self._off = direction, off

    def _threshold(self, relative: Tensor) -> float:
        """The threshold for magnitudes ``relative``, [numel] float32, of which the largest is 1."""
        first, later = _FITS[self.fit]
        if self._stages == 1:
            return first(relative, self.density)
        threshold = first(relative, _FIRST_DENSITY)
        each = (self.density / _FIRST_DENSITY) ** (1 / (self._stages - 1))
        for _ in range(self._stages - 1):
            relative = relative[relative >= threshold]
            if relative.numel() == 0:
                break
            least = float(relative.min())
            threshold = least + later(relative - least, each)
        return threshold

    def _adapt(self, density: float) -> None:
        """After every few rounds, take the step in the number of stages that should bring the density nearer."""
        self._rounds += 1
        self._measured += density
        if self._rounds < _WINDOW:
            return
        factor = self._measured / (self._rounds * self.density)
        self._rounds, self._measured = 0, 0.0
        off = abs(factor - 1)
        if off <= _TOLERANCE:
            self._direction, self._off = 0, math.inf
            return
        if self._direction == 0:
            self._direction = 1 if factor < 1 else -1
        elif off > self._off:
            self._direction = -self._direction
        if not 1 <= self._stages + self._direction <= self._most_stages():
            self._direction = -self._direction
        self._off = off
        self._stages = max(1, min(self._stages + self._direction, self._most_stages()))

    def _most_stages(self) -> int:
        """⌈log₂(1 / density)⌉; where the first stage alone would aim below the wanted density, it is the only one."""
        return math.ceil(-math.log2(self.density)) if self.density < _FIRST_DENSITY else 1


def _exponential_quantile(draws: Tensor, tail: float) -> float:
    """What an exponential distribution fitted to ``draws``, [n] float32 ≥ 0, exceeds with probability ``tail``."""
    return -float(draws.mean()) * math.log(tail)


def _pareto_quantile(draws: Tensor, tail: float) -> float:
    """The same for a generalised Pareto distribution, fitted by mean and variance.

    With r = mean²/variance its shape, with the sign of arXiv:2101.10761, is k = (r - 1)/2 and its scale
    (r + 1)/2 · mean; the quantile is scale · (1 - tailᵏ)/k.
    """
    mean, variance = float(draws.mean()), float(draws.var(correction=0))
    if variance == 0.0:
        return mean
    ratio = mean * mean / variance
    shape, scale = (ratio - 1) / 2, (ratio + 1) / 2 * mean
    if abs(shape) < 1e-9:  # the exponential distribution is the limit
        return -scale * math.log(tail)
    return -scale * math.expm1(shape * math.log(tail)) / shape


def _gamma_quantile(draws: Tensor, tail: float) -> float:
    """The same for a gamma distribution, whose shape follows from log of mean less mean of log in closed form."""
    mean = float(draws.mean())
    # Zeros have no logarithm; the official code moves all numbers by the same hair.
    spread = math.log(mean) - float(draws.add(torch.finfo(torch.float64).eps).log_().mean())
    if spread < 1e-6:  # float32 tells such draws from equal ones no longer
        return mean
    shape = (3 - spread + math.sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread)
    return mean / shape * _standard_gamma_quantile(shape, tail)


def _standard_gamma_quantile(shape: float, tail: float) -> float:
    """The y with Q(shape, y) = ``tail``, for the regularised upper incomplete gamma function Q; by bisection."""
    alpha = torch.tensor(shape, dtype=torch.float64)

    def exceeds(y: float) -> bool:
        return float(torch.special.gammaincc(alpha, torch.tensor(y, dtype=torch.float64))) > tail

    low, high = 0.0, max(1.0, shape)
    while exceeds(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeds(middle) else (low, middle)
    return high


_FITS: Final[Mapping[str, tuple[Callable[[Tensor, float], float], Callable[[Tensor, float], float]]]] = {
    "exponential": (_exponential_quantile, _exponential_quantile),
    "gamma": (_gamma_quantile, _pareto_quantile),
    "pareto": (_pareto_quantile, _pareto_quantile),
}
