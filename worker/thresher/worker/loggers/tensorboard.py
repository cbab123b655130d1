"""TensorBoard: a curve for each number of a row."""

from typing import Any, Protocol, final

from thresher.worker.rows import WorkerRow


class ScalarWriter(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``; tensorboardX has the same."""

    def add_scalar(
        self, tag: str, scalar_value: float, global_step: int | None = None, walltime: float | None = None
    ) -> Any:  # noqa: ANN401 - what it returns is not used
        """Write one point of a curve."""


@final
class TensorBoard:
    """Writes each row with a writer of the user's, who closes it.

    Args:
        writer: Such as ``torch.utils.tensorboard.SummaryWriter(folder)``, which takes ``thresher[tensorboard]``.
    """

    def __init__(self, writer: ScalarWriter) -> None:
        """Write to ``writer``."""
        self._writer = writer

    def __call__(self, row: WorkerRow) -> None:
        """Write one row."""
        for name, value in row.scalars().items():
            self._writer.add_scalar(name, value, row.step, row.time)
