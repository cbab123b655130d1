"""A budget for the whole run: the threshold that spends a wanted mean density, changed as seldom as that allows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, final

from torch import Tensor

from thresher.compression.base import check_density
from thresher.compression.thresholds import quantile_threshold
from thresher.protos.errors import ConfigurationError

# All spans of time are fractions of the rounds behind, so that a run of 500 and one of 500,000 are steered alike.
_SEGMENT: Final = 1 / 8  # how long a threshold is held before it is judged
_HORIZON: Final = 1 / 4  # the time in which a deviation is made up for, where the run's length is unknown
_MEMORY: Final = 1 / 16  # how far back the flow is averaged
_SURPRISE: Final = 0.02  # of the budget so far: a deviation from the forecast that ends a segment early
_CALM: Final = 0.1  # of what the horizon may spend: a forecast that near is left alone
_LEAST: Final = 0.2  # of the wanted density: what an overdrawn run still sends, so that training goes on
_STEP: Final = 2.0  # most that the threshold falls at once: a forecast is not to be trusted further away
_SAMPLE: Final = 1 << 20  # magnitudes looked at in a larger model
_BISECTIONS: Final = 24  # halvings of the range of log λ; leaves an error below any float32's


@final
@dataclass(frozen=True, slots=True)
class _Books:
    """What has been seen and planned. Densities are summed over rounds, so 1.0 is one dense vector's worth."""

    rounds: int = 0  # observed
    settled: float = 0.0  # sent in all rounds but the last, mean over the workers
    last: float = 0.0  # sent in the last round, by rank 0
    threshold: float = 0.0  # λ for the next round, and of the present segment; 0 before the first choice
    since: int = 0  # rounds when the present segment began
    until: int = 0  # rounds when it ends at the latest
    spent_before: float = 0.0  # sent before it
    release: float = 0.0  # expected once in it, because λ fell; negative: held back once, because it rose
    flow: float = 0.0  # expected per round of it
    streamed: float = 0.0  # Σ sent in earlier segments, without releases, as λ would have had it; discounted by age
    weight: float = 0.0  # Σ rounds of earlier segments, likewise

    @property
    def spent(self) -> float:
        """Sent in all rounds."""
        return self.settled + self.last

    @property
    def elapsed(self) -> int:
        """Rounds of the present segment."""
        return self.rounds - self.since

    @property
    def released(self) -> float:
        """The part of the release that is over: what is set free goes at once, what is held back stops the flow."""
        return max(self.release, -self.flow * self.elapsed)

    @property
    def streaming(self) -> float:
        """Sent in the present segment, without the release."""
        return max(0.0, self.spent - self.spent_before - self.released)


@final
@dataclass(frozen=True, slots=True)
class _Forecast:
    """How much will be sent over ``horizon`` rounds at any threshold x, the present one being λ.

    Two things: the flow, and what a change sets free or holds back once. A coordinate whose gradient stays at c is sent
    every λ/|c| rounds, so the flow falls as 1/λ. All residuals are below λ; those in [x, λ) go at once when λ falls to
    x. When it rises to x they pile up before they flow again: about as many as lie in as wide a shell below λ.

    Args:
        threshold: λ.
        rate: the present flow, density per round.
        held: what an earlier rise still holds back, >= 0.
        horizon: rounds.
        magnitudes: of gradient + residual, [numel] float32, or a sample.
    """

    threshold: float
    rate: float
    held: float
    horizon: float
    magnitudes: Tensor

    def flow(self, threshold: float) -> float:
        """Sent per round while the threshold stays."""
        return self.rate * (self.threshold / threshold)

    def release(self, threshold: float) -> float:
        """Sent once; negative: held back once."""
        falls = threshold < self.threshold
        bound = threshold if falls else self.threshold * (self.threshold / threshold)
        shell = int(((self.magnitudes >= bound) & (self.magnitudes < self.threshold)).count_nonzero())
        density = shell / max(1, self.magnitudes.numel())
        return density if falls else -density - self.held

    def volume(self, threshold: float) -> float:
        """Sent over the horizon."""
        return self.horizon * self.flow(threshold) + self.release(threshold)

    def threshold_for(self, volume: float, lowest: float, highest: float) -> float:
        """The present threshold if it sends about ``volume``, else the least in the range that sends at most that."""
        if self.threshold >= lowest and abs(self.volume(self.threshold) - volume) <= _CALM * volume:
            return self.threshold
        if self.volume(lowest) <= volume:
            return lowest
        for _ in range(_BISECTIONS):
            middle = math.sqrt(lowest) * math.sqrt(highest)
            lowest, highest = (middle, highest) if self.volume(middle) > volume else (lowest, middle)
        return highest


@final
class Budget:
    """Steers the threshold so that the whole run sends a wanted mean density, and changes it as seldom as it can.

    For one volume a constant threshold leaves the least total error, so λ is held over segments that grow with the
    run (an eighth of the rounds behind). At the end of a segment the next λ is the one at which the coming rounds are
    forecast to make up for what was spent too much or too little; if the forecast for the present λ is near enough, it
    stays. A burst, or a drought, that departs from the forecast ends the segment at once. λ starts at the quantile of
    the first gradient and follows residuals as they build up, in ever longer segments.

    With the run's length unknown, the mean density is held near the wanted one at every time, within a few percent
    after some hundred rounds. With ``steps`` it is met at the end, and deviations on the way are spread over all the
    rounds that remain.

    It has no power over gradients: zeros are never sent, so a run whose gradients vanish sends less than it might,
    and a burst has been sent before it is seen. A run that has overdrawn its budget goes on with a fifth of the
    density.

    A state machine without a clock: equal observations give equal thresholds. It looks at a whole vector only when it
    chooses a threshold, and at about a million coordinates of a larger one, evenly spaced.

    Args:
        density: wanted mean kept fraction, in (0, 1].
        steps: rounds of the whole run, at least 1; None: unknown.

    Raises:
        ConfigurationError: an argument is out of its range.

    References:
        Sahu et al., arXiv:2108.00951: Lemma 3 says why λ should be constant, and appendix D leaves open how to find the
        one for a given volume; this is an answer to that.

    Examples:
        >>> import torch
        >>> budget = Budget(density=0.5)
        >>> gradient = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> threshold = budget.observe(lambda: gradient, sent=0.5)
        >>> threshold == budget.threshold
        True
    """

    def __init__(self, density: float, steps: int | None = None) -> None:
        check_density(density)
        if steps is not None and steps < 1:
            raise ConfigurationError(f"a run has at least one step, not {steps}")
        self._density = float(density)
        self._steps = steps
        self._books = _Books()

    @property
    def density(self) -> float:
        """The wanted mean density of the whole run."""
        return self._density

    @property
    def threshold(self) -> float | None:
        """λ for the next round, in the unit of the gradient; None before the first gradient that is not zero."""
        return self._books.threshold or None

    def allow(self, density: float) -> None:
        """Change the wanted mean density of the whole run, rounds behind included; the next choice of λ heeds it.

        A budget in bytes is kept in this way: whenever an element turns out to cost more or less than assumed, allow
        what the bytes of the whole run buy at the mean price so far.

        Raises:
            ConfigurationError: the density is outside (0, 1]. Nothing is changed.
        """
        check_density(density)
        self._density = float(density)

    def observe(self, corrected: Callable[[], Tensor], sent: float, settled: float | None = None) -> float | None:
        """Take in one round, after it has been compressed; returns the threshold for the next one.

        Args:
            corrected: makes gradient + residual of this round as rank 0 had them just before it compressed, in the
                unit of the gradient, [numel] float32. Called only when λ is chosen anew.
            sent: density of rank 0's push in this round.
            settled: mean density over all workers of the round before, which is what counts; None where it is not
                known: then rank 0's own does.

        Raises:
            ConfigurationError: ``corrected`` makes something else than a flat float32 vector.
            NonFiniteGradientError: NaN or infinity in what is looked at of it. Nothing is changed.
        """
        books = self._books
        seen = books.settled + (books.last if settled is None else settled)
        books = replace(books, rounds=books.rounds + 1, settled=seen, last=sent)
        if books.rounds >= books.until or self._is_surprised(books):
            magnitudes = _sample(corrected()).abs()
            if books.threshold or magnitudes.any():
                books = self._chosen(books, magnitudes)
        self._books = books
        return self.threshold

    def _left(self, rounds: int) -> int | None:
        """Rounds to come; None where nobody knows, as beyond the end that was announced."""
        return None if self._steps is None or self._steps <= rounds else self._steps - rounds

    def _span(self, rounds: int) -> int:
        """What segments and tolerances are fractions of: the rounds behind, or those to come where they are fewer."""
        left = self._left(rounds)
        return rounds if left is None else min(rounds, left)

    def _is_surprised(self, books: _Books) -> bool:
        surprise = books.streaming - books.flow * books.elapsed
        return abs(surprise) > _SURPRISE * self._density * self._span(books.rounds)

    def _chosen(self, books: _Books, magnitudes: Tensor) -> _Books:
        """Close the present segment and begin the next, with the threshold that is right for it."""
        quantile = quantile_threshold(magnitudes, self._density)
        present = books.threshold or quantile  # each worker begins at the quantile of its own first gradient
        kept = math.exp(-books.elapsed / (_MEMORY * books.rounds))
        streamed = kept * books.streamed + books.streaming
        weight = kept * books.weight + books.elapsed
        left = self._left(books.rounds)
        horizon = max(1.0, _HORIZON * books.rounds) if left is None else float(left)
        held = max(0.0, books.released - books.release)
        forecast = _Forecast(present, streamed / weight, held, horizon, magnitudes)
        allowance = self._allowance(books, horizon)
        # What a threshold sends of this very round is seen, not forecast: one more like it must not cost it all.
        lowest = max(present / _STEP, quantile_threshold(magnitudes, min(1.0, allowance)))
        threshold = forecast.threshold_for(allowance, lowest, max(lowest, present * _STEP, quantile))
        flow = forecast.flow(threshold)
        return replace(
            books,
            threshold=threshold,
            since=books.rounds,
            until=books.rounds + max(1, int(_SEGMENT * self._span(books.rounds))),
            spent_before=books.spent,
            release=forecast.release(threshold),
            flow=flow,
            streamed=flow * weight,
            weight=weight,
        )

    def _allowance(self, books: _Books, horizon: float) -> float:
        """What the next ``horizon`` rounds may send, so that the mean over all rounds until then is as wanted."""
        wanted = self._density * (books.rounds + horizon) - books.spent
        return max(wanted, _LEAST * self._density * horizon)

    def state_dict(self) -> dict[str, Any]:
        """The settings and what has been seen and planned, plain values only."""
        return {"density": self._density, "steps": self._steps, **asdict(self._books)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, and go on as the one it was taken from.

        The density in the state is taken over too, since :meth:`allow` may have changed it.

        Raises:
            ConfigurationError: the state belongs to a run of another length, or is not such a state; nothing is
                changed.
        """
        if set(state) != set(self.state_dict()):
            raise ConfigurationError(f"not the state of a Budget: found the keys {sorted(state)}")
        if state["steps"] != self._steps:
            raise ConfigurationError(
                f"the state belongs to a budget over {state['steps']} steps, this one is over {self._steps}"
            )
        check_density(state["density"])
        self._books = _Books(**{name: value for name, value in state.items() if name not in {"density", "steps"}})
        self._density = state["density"]


def _sample(vector: Tensor) -> Tensor:
    """Every n-th coordinate of a large ``vector``, so that choosing a threshold costs the same for any model."""
    return vector[:: -(-vector.numel() // _SAMPLE) or 1]
