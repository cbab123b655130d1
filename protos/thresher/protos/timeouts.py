"""Time-outs on which others depend: their defaults, the order that each process checks, and what follows from them.

docs/survival.md has the table of all waits. Times are in seconds.
"""

import math
from dataclasses import dataclass
from typing import Final, final

from thresher.protos.errors import ConfigurationError

# Of the network: who is silent for the sum of both is gone.
PING_SECONDS: Final = 10
PONG_SECONDS: Final = 20

# Of a shard, by default.
START_SECONDS: Final = 300.0
ROUND_SECONDS: Final = 1800.0
LEASE_SECONDS: Final = 60.0

# Of a worker.
CONNECT_SECONDS: Final = 60.0
RECONNECT_SECONDS: Final = 300.0
CALL_SECONDS: Final = 60.0
NOTICE_SECONDS: Final = 5.0
"""Between two warnings that a shard cannot be found."""
MARGIN_SECONDS: Final = 30.0
"""A shard fails a wait at its own deadline and says who is missing; a worker waits so much longer."""

# Of a launcher.
RESTART_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0
JOURNAL_SECONDS: Final = 600.0
"""How long a shard may take to read its journal."""


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """One time-out is no longer than another, or else what ``otherwise`` says."""

    shorter: str
    longer: str
    otherwise: str


ORDER: Final = (
    Rule("lease", "round_timeout", "the run would fail before the others may go on without a worker that was lost"),
    Rule("grace", "round_timeout", "the run would fail while a quorum that is complete waits for the others"),
    Rule("lease", "reconnect_timeout", "a worker would give up while the others still wait for it"),
    Rule("restart_delay", "lease", "the others would go on before a worker that was killed is started again"),
)
"""Each is checked by every process that knows both: a shard, a launcher, a worker when it registers."""


def check_timeouts(**seconds: float) -> None:
    """Refuse what is no time, and what breaks `ORDER`; each process gives those that it knows.

    Raises:
        ConfigurationError: it names the time-outs, and says what they would lead to.

    >>> check_timeouts(lease=60.0, round_timeout=1800.0)
    """
    for name, value in seconds.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"{_words(name)} must be finite and not negative, not {value}")
    for rule in ORDER:
        if {rule.shorter, rule.longer} <= seconds.keys() and seconds[rule.shorter] > seconds[rule.longer]:
            raise ConfigurationError(
                f"{_words(rule.shorter)} of {seconds[rule.shorter]:g} s is longer than {_words(rule.longer)} of "
                f"{seconds[rule.longer]:g} s: {rule.otherwise}; shorten the one, or lengthen the other"
            )


def latest_answer(*, start_timeout: float, round_timeout: float, lease: float) -> float:
    """Return when a shard has answered a push or an agreement at the latest, if only by why it failed.

    It waits for those who are missing, then for the lease of one that was lost just then, then for a full disk.
    """
    return max(start_timeout, round_timeout) + lease + round_timeout


def longest_wait(answer_timeout: float, reconnect_timeout: float) -> float:
    """Return how long a worker waits for an answer: while it finds its shard again, and until that has spoken."""
    return answer_timeout + reconnect_timeout + MARGIN_SECONDS


def longest_pause(lease: float, restart_delay: float) -> float:
    """Return how far the pause before a restart grows: half a lease is left for a worker to start in."""
    return min(max(restart_delay, lease / 2), LONGEST_PAUSE_SECONDS)


def patience_with_shards(lease: float, restart_delay: float) -> float:
    """Return how long the workers of a launcher look for a shard, which it may have to start again."""
    return max(lease, longest_pause(lease, restart_delay) + JOURNAL_SECONDS)


def _words(name: str) -> str:
    return name.replace("_", " ")
