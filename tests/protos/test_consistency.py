"""The run's mode: bad settings are refused by name, and equal descriptions mean equal settings."""

import math
from itertools import product
from typing import Any

import pytest

from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError

CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": ("sync", "ssp", "async"),
    "quorum": (0, 2, 3),
    "grace": (0.0, 0.5),
    "staleness": (0, 1, 4),
    "max_staleness": (0, 1, 4),
    "downlink": ("updates", "shadow"),
    "shadow_threshold": (0.0, 0.25),
    "momentum_per_push": (False, True),
    "staleness_aware": (False, True),
}
EVERY = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]


def accepted(found: dict[str, Any]) -> Consistency | None:
    try:
        return Consistency(**found)
    except ConfigurationError:
        return None


VALID = [consistency for found in EVERY if (consistency := accepted(found)) is not None]


def test_no_setting_is_ignored() -> None:
    """What is accepted has an effect in its mode; what would have none is refused."""
    for found in EVERY:
        in_sync, in_quorum = found["mode"] == "sync", found["quorum"] > 0
        unused = (
            (in_quorum and not in_sync)
            or (found["grace"] > 0 and not in_quorum)
            or (found["staleness"] > 0 and found["mode"] != "ssp")
            or (found["max_staleness"] > 0 and in_sync and not in_quorum)
            or (found["shadow_threshold"] > 0 and found["downlink"] != "shadow")
            or ((found["momentum_per_push"] or found["staleness_aware"]) and in_sync)
        )
        assert (accepted(found) is None) == unused, found


def test_different_settings_have_different_descriptions() -> None:
    """People and logs tell runs apart by them."""
    assert len({consistency.describe() for consistency in VALID}) == len(set(VALID)) == len(VALID)


def test_lockstep_is_sync_without_a_quorum() -> None:
    """Only there a worker's step is the shards' version."""
    for consistency in VALID:
        assert consistency.lockstep == (consistency.mode == "sync" and consistency.quorum == 0)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"mode": "bsp"}, "mode must be one of sync, ssp, async, not 'bsp'"),
        ({"downlink": "weights"}, "downlink must be one of updates, shadow, not 'weights'"),
        ({"quorum": -1}, "quorum must be finite and not negative, not -1"),
        ({"quorum": 2, "grace": math.inf}, "grace must be finite and not negative, not inf"),
        ({"quorum": 2, "grace": math.nan}, "grace must be finite and not negative, not nan"),
        ({"mode": "ssp", "staleness": -2}, "staleness must be finite and not negative, not -2"),
        ({"mode": "async", "max_staleness": -1}, "max_staleness must be finite and not negative, not -1"),
        ({"downlink": "shadow", "shadow_threshold": -0.1}, "shadow_threshold must be finite and not negative"),
        ({"mode": "async", "quorum": 2}, "a quorum belongs to mode sync, not to async"),
        ({"mode": "ssp", "grace": 0.5}, "a quorum belongs to mode sync, not to ssp"),
        ({"grace": 0.5}, "a grace needs a quorum"),
        ({"mode": "async", "staleness": 2}, "staleness belongs to mode ssp, not to async; max_staleness is for all"),
        ({"max_staleness": 2}, "max_staleness makes no sense where every member is waited for"),
        ({"shadow_threshold": 0.1}, "a shadow threshold needs downlink 'shadow'"),
        ({"momentum_per_push": True}, "momentum_per_push belongs to ssp and async, where each push is a round"),
        ({"quorum": 2, "staleness_aware": True}, "staleness_aware belongs to ssp and async"),
    ],
)
def test_bad_settings_are_refused(found: dict[str, Any], text: str) -> None:
    """Before anything is started, with the name of the setting and its value."""
    with pytest.raises(ConfigurationError, match=text):
        Consistency(**found)


def test_descriptions_are_for_people() -> None:
    """Each mode names what matters in it, and nothing else."""
    assert Consistency().describe() == "sync"
    assert (
        Consistency(quorum=3, grace=0.5, max_staleness=4).describe() == "sync, quorum 3, grace 0.5 s, max staleness 4"
    )
    assert Consistency("ssp").describe() == "ssp, staleness 0"
    assert Consistency("async", downlink="shadow").describe() == "async, shadow 0"
    options = Consistency("async", momentum_per_push=True, staleness_aware=True)
    assert options.describe() == "async, momentum per push, staleness-aware"
