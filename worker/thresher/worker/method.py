"""What is sent of each gradient, as plain settings: one value, checked once, equal on all workers of a run."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from thresher.compression import Feedback, paper_threshold, parse_feedback, precision_threshold, takes_run_threshold
from thresher.compression.base import check_density
from thresher.protos.errors import ConfigurationError, LayoutError
from thresher.protos.layout import Layout
from thresher.protos.optimizers import Hyperparameters
from thresher.worker.outer import check_outer

Placing = Literal["gradient", "update"]
Rule = Literal["budget", "calibrated", "paper"]
NonFinite = Literal["refuse", "skip"]

_ONE_TENSOR: Final = ((1,),)


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A compressor with its feedback, where its threshold comes from, and where the optimizer runs.

    Attributes:
        compressor: A description, as `thresher.compression.parse_feedback` reads it: ``HardThreshold`` takes the run's
            λ, which exactly one of the next four gives; anything else needs none of them.
        threshold: λ itself, in the unit of the gradient.
        density: Wanted mean density of the run, in (0, 1]; ``rule`` says how λ follows from it.
        budget: Wanted bytes of the whole run, of all workers and in both directions; needs ``steps``.
        precision: ε; λ = √(ε/numel) / γ, with the learning rate γ at the beginning (arXiv:2108.00951, appendix C.3).
        rule: ``budget`` (λ is steered so that the run's mean density comes out), ``calibrated`` (found on the first
            steps, then constant), or ``paper`` (λ = 1/(2√k), k = density · numel; arXiv:2108.00951, appendix D).
        steps: Rounds of the whole run, where that is known.
        placement: ``gradient`` (the shards run the optimizer) or ``update`` (the worker does, and sends what moved).
        period: Local steps per round; more than one needs ``update``.
        outer: What the shards run on the mean of what moved, such as ``SGD(lr=0.7, momentum=0.9, nesterov=True)``;
            by default they subtract it. Needs ``update``.
        nonfinite: What to do with a gradient that holds NaN or infinity: ``refuse`` the step, or ``skip`` it.

    Raises:
        ConfigurationError: for settings out of range, or that contradict each other.
    """

    compressor: str = "HardThreshold"
    threshold: float | None = None
    density: float | None = None
    budget: int | None = None
    precision: float | None = None
    rule: Rule = "budget"
    steps: int | None = None
    placement: Placing = "gradient"
    period: int = 1
    outer: str = ""
    nonfinite: NonFinite = "refuse"

    def __post_init__(self) -> None:
        """Check before anything is started."""
        _check_choice("placement", self.placement, get_args(Placing))
        _check_choice("rule", self.rule, get_args(Rule))
        _check_choice("nonfinite", self.nonfinite, get_args(NonFinite))
        for name in ("threshold", "density", "precision"):
            # One spelling per number, so that equal methods describe themselves equally: 1 is 1.0, and -0.0 is 0.0.
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value) + 0.0)
        self._check_numbers()
        with contextlib.suppress(LayoutError):  # it speaks of the model's own names, which only workers know
            self._check_place(parse_feedback(self.compressor, _ONE_TENSOR))
        self._check_source()

    def _check_numbers(self) -> None:
        if self.density is not None:
            check_density(self.density)
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ConfigurationError(f"threshold must be a finite number >= 0, not {self.threshold}")
        if self.precision is not None and not (math.isfinite(self.precision) and self.precision > 0):
            raise ConfigurationError(f"precision must be a finite number > 0, not {self.precision}")
        for name in ("budget", "steps", "period"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}")
        if self.outer:
            check_outer(self.outer)

    def _check_source(self) -> None:
        sources = [n for n in ("threshold", "density", "budget", "precision") if getattr(self, n) is not None]
        if not takes_run_threshold(self.compressor):
            if sources:
                raise ConfigurationError(
                    f"{self.compressor} does not take the run's threshold, so {' and '.join(sources)} would change "
                    "nothing; give it its own settings, such as TopK(0.01)"
                )
        elif len(sources) != 1:
            raise ConfigurationError(
                "a hard threshold needs exactly one of threshold, density, budget and precision, "
                f"not {' and '.join(sources) or 'none'}"
            )
        if self.rule != "budget" and self.density is None:
            raise ConfigurationError(f"the rule {self.rule!r} needs a density")
        if self.placement != "update" and (self.period > 1 or self.outer):
            raise ConfigurationError("local steps and an outer optimizer need placement 'update'")
        if self.budget is not None and self.steps is None:
            raise ConfigurationError("a budget is for the whole run: say how many steps that is")

    def _check_place(self, feedback: Feedback) -> None:
        if self.placement not in feedback.runs_in:
            where = ", ".join(sorted(feedback.runs_in))
            raise ConfigurationError(f"{feedback.describe()} is not {self.placement}-placed; it runs in: {where}")

    def describe(self) -> str:
        """Return a text that is equal for equal methods, such as ``HardThreshold, threshold 0.01, gradient-placed``."""
        parts = [self.compressor]
        parts += [
            f"{name} {value!r}"
            for name in ("threshold", "density", "budget", "precision", "steps")
            if (value := getattr(self, name)) is not None
        ]
        parts += [f"{self.rule} rule"] if self.rule != "budget" else []
        parts += [f"{self.placement}-placed"]
        parts += [f"{self.period} local steps"] if self.period > 1 else []
        parts += [f"outer {self.outer}"] if self.outer else []
        parts += ["non-finite gradients skipped"] if self.nonfinite == "skip" else []
        return ", ".join(parts)

    def feedback_for(self, layout: Layout) -> Feedback:
        """Return the feedback of one worker, with an empty memory.

        Raises:
            ConfigurationError: when it does not run with this placement.
            LayoutError: when it speaks of tensors that the model does not have.
        """
        trained = layout.trained
        feedback = parse_feedback(self.compressor, [spec.shape for spec in trained], [spec.name for spec in trained])
        self._check_place(feedback)
        return feedback

    def fixed_threshold(self, layout: Layout, groups: Sequence[Hyperparameters]) -> float | None:
        """Return λ where it is known from the start; None when it is found on the way, or there is none."""
        if self.precision is not None:
            rate = groups[0].get("lr")
            found: float = precision_threshold(self.precision, layout.numel, rate if isinstance(rate, float) else 0.0)
            return found
        if self.density is not None and self.rule == "paper":
            return paper_threshold(self.density * layout.numel)
        return self.threshold


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
