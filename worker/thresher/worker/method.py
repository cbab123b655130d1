"""What is sent of each gradient, as plain settings: one value, checked once, equal on all workers of a run."""

import math
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from thresher.compression import Calibration, Compressor, HardThreshold, Identity, TopK, paper_threshold
from thresher.compression.base import check_density
from thresher.protos.errors import ConfigurationError
from thresher.protos.layout import Layout
from thresher.protos.optimizers import OptimizerSpec
from thresher.worker.placement import GradientPlaced, Placement, UpdatePlaced

CALIBRATION_STEPS: Final = 50

CompressorName = Literal["hard-threshold", "top-k", "identity"]
PlacementName = Literal["gradient", "update"]
NonFinite = Literal["refuse", "skip"]


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A compressor with error feedback, and where it is placed.

    Attributes:
        compressor: ``hard-threshold``, ``top-k`` or ``identity`` (everything is sent).
        threshold: λ of the hard threshold, in the unit of the gradient; None takes it from ``density``.
        density: Wanted fraction. With ``hard-threshold`` the threshold is calibrated on the first steps, or follows
            the paper's rule; with ``top-k`` it is the fraction of every push.
        paper_rule: Take λ = 1/(2√k) with k = density · numel (arXiv:2108.00951, appendix D).
        layer_wise: ``top-k`` for each tensor instead of the whole model.
        placement: ``gradient`` (the shards run the optimizer) or ``update`` (plain SGD at the worker).
        nonfinite: What to do with a gradient that holds NaN or infinity: ``refuse`` the step, or ``skip`` it.

    Raises:
        ConfigurationError: for settings out of range, or that contradict each other.
    """

    compressor: CompressorName = "hard-threshold"
    threshold: float | None = None
    density: float | None = None
    paper_rule: bool = False
    layer_wise: bool = False
    placement: PlacementName = "gradient"
    nonfinite: NonFinite = "refuse"

    def __post_init__(self) -> None:
        """Check before anything is started."""
        _check_choice("compressor", self.compressor, get_args(CompressorName))
        _check_choice("placement", self.placement, get_args(PlacementName))
        _check_choice("nonfinite", self.nonfinite, get_args(NonFinite))
        # One spelling per number, so that equal methods describe themselves equally: 1 is 1.0, and -0.0 is 0.0.
        if self.density is not None:
            check_density(self.density)
            object.__setattr__(self, "density", float(self.density))
        if self.threshold is not None:
            if not (math.isfinite(self.threshold) and self.threshold >= 0):
                raise ConfigurationError(f"threshold must be a finite number >= 0, not {self.threshold}")
            object.__setattr__(self, "threshold", float(self.threshold) + 0.0)
        self._check_combination()

    def _check_combination(self) -> None:
        match self.compressor:
            case "hard-threshold":
                self._check_threshold()
            case "top-k":
                if self.density is None or self.threshold is not None or self.paper_rule:
                    raise ConfigurationError("top-k needs a density, and takes no threshold")
            case "identity":
                if (self.density, self.threshold, self.paper_rule) != (None, None, False):
                    raise ConfigurationError("identity sends everything: it takes no density and no threshold")
        if self.layer_wise and self.compressor != "top-k":
            raise ConfigurationError("layer-wise makes a difference for top-k only")

    def _check_threshold(self) -> None:
        if self.paper_rule and (self.density is None or self.threshold is not None):
            raise ConfigurationError("the rule 1/(2√k) needs a density, from which k follows, and no threshold")
        if (self.threshold is None) == (self.density is None):
            raise ConfigurationError("a hard threshold needs either a threshold or a density")

    def describe(self) -> str:
        """Return a text that is equal for equal methods, such as ``hard-threshold 0.01, gradient-placed``."""
        match self.compressor, self.threshold, self.density:
            case _, float() as threshold, _:
                what = f"{self.compressor} {threshold!r}"
            case _, _, float() as density:
                how = " by 1/(2√k)" if self.paper_rule else " layer-wise" if self.layer_wise else ""
                what = f"{self.compressor} at density {density!r}{how}"
            case _:
                what = self.compressor
        skipping = ", non-finite gradients skipped" if self.nonfinite == "skip" else ""
        return f"{what}, {self.placement}-placed{skipping}"

    def compressor_for(self, layout: Layout) -> Compressor:
        """Return the compressor of the first step."""
        match self.compressor:
            case "identity":
                return Identity()
            case "top-k":
                sizes = [spec.numel for spec in layout.trained] if self.layer_wise else None
                return TopK(self._required_density(), sizes)
            case "hard-threshold":
                return HardThreshold(self.fixed_threshold(layout) or 0.0)

    def _required_density(self) -> float:
        if self.density is None:
            raise ConfigurationError(f"{self.compressor} needs a density")
        return self.density

    def fixed_threshold(self, layout: Layout) -> float | None:
        """Return λ where it is known from the start; None when it is calibrated, or there is none."""
        if self.paper_rule and self.density is not None:
            return paper_threshold(self.density * layout.numel)
        return self.threshold

    def calibration(self) -> Calibration | None:
        """Return what finds the threshold on the first steps, where nothing fixes it."""
        if self.compressor != "hard-threshold" or self.density is None or self.paper_rule:
            return None
        return Calibration(self.density, CALIBRATION_STEPS)

    def placement_of(self, spec: OptimizerSpec, layout: Layout) -> Placement:
        """Return the placement. Raises OptimizerError when the optimizer cannot be placed so."""
        return GradientPlaced(spec) if self.placement == "gradient" else UpdatePlaced(spec, layout)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
