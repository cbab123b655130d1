"""Weights & Biases: a chart for each number of a row."""

from typing import Any, Final, Protocol, final

from thresher.worker.rows import WorkerRow

_STEP: Final = "thresher/step"


class LoggingRun(Protocol):
    """What is used of a run, as ``wandb.init`` returns it."""

    def define_metric(self, name: str, step_metric: str | None = None) -> Any:  # noqa: ANN401 - it is not used
        """Say over what a metric is drawn."""

    def log(self, data: dict[str, Any]) -> None:
        """Log numbers by name."""


@final
class WeightsAndBiases:
    """Logs each row to a run of the user's, who finishes it.

    Its charts are drawn over the steps of the worker, ``thresher/step``: the run's own step, which may only grow,
    stays the user's.

    Args:
        run: As ``wandb.init`` returns it, which takes ``thresher[wandb]``.
    """

    def __init__(self, run: LoggingRun) -> None:
        """Say over what the numbers are drawn."""
        self._run = run
        run.define_metric(_STEP)
        run.define_metric("thresher/*", step_metric=_STEP)

    def __call__(self, row: WorkerRow) -> None:
        """Log one row."""
        self._run.log({**row.scalars(), _STEP: row.step})
