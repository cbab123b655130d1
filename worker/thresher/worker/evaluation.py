"""The parameters that are worth evaluating, which are not always those at which a worker takes its gradients."""

import logging
from typing import Literal

from torch import Tensor

from thresher.protos.errors import ConfigurationError
from thresher.worker.placement import Pieces
from thresher.worker.remembering import Remembering
from thresher.worker.rounds import Rounds
from thresher.worker.settings import Settings

_logger = logging.getLogger(__name__)

EvaluationPoint = Literal["synced", "virtual"]


def evaluation_point(
    point: EvaluationPoint, settings: Settings, rounds: Rounds, remembering: Remembering | None, residual: Tensor
) -> Pieces:
    """Return the shards' x; or x - mean residual, which takes a round of its own, dense, of all workers.

    Source: arXiv:2004.05298; the virtual point is the one at which its official code evaluates.

    Args:
        point: Which.
        settings: Of this worker: the run's method and mode.
        rounds: Where x is, and the mean is made.
        remembering: Knows the mean, where this worker made it before it was killed.
        residual: This worker's, [numel] float32.

    Raises:
        ConfigurationError: when the residual is not in units of the parameters, so that x - residual means nothing; or
            when rounds do not have all workers in them, so that there is no step at which all could be asked; or when
            workers follow a shadow of x.
    """
    if point == "synced":
        return rounds.pieces
    method, consistency = settings.method, settings.consistency
    if method.placement != "update" or method.outer:
        raise ConfigurationError(
            "the virtual point x - mean residual needs a residual in units of the parameters: placement 'update', "
            f"and no outer optimizer; this run is {method.describe()}"
        )
    if consistency.downlink == "shadow":
        raise ConfigurationError(
            "the virtual point x - mean residual needs x itself and the mean, and with downlink 'shadow' both stay at "
            "the shards: evaluate the synced point"
        )
    if not consistency.lockstep:
        raise ConfigurationError(
            "the virtual point x - mean residual is made in a round of all workers, beside which no other round may be "
            f"open; in mode {consistency.describe()} workers do not wait for each other: evaluate the synced point"
        )
    mean = rounds.mean(residual.clone()) if remembering is None else remembering.mean(rounds, residual.clone())
    if mean is None:
        _logger.warning(
            "worker %d was away when the others made the mean residual: it evaluates the synced point", settings.rank
        )
        return rounds.pieces
    return [(piece, x - mean[piece.begin : piece.end]) for piece, x in rounds.pieces]
