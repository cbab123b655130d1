"""Costs and links of round numbers, for tests that can add them up by hand."""

from collections.abc import Sequence

from thresher.deploy.advise.link import Link, Way
from thresher.deploy.advise.rehearsal import Costs
from thresher.deploy.advise.samples import exactly
from thresher.deploy.advise.settings import EVERYTHING, Setting

SPARSE = Setting("density 0.01", "--density 0.01", "HardThreshold", 0.01)


def costs(
    setting: Setting = EVERYTHING, push: Sequence[int] = (1000,), pull: Sequence[int] = (1000,), seconds: float = 0.0
) -> Costs:
    """Costs with ``seconds`` in each of the three parts."""
    each = exactly(seconds)
    return Costs(setting, setting.density, tuple(push), tuple(pull), each, each, each)


def way(host: str = "", up: float = 1000.0, down: float = 1000.0, round_trip: float = 0.0) -> Way:
    return Way(host or "all shards", host, exactly(round_trip), exactly(up), exactly(down))


def link(*hosts: str, up: float = 1000.0, down: float = 1000.0, round_trip: float = 0.0) -> Link:
    """A link on which each shard, on the host of that name, and all at once have the same rates."""
    alone = tuple(way(host, up, down, round_trip) for host in hosts or ("a",))
    return Link(way("", up, down, round_trip), alone)
