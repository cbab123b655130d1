"""What somebody wants to know: checked before anything is measured. No torch, so that `--help` is quick."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import final

from thresher.protos.errors import ConfigurationError


@final
@dataclass(frozen=True, slots=True)
class Question:
    """A run to come, as far as it is known.

    Attributes:
        model: As `thresher.deploy.advise.model.load_model` takes it; this, ``parameters`` or ``run`` says how large.
        parameters: How many there are.
        run: Folder of an earlier run, which answers what is None.
        compute: Seconds of a forward and backward pass.
        workers: How many.
        here: How many of them share a host and its link.
        shards: How many, where none are named.
        densities: To be compared, beside that of the run.
        bandwidth: Bytes per second of the link of a worker's host, where it is not to be measured.
        round_trip: Seconds, beside ``bandwidth``.
        shard_bandwidth: Bytes per second of the link of a shard's host, where that is known.
        timeout: Seconds to look for the shards.

    Raises:
        ConfigurationError: when that makes no sense; the message names the option.
    """

    model: str | None = None
    parameters: int | None = None
    run: Path | None = None
    compute: float | None = None
    workers: int | None = None
    here: int = 1
    shards: int | None = None
    densities: tuple[float, ...] = ()
    bandwidth: float | None = None
    round_trip: float = 0.001
    shard_bandwidth: float | None = None
    timeout: float = 10.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        sizes = [size for size in (self.model, self.parameters) if size is not None]
        if len(sizes) == 2 or not (sizes or self.run):
            raise ConfigurationError("how large is the model? name --model or --parameters, not both, or a --run")
        seconds = {"--compute": self.compute, "--rtt": self.round_trip, "--timeout": self.timeout}
        for option, value in seconds.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{option} must be a finite number of seconds >= 0, not {value}")
        counts = {"--parameters": self.parameters, "--workers": self.workers, "--workers-here": self.here,
                  "--shards": self.shards}  # fmt: skip
        for option, count in counts.items():
            if count is not None and count < 1:
                raise ConfigurationError(f"{option} must be at least 1, not {count}")


def read_densities(text: str) -> tuple[float, ...]:
    """Return the densities in ``text``.

    Raises:
        ConfigurationError: when they are no numbers.

    >>> read_densities("0.1,0.01")
    (0.1, 0.01)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"--densities are numbers, such as 0.1,0.01, not {text!r}") from None
