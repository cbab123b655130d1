"""The laws, end to end: real sessions, real gRPC on loopback, shards on a thread of their own.

The yardstick is one process that adds the workers' messages in rank order, divides by their number, and lets the
user's own torch optimizer step on the parameters in the shapes they have.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.compression import Compressor, ErrorFeedback, HardThreshold, Identity, TopK
from thresher.deploy.in_process import InProcess, in_process
from thresher.worker import Method, Session
from thresher.worker.calls import ShardCalls

BATCH = 4
FEATURES = 6
CLASSES = 3

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Equal bits are promised for an equal number of threads; a convolution's gradient depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": 0.05, "momentum": 0.5},
        {"params": [first], "weight_decay": 0.1},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def nothing(model: nn.Module) -> None:
    """Leave the gradients as they are."""


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def no_schedule(optimizer: torch.optim.Optimizer) -> None:
    return None


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Moves the momentum too."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12)


@dataclass(frozen=True)
class Job:
    """What a script does, for the distributed run and for the yardstick."""

    model: Callable[[], nn.Module] = perceptron
    optimizer: OptimizerFactory = sgd
    schedule: Callable[[torch.optim.Optimizer], Any] = no_schedule
    before_step: Callable[[nn.Module], None] = nothing
    accumulate: int = 1
    workers: int = 3
    steps: int = 4

    def models(self) -> list[nn.Module]:
        """Return one model per rank, each with weights of its own: rank 0's must win. Not for threads."""
        models = []
        for rank in range(self.workers):
            with torch.random.fork_rng():
                torch.manual_seed(rank)
                models.append(self.model())
        return models

    def backward(self, model: nn.Module, rank: int, step: int) -> None:
        for part in range(self.accumulate):
            generator = torch.Generator().manual_seed(1000 * step + 10 * rank + part)
            inputs = torch.randn(BATCH, FEATURES, generator=generator)
            classes = torch.randint(CLASSES, (BATCH,), generator=generator)
            loss: Tensor = nn.functional.cross_entropy(model(inputs), classes)
            torch.autograd.backward(loss)
        self.before_step(model)


@dataclass(frozen=True)
class Outcome:
    """Parameters after each step, and what ``optimizer.state_dict()`` shows at the end."""

    history: list[list[Tensor]]
    optimizer: dict[str, Any]
    residual: Tensor

    def assert_same_bits(self, other: "Outcome") -> None:
        for step, (mine, yours) in enumerate(zip(self.history, other.history, strict=True)):
            assert all(same_bits(a, b) for a, b in zip(mine, yours, strict=True)), f"parameters after step {step}"
        assert self.optimizer["param_groups"] == other.optimizer["param_groups"]
        mine, yours = self.optimizer["state"], other.optimizer["state"]
        assert mine.keys() == yours.keys()
        for index, state in mine.items():
            assert state.keys() == yours[index].keys()
            assert all(same_bits(value, yours[index][key]) for key, value in state.items()), f"state of {index}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike `torch.equal`, tell -0.0 from 0.0."""
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def copied(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def yardstick(job: Job, compressors: Sequence[Compressor]) -> Outcome:
    """Train in one process."""
    models = job.models()
    master = job.models()[0]
    optimizer = job.optimizer(master)
    scheduler = job.schedule(optimizer)
    parameters = list(master.parameters())
    numel = sum(parameter.numel() for parameter in parameters)
    feedbacks = [ErrorFeedback(compressor, numel) for compressor in compressors]
    history = []
    for step in range(job.steps):
        total = torch.zeros(0)
        for rank, model in enumerate(models):
            for own, shared in zip(model.parameters(), parameters, strict=True):
                own.data.copy_(shared.data)
                own.grad = None
            job.backward(model, rank, step)
            gradient = torch.cat([own.grad.view(-1) for own in model.parameters() if own.grad is not None])
            sent = feedbacks[rank].compress(gradient).densify()
            total = sent.clone() if rank == 0 else total.add_(sent)
        parts = torch.split(total.div_(job.workers), [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view(parameter.shape)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        history.append(copied(master))
    return Outcome(history, optimizer.state_dict(), feedbacks[0].residual)


def distributed(job: Job, *, shards: int, method: Method) -> list[Outcome]:
    """Train on a parameter server; the laws that every run must keep are checked on the way."""
    models = job.models()

    def work(session: Session) -> Outcome:
        model = models[session.rank]
        optimizer = job.optimizer(model)
        scheduler = job.schedule(optimizer)
        session.wrap(model, optimizer)
        history = []
        for step in range(job.steps):
            job.backward(model, session.rank, step)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            history.append(copied(model))
        return Outcome(history, optimizer.state_dict(), session.residual.clone())

    with in_process(shards=shards, workers=job.workers, method=method) as cluster:
        outcomes = accounted(cluster, work)
    for outcome in outcomes[1:]:
        outcomes[0].assert_same_bits(outcome)
    return outcomes


def accounted(cluster: InProcess, work: Callable[[Session], Any]) -> list[Any]:
    """Run, and hold the workers' count of bytes and elements against the shards' (law 9)."""
    sessions: dict[int, Session] = {}

    def remembered(session: Session) -> Any:
        sessions[session.rank] = session
        return work(session)

    results = cluster.run(remembered)
    shards = cluster.statistics()
    for rank, session in sessions.items():
        mine = session.statistics()
        assert mine.push_bytes == tuple(shard.members[rank].push_bytes for shard in shards)
        assert mine.pull_bytes == tuple(shard.members[rank].pull_bytes for shard in shards)
        assert mine.pushed_elements == sum(shard.members[rank].pushed_elements for shard in shards)
    return results


OPTIMIZERS: dict[str, OptimizerFactory] = {
    "SGD": sgd,
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1),
    "Adam-amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
    "two groups": two_groups,
    "SGD-foreach": lambda model: torch.optim.SGD(model.parameters(), 0.1, 0.9, nesterov=True, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dense_run_is_one_process(name: str) -> None:
    """Law 5 for each optimizer: parameters after each step, and optimizer state, to the bit."""
    job = Job(optimizer=OPTIMIZERS[name])
    expected = yardstick(job, [Identity()] * job.workers)
    distributed(job, shards=2, method=Method(threshold=0.0))[0].assert_same_bits(expected)


@pytest.mark.parametrize(
    "job",
    [
        Job(schedule=cosine, steps=8),
        Job(schedule=one_cycle, optimizer=OPTIMIZERS["Adam"], steps=8),
        Job(schedule=cosine, optimizer=two_groups),
        Job(before_step=clip),
        Job(accumulate=3),
        Job(accumulate=2, before_step=clip, schedule=cosine, optimizer=OPTIMIZERS["AdamW"]),
        Job(model=convolutional, workers=4),
        Job(workers=1),
    ],
    ids=["schedule", "momentum-schedule", "groups", "clipping", "accumulation", "together", "convolution", "alone"],
)
def test_what_a_script_does_to_its_optimizer_is_kept(job: Job) -> None:
    """Law 5 with schedules, groups, clipping and accumulation."""
    expected = yardstick(job, [Identity()] * job.workers)
    distributed(job, shards=3, method=Method(threshold=0.0))[0].assert_same_bits(expected)


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("method", "compressor"),
    [
        (Method(threshold=0.05), HardThreshold(0.05)),
        (Method("TopK(0.1)"), TopK(0.1)),
        (Method("Identity"), Identity()),
    ],
    ids=["hard-threshold", "top-k", "identity"],
)
def test_any_number_of_shards_gives_the_same_bits(shards: int, method: Method, compressor: Compressor) -> None:
    """Laws 4 and 5: cutting the model changes nothing; sparse runs equal one process with error feedback."""
    job = Job(schedule=cosine)
    expected = yardstick(job, [compressor] * job.workers)
    outcome = distributed(job, shards=shards, method=method)[0]
    outcome.assert_same_bits(expected)
    assert torch.equal(outcome.residual, expected.residual)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_replicas_are_the_shards(shards: int, placement: Any) -> None:
    """Law 8: after every step, each worker's model is what the shards hold at that version, to the bit."""
    job = Job(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01))
    models = job.models()

    def work(session: Session) -> None:
        model = models[session.rank]
        optimizer = job.optimizer(model)
        session.wrap(model, optimizer)
        readers = [ShardCalls(shard, address, "a test") for shard, address in enumerate(cluster.addresses)]
        for step in range(job.steps):
            job.backward(model, session.rank, step)
            optimizer.step()
            optimizer.zero_grad()
            # Nobody's round can close before this worker pushes again, so the shards stay at this version.
            found = [reader.snapshot(wait_seconds=5.0) for reader in readers]
            assert {snapshot.version for snapshot in found} == {step + 1}
            flat = torch.cat([snapshot.state["parameters"] for snapshot in found])
            assert same_bits(flat, torch.cat([parameter.detach().view(-1) for parameter in model.parameters()]))
        for reader in readers:
            reader.close()

    with in_process(shards=shards, workers=job.workers, method=Method(threshold=0.02, placement=placement)) as cluster:
        accounted(cluster, work)


# Laws 1 to 3 on gradients that a test writes itself

SHAPES = ((2, 2), (3,), ())
NUMEL = 8
WORKERS = 4  # a power of two: the mean of integers is exact

integers = st.lists(st.integers(-9, 9), min_size=NUMEL, max_size=NUMEL).map(lambda found: torch.tensor(found).float())
rounds = st.lists(st.lists(integers, min_size=WORKERS, max_size=WORKERS), min_size=1, max_size=5)
methods = st.one_of(
    st.sampled_from([0.0, 1.0, 3.0, 8.0, 100.0]).map(lambda threshold: Method(threshold=threshold)),
    st.sampled_from([0.1, 0.5, 1.0]).map(lambda density: Method(f"TopK({density})")),
    st.sampled_from([0.2, 0.6]).map(lambda density: Method(f"LayerWise(TopK({density}))")),
    st.sampled_from([0.2, 0.6]).map(lambda density: Method(density=density)),
    st.just(Method(density=0.5, rule="paper")),
)


class Tensors(nn.Module):
    """Zeros of several shapes, whose gradients the test sets."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])

    def set_gradient(self, flat: Tensor) -> None:
        bounds = torch.tensor([0, *(parameter.numel() for parameter in self.tensors)]).cumsum(0).tolist()
        for parameter, (low, high) in zip(self.tensors, pairwise(bounds), strict=True):
            parameter.grad = flat[low:high].view(parameter.shape).clone()

    def flat(self) -> Tensor:
        return torch.cat([parameter.detach().view(-1) for parameter in self.tensors])


@dataclass(frozen=True)
class Trace:
    """What one worker saw: its parameters and its residual after each step."""

    parameters: list[Tensor]
    residuals: list[Tensor]
    thresholds: list[float | None]


def traced(
    gradients: Sequence[Sequence[Tensor]], method: Method, *, rates: Sequence[float] = (), shards: int = 2
) -> list[Trace]:
    """Push ``gradients[step][rank]`` through plain SGD with the rate of each step (1 by default)."""

    def work(session: Session) -> Trace:
        model = Tensors()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        session.wrap(model, optimizer)
        trace = Trace([], [], [])
        for step, messages in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = rates[step] if rates else 1.0
            model.set_gradient(messages[session.rank])
            optimizer.step()
            trace.parameters.append(model.flat())
            trace.residuals.append(session.residual.clone())
            trace.thresholds.append(session.statistics().threshold)
        return trace

    with in_process(shards=shards, workers=len(gradients[0]), method=method) as cluster:
        return accounted(cluster, work)


@settings(max_examples=12)
@given(rounds, methods)
def test_virtual_iterate(gradients: list[list[Tensor]], method: Method) -> None:
    """Law 2 after every step, exact on integers: Σ applied means + mean residual = Σ mean inputs."""
    traces = traced(gradients, method)
    inputs = torch.zeros(NUMEL)
    for step, messages in enumerate(gradients):
        inputs += torch.stack(messages).sum(dim=0) / WORKERS
        applied = -traces[0].parameters[step]
        residual = torch.stack([trace.residuals[step] for trace in traces]).sum(dim=0) / WORKERS
        assert torch.equal(applied + residual, inputs)


@settings(max_examples=12)
@given(rounds, methods)
def test_conservation_for_each_worker(gradients: list[list[Tensor]], method: Method) -> None:
    """Law 1, exact on integers: for each worker and coordinate Σ sent + residual = Σ input.

    Each coordinate is one worker's own, so that what was applied there is what this worker sent.
    """
    owner = torch.arange(NUMEL) % WORKERS
    own = [[message * (owner == rank) for rank, message in enumerate(messages)] for messages in gradients]
    traces = traced(own, method)
    sent = -traces[0].parameters[-1] * WORKERS
    for rank, trace in enumerate(traces):
        inputs = torch.stack([messages[rank] for messages in own]).sum(dim=0)
        assert torch.equal(sent * (owner == rank) + trace.residuals[-1], inputs)


@settings(max_examples=12)
@given(rounds, st.sampled_from([0.0, 0.5, 3.0]), st.data())
def test_virtual_iterate_of_updates(gradients: list[list[Tensor]], threshold: float, data: st.DataObject) -> None:
    """Law 2 for update-placed methods with any schedule, exact on dyadic numbers: x - mean residual = -Σ γ·mean g."""
    rates = [data.draw(st.sampled_from([1.0, 0.5, 0.125, 0.0])) for _ in gradients]
    traces = traced(gradients, Method(threshold=threshold, placement="update"), rates=rates)
    path = torch.zeros(NUMEL)
    for step, messages in enumerate(gradients):
        path -= rates[step] * torch.stack(messages).sum(dim=0) / WORKERS
        residual = torch.stack([trace.residuals[step] for trace in traces]).sum(dim=0) / WORKERS
        assert torch.equal(traces[0].parameters[step] - residual, path)


floats = st.lists(st.floats(-4, 4, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)


@settings(max_examples=12)
@given(
    st.lists(st.lists(floats, min_size=2, max_size=2), min_size=1, max_size=5),
    st.floats(2**-10, 4, width=32),
    st.sampled_from(["gradient", "update"]),
)
def test_what_is_kept_is_below_the_threshold(gradients: list[list[Tensor]], threshold: float, placement: Any) -> None:
    """Law 3 through the session: after each step every |residual| < λ, strictly (λ·γ in update units; γ = 1)."""
    for trace in traced(gradients, Method(threshold=threshold, placement=placement)):
        for residual in trace.residuals:
            assert bool((residual.abs() < threshold).all())


@settings(max_examples=8)
@given(rounds, st.sampled_from([0.1, 0.4]))
def test_one_threshold_for_all(gradients: list[list[Tensor]], density: float) -> None:
    """A λ found on the way is rank 0's: all workers hold the same, from its first gradient on that is not zero."""
    silent = next((step for step, messages in enumerate(gradients) if messages[0].any()), len(gradients))
    for rule in ("budget", "calibrated"):
        traces = traced(gradients, Method(density=density, rule=rule))
        assert all(trace.thresholds == traces[0].thresholds for trace in traces)
        assert None not in traces[0].thresholds[silent:]


@settings(max_examples=8)
@given(rounds)
def test_no_threshold_makes_both_placements_one(gradients: list[list[Tensor]]) -> None:
    """With λ = 0 and plain SGD it does not matter on which side the step size is multiplied, where that is exact."""
    rates = [0.5] * len(gradients)
    updates = traced(gradients, Method(threshold=0.0, placement="update"), rates=rates)
    plain = traced(gradients, Method(threshold=0.0), rates=rates)
    assert torch.equal(updates[0].parameters[-1], plain[0].parameters[-1])
