"""What an earlier run says of the one to come: its density, how far workers agree, how long they compute."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from thresher.deploy.advise.samples import Sample, middle
from thresher.deploy.report.runs import Run, read_runs
from thresher.protos.errors import ConfigurationError


@final
@dataclass(frozen=True, slots=True)
class PastRun:
    """A run, or as much of it as there is; of its second half, when thresholds and caches have settled.

    Rounds without gradients, in which workers agree on a mean only, do not count.

    Attributes:
        name: Of its folder.
        numel: Elements of the model.
        workers: How many have pushed.
        shards: How many shards, as far as its files say.
        density: Elements pushed over elements that could have been.
        update_density: Elements of an update over those of the model.
        push_bytes: Of a round, from all workers to all shards.
        pull_bytes: Of a round, from all shards to all workers.
        compute: Seconds of each step of the slowest worker; None where workers have written no rows.
        step_seconds: Between two rounds, the median.
    """

    name: str
    numel: int
    workers: int
    shards: int
    density: float
    update_density: float
    push_bytes: float
    pull_bytes: float
    compute: Sample | None
    step_seconds: float


def read_past(folder: Path) -> PastRun:
    """Read a run's rows.

    Raises:
        ConfigurationError: when it is no folder of a run, has no rounds, or a file of it cannot be read.
    """
    run = read_runs([folder])[0]
    numel = float(run.rounds["numel"][-1])
    of_gradients = run.rounds["only_mean"] == 0  # others agree on buffers, say, and nothing is compressed in them
    rounds = {name: column[of_gradients] for name, column in run.rounds.items()}
    half = slice(rounds["version"].size // 2, None)
    pushable = float(rounds["pushable"][half].sum())
    if not pushable:
        raise ConfigurationError(f"{folder}: nobody has pushed in the second half of this run; name another one")
    gaps = np.diff(rounds["time"][half])
    return PastRun(
        run.name,
        round(numel),
        round(float(rounds["pushable"][-1]) / numel) or 1,
        len(run.shards),
        density=float(rounds["pushed_elements"][half].sum()) / pushable,
        update_density=float(rounds["update_density"][half].mean()),
        push_bytes=float(rounds["push_bytes"][half].mean()),
        pull_bytes=float(rounds["pull_bytes"][half].mean()),
        compute=_compute(run),
        step_seconds=middle(gaps) if gaps.size else 0.0,
    )


def _compute(run: Run) -> Sample | None:
    """Return the seconds that the slowest worker computed, step by step."""
    each = [worker.columns["compute_seconds"] for worker in run.workers.values()]
    settled = [column[column.size // 2 :] for column in each if column.size]
    return max(settled, key=middle, default=None)
