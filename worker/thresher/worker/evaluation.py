"""The parameters that are worth evaluating, which are not always those at which a worker takes its gradients."""

from typing import Literal

from torch import Tensor

from thresher.protos.errors import ConfigurationError
from thresher.worker.method import Method
from thresher.worker.placement import Pieces
from thresher.worker.rounds import Rounds

EvaluationPoint = Literal["synced", "virtual"]


def evaluation_point(point: EvaluationPoint, method: Method, rounds: Rounds, residual: Tensor) -> Pieces:
    """Return the shards' x; or x - mean residual, which takes a round of its own, dense, of all workers.

    Source: arXiv:2004.05298; the virtual point is the one at which its official code evaluates.

    Args:
        point: Which.
        method: Of the run.
        rounds: Where x is, and the mean is made.
        residual: This worker's, [numel] float32.

    Raises:
        ConfigurationError: when the residual is not in units of the parameters, so that x - residual means nothing.
    """
    if point == "synced":
        return rounds.pieces
    if method.placement != "update" or method.outer:
        raise ConfigurationError(
            "the virtual point x - mean residual needs a residual in units of the parameters: placement 'update', "
            f"and no outer optimizer; this run is {method.describe()}"
        )
    mean = rounds.mean(residual.clone())
    return [(piece, x - mean[piece.begin : piece.end]) for piece, x in rounds.pieces]
