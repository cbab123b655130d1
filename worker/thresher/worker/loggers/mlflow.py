"""MLflow: a metric for each number of a row."""

from typing import final

from thresher.protos.errors import ConfigurationError
from thresher.worker.rows import WorkerRow

try:
    import mlflow
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"to log to MLflow takes the package {error.name}: pip install 'thresher[mlflow]'"
    ) from error


@final
class MLflow:
    """Logs each row, in one call, to the run that is active in this process; MLflow begins one where none is.

    Raises:
        ConfigurationError: when it is imported and MLflow is not installed.
    """

    def __call__(self, row: WorkerRow) -> None:
        """Log one row."""
        mlflow.log_metrics(row.scalars(), step=row.step, timestamp=round(1000 * row.time))
