"""Points worth evaluating; what they are worth is tested where the methods are, in tests/integration."""

import pytest
import torch

from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError
from thresher.protos.optimizers import OptimizerSpec
from thresher.worker import Method
from thresher.worker.evaluation import evaluation_point
from thresher.worker.rounds import Rounds

ROUNDS = Rounds(0, (), Consistency(), OptimizerSpec("Subtract", ({},)), dict)


@pytest.mark.parametrize(
    "method",
    [Method(threshold=0.5), Method(threshold=0.5, placement="update", outer="SGD(lr=0.7)")],
    ids=["gradients", "outer"],
)
def test_a_residual_that_is_no_lag(method: Method) -> None:
    """The virtual point needs a residual in units of the parameters; the synced one is always there."""
    with pytest.raises(ConfigurationError, match="needs a residual in units of the parameters"):
        evaluation_point("virtual", method, ROUNDS, torch.zeros(1))
    assert evaluation_point("synced", method, ROUNDS, torch.zeros(1)) == []
