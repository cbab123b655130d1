"""When a round closes, and how workers follow: the run's mode, in one value that workers register and shards obey."""

import math
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from thresher.protos.errors import ConfigurationError

Mode = Literal["sync", "ssp", "async"]
Downlink = Literal["updates", "shadow"]

NEVER_TOO_STALE: Final = 0
"""As `Consistency.max_staleness`: no push is returned for its age."""


@final
@dataclass(frozen=True, slots=True)
class Consistency:
    """How strictly workers keep step. One rule for all modes: a push belongs to the round that is open when it comes.

    Attributes:
        mode: ``sync``, a round closes when every member has pushed; ``ssp`` and ``async``, each push is a round of its
            own, and in ``ssp`` a worker that is more than ``staleness`` steps ahead of the slowest waits.
        quorum: In ``sync``: a round closes already when so many members have pushed and the grace is over; a late push
            joins the next round. 0 waits for all.
        grace: Seconds that a quorum waits for the others.
        staleness: Of ``ssp``, in steps.
        max_staleness: A push computed on a version older than this is returned to the worker's residual; 0 takes all.
        downlink: ``updates``, workers replay the log; ``shadow``, they copy assignments.
        shadow_threshold: λ_w of the shadow, in units of parameters.
        momentum_per_push: Of ``ssp`` and ``async``: momenta decay in N pushes as much as elsewhere in one round.
        staleness_aware: Of ``ssp`` and ``async``: a push that is staler than N versions is divided by its staleness.

    Raises:
        ConfigurationError: for settings out of range, or that belong to another mode.
    """

    mode: Mode = "sync"
    quorum: int = 0
    grace: float = 0.0
    staleness: int = 0
    max_staleness: int = NEVER_TOO_STALE
    downlink: Downlink = "updates"
    shadow_threshold: float = 0.0
    momentum_per_push: bool = False
    staleness_aware: bool = False

    def __post_init__(self) -> None:
        """Check before anything is started."""
        for name, choices in (("mode", get_args(Mode)), ("downlink", get_args(Downlink))):
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("quorum", "grace", "staleness", "max_staleness", "shadow_threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{name} must be finite and not negative, not {value}")
        if self.mode != "sync" and (self.quorum or self.grace):
            raise ConfigurationError(f"a quorum belongs to mode sync, not to {self.mode}")
        if self.grace and not self.quorum:
            raise ConfigurationError("a grace needs a quorum: without one every member is waited for")
        if self.mode != "ssp" and self.staleness:
            raise ConfigurationError(f"staleness belongs to mode ssp, not to {self.mode}; max_staleness is for all")
        if self.lockstep and self.max_staleness:
            raise ConfigurationError("max_staleness makes no sense where every member is waited for")
        if self.shadow_threshold and self.downlink != "shadow":
            raise ConfigurationError("a shadow threshold needs downlink 'shadow'")
        for name in ("momentum_per_push", "staleness_aware"):
            if getattr(self, name) and self.mode == "sync":
                raise ConfigurationError(f"{name} belongs to ssp and async, where each push is a round, not to sync")

    @property
    def lockstep(self) -> bool:
        """True where all members make the same step in the same round: a worker's step is the shards' version."""
        return self.mode == "sync" and not self.quorum

    def describe(self) -> str:
        """Return a text that is equal for equal settings, such as ``sync, quorum 3, grace 0.5 s``.

        >>> Consistency("ssp", staleness=4, downlink="shadow", shadow_threshold=0.003).describe()
        'ssp, staleness 4, shadow 0.003'
        """
        parts: list[str] = [self.mode]
        parts += [f"quorum {self.quorum}", f"grace {self.grace:g} s"] if self.quorum else []
        parts += [f"staleness {self.staleness}"] if self.mode == "ssp" else []
        parts += [f"max staleness {self.max_staleness}"] if self.max_staleness else []
        parts += [f"shadow {self.shadow_threshold:g}"] if self.downlink == "shadow" else []
        parts += ["momentum per push"] if self.momentum_per_push else []
        parts += ["staleness-aware"] if self.staleness_aware else []
        return ", ".join(parts)
