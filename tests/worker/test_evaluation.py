"""Points worth evaluating; what they are worth is tested where the methods are, in tests/integration."""

import pytest
import torch

from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError
from thresher.protos.optimizers import OptimizerSpec
from thresher.worker import Method, Settings
from thresher.worker.evaluation import evaluation_point
from thresher.worker.rounds import Rounds

UPDATES = Method(threshold=0.5, placement="update")
ROUNDS = Rounds(0, (), Consistency(), OptimizerSpec("Subtract", ({},)), dict)


@pytest.mark.parametrize(
    "method",
    [Method(threshold=0.5), Method(threshold=0.5, placement="update", outer="SGD(lr=0.7)")],
    ids=["gradients", "outer"],
)
def test_a_residual_that_is_no_lag(method: Method) -> None:
    """The virtual point needs a residual in units of the parameters; the synced one is always there."""
    settings = Settings(("a:1",), 0, 1, method=method)
    with pytest.raises(ConfigurationError, match="needs a residual in units of the parameters"):
        evaluation_point("virtual", settings, ROUNDS, None, torch.zeros(1))
    assert evaluation_point("synced", settings, ROUNDS, None, torch.zeros(1)) == []


@pytest.mark.parametrize(
    "consistency",
    [Consistency(quorum=1), Consistency("ssp", staleness=1), Consistency("async")],
    ids=Consistency.describe,
)
def test_no_round_of_all_workers(consistency: Consistency) -> None:
    """Outside of lockstep the virtual point is refused, and the message says why; the synced one is there."""
    settings = Settings(("a:1",), 0, 1, method=UPDATES, consistency=consistency)
    with pytest.raises(ConfigurationError, match=rf"in mode {consistency.describe()} workers do not wait"):
        evaluation_point("virtual", settings, ROUNDS, None, torch.zeros(1))
    assert evaluation_point("synced", settings, ROUNDS, None, torch.zeros(1)) == []


def test_a_shadow_of_the_parameters() -> None:
    """Workers that follow a shadow have neither x nor the mean: refused, where it would be the synced point unsaid."""
    shadowed = Consistency(downlink="shadow", shadow_threshold=0.1)
    settings = Settings(("a:1",), 0, 1, method=UPDATES, consistency=shadowed)
    with pytest.raises(ConfigurationError, match="with downlink 'shadow' both stay at the shards"):
        evaluation_point("virtual", settings, ROUNDS, None, torch.zeros(1))
    assert evaluation_point("synced", settings, ROUNDS, None, torch.zeros(1)) == []
