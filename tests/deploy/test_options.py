"""The choices that the command line offers are those that there are."""

from typing import get_args

import pytest

from thresher.deploy import options
from thresher.deploy.launch_config import Durability
from thresher.protos.consistency import Downlink, Mode
from thresher.worker.method import NonFinite, Placing, Rule


@pytest.mark.parametrize(
    ("offered", "meant"),
    [
        (options.RuleName, Rule),
        (options.PlacementName, Placing),
        (options.NonFiniteName, NonFinite),
        (options.ModeName, Mode),
        (options.DownlinkName, Downlink),
        (options.DurabilityName, Durability),
    ],
)
def test_choices_are_those_there_are(offered: object, meant: object) -> None:
    """Spelled out once more for the sake of a quick start, and no different."""
    assert get_args(offered) == get_args(meant)


def test_what_may_change_is_no_more_than_how_a_run_is_watched() -> None:
    """A resumed run keeps its method, mode, seed and numbers."""
    assert not options.CHANGEABLE & options.OF_THE_LAUNCH
    assert not options.CHANGEABLE & {"density", "mode", "seed", "shards", "workers", "durability", "script"}
