"""One training run of a deep recipe: workers in one process, through the simulator, with the bytes real frames have."""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, final

from torch import Tensor

from benchmarks.papers.images import Images
from benchmarks.papers.language import Language
from benchmarks.papers.recipe import Form, Row
from benchmarks.papers.recommendation import Recommendation
from benchmarks.papers.task import WORKERS, Plan, Task
from thresher.compression import Budget, parse_feedback, quantile_threshold
from thresher.protos.codec import encode
from thresher.protos.errors import NonFiniteGradientError
from thresher.protos.mean import mean_of
from thresher.simulation import Placement, SimulatedRound, Simulator

TaskName = Literal["images", "language", "recommendation"]

TASKS: Final[dict[TaskName, type[Task]]] = {
    "images": Images,
    "language": Language,
    "recommendation": Recommendation,
}
DENSE: Final = "NoFeedback(Identity())"


@final
@dataclass(frozen=True)
class Training:
    """What makes two runs the same.

    Args:
        task: what is trained.
        method: its name in tables and figures.
        feedback: the call that makes it, as of the catalogue.
        seed: of the start and of the order of the data.
        form: how long.
        placement: whether gradients are sent or finished updates.
        rate: the learning rate, as a multiple of the task's own.
        momentum: of the optimizer; None: the task's own.
        nesterov: whether that momentum is Nesterov's.
        budget: the mean density to which the threshold of the run is steered, for a hard threshold without its own.
        evaluations: how many rows are written, evenly spread; the last one is of the last round.
    """

    task: TaskName
    method: str
    feedback: str
    seed: int
    form: Form
    placement: Placement = "gradient"
    rate: float = 1.0
    momentum: float | None = None
    nesterov: bool = True
    budget: float | None = None
    evaluations: int = 4

    def plan(self, task: Task) -> Plan:
        """The task's own plan with what differs in this run."""
        plan = task.plan(self.form)
        momentum = plan.momentum if self.momentum is None else self.momentum
        return replace(plan, rate=plan.rate * self.rate, momentum=momentum, nesterov=self.nesterov)


def trained(training: Training) -> list[Row]:
    """Run ``training`` to its end, or until it diverges.

    Returns:
        A row for each evaluation: what says which run it is; ``round``; ``quality`` at x, and ``virtual_quality`` at
        x - mean residual where updates are sent, both NaN from the round on in which the run diverged; ``density``, the
        mean kept fraction so far, in (0, 1]; ``up_bytes`` and ``down_bytes``, what the frames of one worker's pushes,
        and those of its pulls, take so far; ``error``, (1/n) Σ ‖residual‖² after this round, and ``total_error``, its
        sum over the rounds so far.
    """
    return Run(training).rows()


@final
class Run:
    """A run in progress; :func:`trained` is what most recipes need."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.task = TASKS[training.task](training.seed)
        self.plan = training.plan(self.task)
        network = self.task.network
        self.feedbacks = [parse_feedback(training.feedback, network.shapes, network.names) for _ in range(WORKERS)]
        start = network.point.clone()
        self._budget = None if training.budget is None else Budget(training.budget, self.plan.rounds)
        self.simulator = Simulator(
            self.feedbacks,
            self.task.gradient,
            start,
            self.plan.optimizer(),
            placement=training.placement,
            threshold=None
            if training.budget is None
            else quantile_threshold(self.task.gradient(0, start, 0), training.budget),
        )
        self._totals = {"density": 0.0, "up_bytes": 0.0, "down_bytes": 0.0, "total_error": 0.0}

    def rows(self) -> list[Row]:
        """Run to the end, and say how it went."""
        rows: list[Row] = []
        last = self.plan.rounds - 1
        due = {round(last * (number + 1) / self.training.evaluations) for number in range(self.training.evaluations)}
        diverged = False
        for step in range(self.plan.rounds):
            diverged = diverged or not self.advance(step)
            if step in due:
                rows.append(self._row(step, diverged=diverged))
        return rows

    def advance(self, step: int) -> bool:
        """Make round ``step``; whether all is still finite after it."""
        for optimizer in self.simulator.optimizers:
            optimizer.param_groups[0]["lr"] = self.plan.rate_at(step)
        try:
            (done,) = self.simulator.run(1)
        except NonFiniteGradientError:
            return False
        self._count(done)
        self._steer(done)
        return bool(done.x.sum().isfinite())

    def _count(self, done: SimulatedRound) -> None:
        frames = sum(len(encode(message)) for message in done.messages)
        self._totals["density"] += done.density
        self._totals["up_bytes"] += frames / WORKERS
        self._totals["down_bytes"] += len(encode(mean_of(done.messages, WORKERS)))
        self._totals["total_error"] += done.error
        self._error = done.error
        self._rounds = done.step + 1

    def _steer(self, done: SimulatedRound) -> None:
        """Choose λ of the next round by what was sent of this one, and by what the first worker could have sent."""
        if self._budget is None:
            return

        def corrected() -> Tensor:
            return self.feedbacks[0].residual.index_add(0, done.messages[0].indices, done.messages[0].values)

        self.simulator.threshold = self._budget.observe(corrected, done.density)

    def _row(self, step: int, *, diverged: bool) -> Row:
        training = self.training
        virtual = training.placement == "update" and not diverged
        totals = self._totals | {"density": self._totals["density"] / self._rounds}
        return {
            "task": training.task,
            "method": training.method,
            "feedback": training.feedback,
            "seed": training.seed,
            "rate": self.plan.rate,
            "round": step + 1,
            "quality": math.nan if diverged else self.task.quality(self.simulator.synced),
            "virtual_quality": self.task.quality(self.simulator.virtual) if virtual else math.nan,
            **totals,
            "error": self._error,
        }
