"""The settings that are compared, from the mildest on, and how much of the model an update then holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, final

from thresher.compression.base import check_density

_BISECTIONS: Final = 60


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """One way to train.

    Attributes:
        name: In few words.
        options: Of ``thresher launch``.
        compressor: As `thresher.compression.parse_feedback` reads it.
        density: Fraction of the elements that each worker sends.
    """

    name: str
    options: str
    compressor: str
    density: float

    @property
    def is_everything(self) -> bool:
        """True for plain data parallelism: all elements as float32."""
        return self == EVERYTHING

    @property
    def threshold(self) -> float:
        """The λ that as many standard normal numbers reach as the density says."""
        return NormalDist().inv_cdf(1.0 - self.density / 2.0) if self.density < 1.0 else 0.0


EVERYTHING: Final = Setting("everything", "--threshold 0", "HardThreshold", 1.0)


def settings_for(densities: Sequence[float]) -> list[Setting]:
    """Return what is compared, from the mildest on: everything, then each density, the largest first.

    Densities are taken to three digits, as they are shown.

    Raises:
        ConfigurationError: when a density is not in (0, 1].

    >>> [setting.name for setting in settings_for([0.01])]
    ['everything', 'bfloat16', 'density 0.01', 'density 0.01, bfloat16', 'top-k 0.01']
    """
    found = [EVERYTHING, Setting("bfloat16", "--compressor BFloat16", "BFloat16", 1.0)]
    for density in densities:
        check_density(density)
    for density in sorted({float(f"{density:.3g}") for density in densities}, reverse=True):
        shown = f"{density:.3g}"
        rounded = "Quantized(HardThreshold, BFloat16)"
        found += [
            Setting(f"density {shown}", f"--density {shown}", "HardThreshold", density),
            Setting(f"density {shown}, bfloat16", f"--density {shown} --compressor '{rounded}'", rounded, density),
            Setting(f"top-k {shown}", f"--compressor 'TopK({shown})'", f"TopK({shown})", density),
        ]
    return found


def update_density(density: float, workers: int, pool: float = 1.0) -> float:
    """Return the fraction of elements that at least one of the workers sends.

    Each is taken to choose at random, independently of the others, among a fraction ``pool`` of all elements; where the
    pool is everything that is the most there can be but for workers that avoid each other.

    >>> update_density(0.5, 2), update_density(0.5, 2, pool=0.5)
    (0.75, 0.5)
    """
    within = max(pool, density)
    missed: float = (1.0 - density / within) ** workers
    return within * (1.0 - missed)


def pool_of(density: float, union: float, workers: int) -> float:
    """Return the pool for which `update_density` is what a run has seen.

    Args:
        density: Of its pushes.
        union: Of its updates.
        workers: How many it had.

    >>> round(pool_of(0.1, update_density(0.1, 4, 0.25), 4), 6)
    0.25
    """
    least, most = density, 1.0
    for _ in range(_BISECTIONS):
        pool = (least + most) / 2
        least, most = (pool, most) if update_density(density, workers, pool) < union else (least, pool)
    return most
