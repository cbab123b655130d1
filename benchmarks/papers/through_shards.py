"""One deep run twice: in the simulator, and with real shards and workers that talk gRPC over loopback.

Each worker has a network of its own in both, since the running statistics of batch normalisation are no parameters and
do not travel. Quality is that of the first worker's network.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, final

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.papers.drawing import curve, panels, points
from benchmarks.papers.recipe import Form, Oracle, Recipe, Row, oracle
from benchmarks.papers.task import WORKERS, Flat, Plan, Task
from benchmarks.papers.training import TASKS
from thresher.compression import parse_feedback
from thresher.deploy.in_process import in_process
from thresher.simulation import Simulator
from thresher.worker import Method, Session

METHODS: Final = (("hard threshold", "ErrorFeedback(HardThreshold(0.02))"), ("Top-k", "ErrorFeedback(TopK(0.01))"))
EVALUATIONS: Final = 4  # evenly spread over a run


@final
@dataclass(frozen=True)
class Twice:
    """A run to make twice.

    Args:
        method: its name in tables and figures.
        feedback: the call that makes it.
        seed: of the start and of the order of the data.
        rounds: in all, a multiple of four.
        workers: how many take part; each has batches of its own.
        shards: among how many the parameters are dealt.
    """

    method: str
    feedback: str
    seed: int
    rounds: int
    workers: int = WORKERS
    shards: int = 3

    @property
    def plan(self) -> Plan:
        """SGD with momentum, as in the task's own plan, for the length of this run."""
        return Plan(rounds=self.rounds, rate=0.1, momentum=0.9, weight_decay=1e-4)

    def evaluates(self, step: int) -> bool:
        """Whether the quality is taken after round ``step``."""
        return (step + 1) % (self.rounds // EVALUATIONS) == 0


class Done(NamedTuple):
    """What a round came to.

    Args:
        elements: sent, by the workers that this was taken from.
        x: [numel] float32, the parameters after it.
        quality: of the first worker's network, where it was taken.
    """

    elements: int
    x: Tensor
    quality: float | None


def of_each_worker(task: Task, workers: int) -> list[Task]:
    """The task once for each worker, with the same data and start but a network of its own."""
    copies = [copy.copy(task) for _ in range(workers)]
    for one in copies:
        one.network = Flat(copy.deepcopy(task.network.module))
    return copies


def in_simulator(tasks: Sequence[Task], twice: Twice) -> list[Done]:
    """Make the run in the simulator; the elements are those of all workers."""
    plan, network = twice.plan, tasks[0].network
    feedbacks = [parse_feedback(twice.feedback, network.shapes, network.names) for _ in tasks]

    def gradient(worker: int, point: Tensor, step: int) -> Tensor:
        return tasks[worker].gradient(worker, point, step)

    simulator = Simulator(feedbacks, gradient, network.point.clone(), plan.optimizer())
    rounds = []
    for step in range(twice.rounds):
        simulator.optimizers[0].param_groups[0]["lr"] = plan.rate_at(step)
        (done,) = simulator.run(1)
        quality = tasks[0].quality(done.x) if twice.evaluates(step) else None
        rounds.append(Done(done.elements, done.x, quality))
    return rounds


def in_shards(tasks: Sequence[Task], twice: Twice) -> list[list[Done]]:
    """Make the run with shards and workers; what each worker has seen and sent, by rank."""
    plan = twice.plan

    def work(session: Session) -> list[Done]:
        task = tasks[session.rank]
        optimizer = plan.optimizer()(list(task.network.module.parameters()))
        session.wrap(task.network.module, optimizer)
        sent: list[int] = []
        session.on_step(lambda row: sent.append(row.pushed_elements))
        rounds = []
        for step in range(twice.rounds):
            optimizer.param_groups[0]["lr"] = plan.rate_at(step)
            task.gradient(session.rank, task.network.point.clone(), step)  # it is where the optimizer looks
            optimizer.step()
            x = task.network.point.clone()
            quality = task.quality(x) if session.rank == 0 and twice.evaluates(step) else None
            rounds.append(Done(sent[-1], x, quality))
        return rounds

    with in_process(shards=twice.shards, workers=twice.workers, method=Method(twice.feedback)) as cluster:
        return cluster.run(work)


def run(cell: Twice) -> list[Row]:
    """Make the run twice, on the image task.

    Returns:
        A row for each round: what says which run it is; ``round``; ``elements_simulated`` and ``elements_sent``, of all
        workers; ``difference``, the largest |x_simulated - x| over coordinates and workers; and where it was evaluated
        ``quality_simulated`` and ``quality``.
    """
    task = TASKS["images"](cell.seed)
    simulated = in_simulator(of_each_worker(task, cell.workers), cell)
    real = in_shards(of_each_worker(task, cell.workers), cell)
    rows: list[Row] = []
    for number, (expected, *found) in enumerate(zip(simulated, *real, strict=True), 1):
        row: Row = {name: value for name, value in vars(cell).items() if isinstance(value, str | int)}
        row["round"] = number
        row["elements_simulated"] = expected.elements
        row["elements_sent"] = sum(done.elements for done in found)
        row["difference"] = max(float((done.x - expected.x).abs().max()) for done in found)
        if expected.quality is not None and found[0].quality is not None:
            row |= {"quality_simulated": expected.quality, "quality": found[0].quality}
        rows.append(row)
    return rows


def cells(form: Form) -> list[Twice]:
    """40 rounds and one seed in the short form, 80 rounds and three seeds in the full one."""
    seeds, rounds = (range(1), 40) if form == "short" else (range(3), 80)
    return [Twice(method, feedback, seed, rounds) for method, feedback in METHODS for seed in seeds]


def draw(rows: list[Row]) -> Figure:
    """Elements and quality of the first seed: lines in the simulator, points through shards."""
    figure, (elements, quality) = panels(2)
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        shown = [row for row in rows if row["method"] == method and row["seed"] == rows[0]["seed"]]
        rounds, simulated, sent = (
            [float(row[name]) for row in shown] for name in ("round", "elements_simulated", "elements_sent")
        )
        curve(elements, method, rounds, simulated, label=f"{method}, simulator")
        elements.plot(rounds, sent, ".", color="black", markersize=3)
        judged = [row for row in shown if "quality" in row]
        at, expected, found = (
            [float(row[name]) for row in judged] for name in ("round", "quality_simulated", "quality")
        )
        curve(quality, method, at, expected, label=f"{method}, simulator")
        points(quality, method, at, found, [0.0] * len(at), label=f"{method}, shards")
    elements.set(title="Points: through shards", xlabel="round", ylabel="elements sent by all workers", yscale="log")
    quality.set(title="Quality", xlabel="round", ylabel="accuracy in %")
    elements.legend()
    quality.legend()
    return figure


def oracles(rows: Sequence[Row]) -> list[Oracle]:
    """No parameter differs by a bit, in any round and worker, and no round sends another number of elements."""
    difference = max(float(row["difference"]) for row in rows)
    elements = max(abs(int(row["elements_sent"]) - int(row["elements_simulated"])) for row in rows)
    return [
        oracle("through_shards_difference", difference, expected=0, tolerance=0),
        oracle("through_shards_elements_difference", elements, expected=0, tolerance=0),
    ]


RECIPE: Final = Recipe(
    "through_shards", "arXiv:2108.00951, a deep run: the simulator against real shards", cells, run, draw, oracles
)
