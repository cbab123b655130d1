"""The simulator against the algorithms as the papers write them, and the identities that follow from them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD

from thresher.compression.accordion import Accordion
from thresher.compression.base import Compressor, Round
from thresher.compression.decayed_error_feedback import DecayedErrorFeedback
from thresher.compression.detached_error_feedback import DetachedErrorFeedback
from thresher.compression.dgc import DGC
from thresher.compression.ef21 import EF21
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.error_reset import ErrorReset
from thresher.compression.feedback import Feedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.momentum_correction import MomentumCorrection
from thresher.compression.no_feedback import NoFeedback
from thresher.compression.random_k import RandomK, UnbiasedRandomK
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError
from thresher.simulation import GradientOf, Placement, Simulator

NUMEL, WORKERS = 5, 4
compressors: st.SearchStrategy[Compressor] = st.sampled_from(
    [Identity(), HardThreshold(0.0), HardThreshold(3.0), HardThreshold(7.0), TopK(0.2), TopK(0.5), RandomK(0.4)]
)
masks = st.builds(RandomK, st.sampled_from([0.2, 0.4, 0.6, 1.0]), st.integers(0, 9))
# [rounds, WORKERS, NUMEL]: small integers, so that float32 sums and halves of them are exact
gradients = st.builds(
    lambda rounds, seed: torch.randint(
        -8, 9, (rounds, WORKERS, NUMEL), generator=torch.Generator().manual_seed(seed)
    ).float(),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
coefficients = st.floats(0.0, 1.0)
some_runs = settings(max_examples=25)

plain = partial(SGD, lr=0.5)
quadratics = torch.linspace(0.25, 1.0, WORKERS * NUMEL).view(WORKERS, NUMEL)
minima = torch.linspace(-2.0, 3.0, WORKERS * NUMEL).view(NUMEL, WORKERS).T.contiguous()


def played(sequence: Tensor) -> GradientOf:
    """A function whose gradients are fixed, wherever it is asked."""
    return lambda worker, _, step: sequence[step, worker]


def quadratic(worker: int, x: Tensor, _step: int) -> Tensor:
    """Each worker has a quadratic of its own: other curvatures, other minima."""
    return quadratics[worker].to(x.dtype) * (x - minima[worker].to(x.dtype))


def workers(make: Callable[[], Feedback]) -> list[Feedback]:
    return [make() for _ in range(WORKERS)]


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(dim=0)


@some_runs
@given(gradients, compressors)
def test_algorithm_1(sequence: Tensor, compressor: Compressor) -> None:
    """Update-placed, written out: p = e + γg; D = C_γ(p); e = p - D; x = x - mean D. Exact on integers and γ = 1/2."""
    feedbacks = workers(lambda: ErrorFeedback(compressor, NUMEL))
    history = Simulator(feedbacks, played(sequence), torch.zeros(NUMEL), plain, placement="update").run(len(sequence))
    x, errors = torch.zeros(NUMEL), torch.zeros(WORKERS, NUMEL)
    for step, done in enumerate(history):
        sent = []
        for worker in range(WORKERS):
            errors[worker] += 0.5 * sequence[step, worker]
            sent.append(compressor.compress(errors[worker], Round(step, scale=0.5)).densify().clone())
            errors[worker] -= sent[worker]
        x -= mean(sent)
        assert torch.equal(done.x, x)
        assert done.error == float(errors.square().sum()) / WORKERS
    assert all(torch.equal(feedback.residual, error) for feedback, error in zip(feedbacks, errors, strict=True))


@some_runs
@given(compressors, st.booleans())
def test_algorithm_2(compressor: Compressor, nesterov: bool) -> None:
    """Gradient-placed, written out: G = mean C(g + e); weight decay, momentum and step follow the mean."""
    make = partial(SGD, lr=0.25, momentum=0.5, nesterov=nesterov, weight_decay=0.125)
    history = Simulator(workers(lambda: ErrorFeedback(compressor, NUMEL)), quadratic, torch.zeros(NUMEL), make).run(5)
    x, m, errors = torch.zeros(NUMEL), torch.zeros(NUMEL), torch.zeros(WORKERS, NUMEL)
    for step, done in enumerate(history):
        sent = []
        for worker in range(WORKERS):
            errors[worker] += quadratic(worker, x, step)
            sent.append(compressor.compress(errors[worker], Round(step)).densify().clone())
            errors[worker] -= sent[worker]
        total = mean(sent) + 0.125 * x
        m = 0.5 * m + total
        x = x - 0.25 * (total + 0.5 * m if nesterov else m)
        torch.testing.assert_close(done.x, x, rtol=1e-5, atol=1e-5)


@some_runs
@given(gradients, compressors, coefficients)
def test_the_virtual_iterate_does_not_know_the_compressor(
    sequence: Tensor, compressor: Compressor, coefficient: float
) -> None:
    """Lemma 10 of arXiv:2108.00951: x - mean residual = x_0 - Σ γ · mean g, exact on integers and γ = 1/2."""
    start = torch.arange(float(NUMEL))
    methods: list[Callable[[], Feedback]] = [
        lambda: ErrorFeedback(compressor, NUMEL),
        lambda: DetachedErrorFeedback(HardThreshold(4.0), NUMEL, float(coefficient > 0.5)),
        lambda: ErrorReset(compressor, NUMEL, 2, TopK(0.5)),
    ]
    for make in methods:
        simulator = Simulator(workers(make), played(sequence), start, plain, placement="update")
        for step in range(len(sequence)):
            simulator.run(1)
            expected = start - 0.5 * sequence[: step + 1].mean(dim=1).sum(dim=0)
            assert torch.equal(simulator.virtual, expected)


@some_runs
@given(masks, coefficients, st.integers(1, 3))
def test_detached_error_feedback_line_by_line(mask: RandomK, coefficient: float, local_steps: int) -> None:
    """arXiv:2004.05298 with local momentum and ``period``; the shared mask does not depend on rounding."""
    eta, beta = 0.1, 0.9
    simulator = Simulator(
        workers(lambda: DetachedErrorFeedback(mask, NUMEL, coefficient)),
        quadratic,
        torch.zeros(NUMEL),
        partial(SGD, lr=eta, momentum=beta),
        placement="update",
        local_steps=local_steps,
    )
    x = torch.zeros(NUMEL, dtype=torch.float64)
    y, m, delta = (torch.zeros(WORKERS, NUMEL, dtype=torch.float64) for _ in range(3))
    for step, done in enumerate(simulator.run(8)):
        for _ in range(local_steps):
            for k in range(WORKERS):
                m[k] = beta * m[k] + quadratic(k, y[k], step)
                y[k] -= eta * m[k]
                delta[k] += eta * m[k]
        chosen = mask.compress(torch.zeros(NUMEL), Round(step)).indices
        x[chosen] -= delta[:, chosen].mean(dim=0)
        delta[:, chosen] = 0.0
        y = x - coefficient * delta
        torch.testing.assert_close(done.x.double(), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(simulator.points).double(), y, rtol=1e-4, atol=1e-4)


@some_runs
@given(compressors)
def test_coefficient_zero_is_error_feedback(compressor: Compressor) -> None:
    """With local momentum; to the bit."""
    makes: list[Callable[[], Feedback]] = [
        lambda: DetachedErrorFeedback(compressor, NUMEL, 0.0),
        lambda: ErrorFeedback(compressor, NUMEL),
    ]
    detached, attached = (
        Simulator(workers(make), quadratic, torch.ones(NUMEL), partial(SGD, lr=0.1, momentum=0.9), placement="update")
        for make in makes
    )
    for one, other in zip(detached.run(6), attached.run(6), strict=True):
        assert torch.equal(one.x, other.x)
        assert (one.error, one.elements) == (other.error, other.elements)


@some_runs
@given(masks)
def test_coefficient_one_is_saef(mask: RandomK) -> None:
    """Step-ahead error feedback: the whole residual is applied first, then the gradient is taken there."""
    simulator = Simulator(
        workers(lambda: DetachedErrorFeedback(mask, NUMEL, 1.0)),
        quadratic,
        torch.zeros(NUMEL),
        plain,
        placement="update",
    )
    x, e = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(WORKERS, NUMEL, dtype=torch.float64)
    for step, done in enumerate(simulator.run(8)):
        ahead = [x - e[k] for k in range(WORKERS)]
        p = torch.stack([e[k] + 0.5 * quadratic(k, ahead[k], step) for k in range(WORKERS)])
        sent = torch.zeros_like(p)
        chosen = mask.compress(torch.zeros(NUMEL), Round(step)).indices
        sent[:, chosen] = p[:, chosen]
        x, e = x - sent.mean(dim=0), p - sent
        torch.testing.assert_close(done.x.double(), x, rtol=1e-4, atol=1e-4)


@some_runs
@given(masks, masks, st.integers(1, 3))
def test_error_reset_as_its_paper_writes_it(reset: RandomK, update: RandomK, period: int) -> None:
    """CSER (arXiv:2007.13221): local models x_k, partial synchronisation, errors of the other sign."""
    simulator = Simulator(
        workers(lambda: ErrorReset(reset, NUMEL, period, update)),
        quadratic,
        torch.zeros(NUMEL),
        plain,
        placement="update",
    )
    x, e = (torch.zeros(WORKERS, NUMEL, dtype=torch.float64) for _ in range(2))

    def synchronised(v: Tensor, mask: RandomK, step: int) -> tuple[Tensor, Tensor]:
        chosen, rest = mask.compress(torch.zeros(NUMEL), Round(step)).indices, v.clone()
        rest[:, chosen] = 0.0
        return (v - rest).mean(dim=0) + rest, rest

    for step in range(7):
        moved = torch.stack([0.5 * quadratic(k, x[k], step) for k in range(WORKERS)])
        applied, rest = synchronised(moved, update, step)
        x, e = x - applied, e - rest
        if (step + 1) % period == 0:
            together, rest = synchronised(e, reset, step)
            x, e = x + together - e, rest
        simulator.run(1)
        torch.testing.assert_close(torch.stack(simulator.points).double(), x, rtol=1e-4, atol=1e-4)


@given(st.floats(0.0, 0.9), coefficients)
@some_runs
def test_sending_everything_is_distributed_momentum_sgd(momentum: float, coefficient: float) -> None:
    """No error, all models equal, whatever the method and the placement; up to where the momentum is rounded."""
    makes: list[tuple[Callable[[], Feedback], dict[str, Any]]] = [
        (lambda: ErrorFeedback(Identity(), NUMEL), {"optimizer": partial(SGD, lr=0.1, momentum=momentum)}),
        (lambda: MomentumCorrection(Identity(), NUMEL, momentum, masking=False), {"optimizer": partial(SGD, lr=0.1)}),
        (
            lambda: DetachedErrorFeedback(Identity(), NUMEL, coefficient),
            {"optimizer": partial(SGD, lr=0.1, momentum=momentum), "placement": "update"},
        ),
        (
            lambda: ErrorReset(Identity(), NUMEL),
            {"optimizer": partial(SGD, lr=0.1, momentum=momentum), "placement": "update"},
        ),
        (lambda: EF21(Identity(), NUMEL), {"optimizer": partial(SGD, lr=0.1, momentum=momentum)}),
    ]
    reference = torch.zeros(NUMEL)
    optimizer = SGD([reference], lr=0.1, momentum=momentum)
    for step in range(6):
        reference.grad = mean([quadratic(worker, reference, step) for worker in range(WORKERS)])
        optimizer.step()
    for make, how in makes:
        simulator = Simulator(workers(make), quadratic, torch.zeros(NUMEL), **how)
        assert all(done.error == 0.0 and done.density == 1.0 for done in simulator.run(6))
        torch.testing.assert_close(simulator.synced, reference, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(point, simulator.synced) for point in simulator.points)


@some_runs
@given(masks, coefficients)
def test_a_coordinate_that_was_sent_is_where_the_virtual_iterate_is(mask: RandomK, coefficient: float) -> None:
    """With a mask that all share: no residual there, x equal to the virtual iterate; elsewhere x has not moved."""
    feedbacks = workers(lambda: DetachedErrorFeedback(mask, NUMEL, coefficient))
    simulator = Simulator(feedbacks, quadratic, torch.zeros(NUMEL), plain, placement="update")
    for step in range(6):
        before = simulator.synced
        simulator.run(1)
        chosen = torch.zeros(NUMEL, dtype=torch.bool)
        chosen[mask.compress(torch.zeros(NUMEL), Round(step)).indices] = True
        assert all(not feedback.residual[chosen].any() for feedback in feedbacks)
        assert torch.equal(simulator.synced[chosen], simulator.virtual[chosen])
        assert torch.equal(simulator.synced[~chosen], before[~chosen])


@some_runs
@given(compressors, coefficients)
def test_models_are_detached_by_their_own_residual(compressor: Compressor, coefficient: float) -> None:
    """At x - c·e; hence the mean square distance from the virtual iterate is c²V + (1 - c)²S (arXiv:2004.05298)."""
    feedbacks = workers(lambda: DetachedErrorFeedback(compressor, NUMEL, coefficient))
    simulator = Simulator(feedbacks, quadratic, torch.zeros(NUMEL), plain, placement="update")
    simulator.run(4)
    residuals = [feedback.residual.double() for feedback in feedbacks]
    for point, residual in zip(simulator.points, residuals, strict=True):
        torch.testing.assert_close(point, simulator.synced - coefficient * residual.float())
    middle = mean(residuals)
    variance = sum(float((residual - middle).square().sum()) for residual in residuals) / WORKERS
    second = float(middle.square().sum())
    virtual = simulator.virtual.double()
    found = sum(float((virtual - point.double()).square().sum()) for point in simulator.points) / WORKERS
    assert found == pytest.approx(coefficient**2 * variance + (1 - coefficient) ** 2 * second, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 0.3, 1.0])
def test_what_happens_between_two_sends(coefficient: float) -> None:
    """On x²/2 with step s, when a coordinate is sent after J steps: x → x · (1 - (1 - (1 - cs)ᴶ) / c), or x(1 - Js)."""
    s, numel = 0.2, 512
    feedback = DetachedErrorFeedback(RandomK(1 / 8, seed=1), numel, coefficient)
    simulator = Simulator(
        [feedback], lambda _worker, x, _step: x, torch.ones(numel), partial(SGD, lr=s), placement="update"
    )
    waiting = torch.ones(numel, dtype=torch.bool)
    for j in range(1, 30):
        simulator.run(1)
        sent = waiting & (feedback.residual == 0)
        factor = 1 - j * s if coefficient == 0 else 1 - (1 - (1 - coefficient * s) ** j) / coefficient
        torch.testing.assert_close(simulator.synced[sent], torch.full((int(sent.sum()),), factor), rtol=1e-4, atol=1e-4)
        waiting &= ~sent
    assert waiting.sum() < numel / 16


@pytest.mark.parametrize(
    ("coefficient", "step_size", "stable"),
    [
        (0.0, 0.7, True),  # in units of the limit of plain error feedback
        (0.0, 1.4, False),
        (0.3, 1.4, True),
        (1.0, 1.4, True),
    ],
)
def test_detaching_allows_larger_steps(coefficient: float, step_size: float, stable: bool) -> None:
    """On x²/2, sent with probability p: error feedback is stable iff s < 2p / (2 - p), detached beyond that."""
    p, numel = 1 / 4, 4096
    s = step_size * 2 * p / (2 - p)
    simulator = Simulator(
        [DetachedErrorFeedback(RandomK(p), numel, coefficient)],
        lambda _worker, x, _step: x,
        torch.ones(numel),
        partial(SGD, lr=s),
        placement="update",
    )
    simulator.run(40)
    assert (float(simulator.synced.square().mean()) < 1.0) == stable


def test_threshold_follows_the_learning_rate() -> None:
    """C_γ: every residual stays below γλ, also after the rate has been lowered, and old residuals keep their size."""
    feedbacks = workers(lambda: ErrorFeedback(HardThreshold(0.5), NUMEL))
    simulator = Simulator(feedbacks, quadratic, torch.zeros(NUMEL), partial(SGD, lr=0.5), placement="update")
    for rate in [0.5, 0.5, 0.5, 0.05, 0.05]:
        for optimizer in simulator.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        simulator.run(1)
        assert all(float(feedback.residual.abs().max()) < rate * 0.5 for feedback in feedbacks)


@some_runs
@given(gradients, compressors)
def test_the_server_of_ef21_knows_the_mean_estimate(sequence: Tensor, compressor: Compressor) -> None:
    """After every round, exact on integers: server memory = mean of the workers' memories; x moves along it."""
    feedbacks = [EF21(compressor, NUMEL) for _ in range(WORKERS)]
    simulator = Simulator(feedbacks, played(sequence), torch.zeros(NUMEL), plain)
    x = torch.zeros(NUMEL)
    for _ in sequence:
        simulator.run(1)
        assert simulator.memory is not None
        assert torch.equal(simulator.memory, mean([feedback.estimate for feedback in feedbacks]))
        x = x - 0.5 * simulator.memory
        assert torch.equal(simulator.synced, x)


def test_memory_converges_where_compression_alone_diverges() -> None:
    """Three quadratics ⟨a_i, x⟩² + ‖x‖²/4 of arXiv:2002.12410, on which Top-1 points every worker the wrong way."""
    directions = torch.tensor([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])

    def gradient(worker: int, x: Tensor, _step: int) -> Tensor:
        return 2 * torch.dot(directions[worker], x) * directions[worker] + x / 2

    def end(make: Callable[[], Feedback]) -> float:
        simulator = Simulator([make() for _ in range(3)], gradient, torch.ones(3), partial(SGD, lr=0.02))
        return float(simulator.run(200)[-1].x.norm())

    assert end(lambda: NoFeedback(TopK(1 / 3), 3)) > 1e3
    assert end(lambda: EF21(TopK(1 / 3), 3)) < 0.1
    assert end(lambda: ErrorFeedback(TopK(1 / 3), 3)) < 0.1


LAYERED = [(3, 1), (2,)]
GRADIENT_PLACED: list[Callable[[], Feedback]] = [
    lambda: ErrorFeedback(TopK(0.4), NUMEL),
    lambda: NoFeedback(UnbiasedRandomK(0.4), NUMEL),
    lambda: MomentumCorrection(TopK(0.4), NUMEL, 0.5),
    lambda: DGC(LAYERED, 0.4, 0.5, warm_up_epochs=2, steps_per_epoch=10),
    lambda: Accordion(TopK(0.2), TopK(0.6), LAYERED, steps_per_epoch=5, every_epochs=2),
    lambda: EF21(TopK(0.4), NUMEL),
]
UPDATE_PLACED: list[Callable[[], Feedback]] = [
    lambda: ErrorFeedback(HardThreshold(2.0), NUMEL),
    lambda: DetachedErrorFeedback(RandomK(0.4), NUMEL),
    lambda: DecayedErrorFeedback(TopK(0.4), NUMEL, 0.95),
    lambda: ErrorReset(RandomK(0.4), NUMEL, 2),
    lambda: Accordion(TopK(0.2), TopK(0.6), LAYERED, steps_per_epoch=5, every_epochs=2),
]


@pytest.mark.parametrize(
    ("make", "placement"),
    [(make, "gradient") for make in GRADIENT_PLACED] + [(make, "update") for make in UPDATE_PLACED],
    ids=lambda value: value if isinstance(value, str) else value().describe(),
)
def test_every_method_comes_close_to_the_minimum(make: Callable[[], Feedback], placement: Placement) -> None:
    """On quadratics that differ among the workers: from 10 away to within 1 of their common minimum."""
    minimum = (quadratics * minima).sum(dim=0) / quadratics.sum(dim=0)
    simulator = Simulator(
        workers(make), quadratic, minimum + 10 / NUMEL**0.5, partial(SGD, lr=0.1), placement=placement
    )
    history = simulator.run(120)
    assert float((history[0].x - minimum).norm()) > 8.0
    assert float((history[-1].x - minimum).norm()) < 1.0


def test_local_steps_end_at_the_mean_of_the_local_models() -> None:
    """Local SGD: with everything sent, x is the mean of what each worker would have become alone."""
    simulator = Simulator(
        workers(lambda: ErrorFeedback(Identity(), NUMEL)),
        quadratic,
        torch.zeros(NUMEL),
        plain,
        placement="update",
        local_steps=4,
    )
    simulator.run(1)
    models = []
    for worker in range(WORKERS):
        model = torch.zeros(NUMEL)
        for step in range(4):
            model = model - 0.5 * quadratic(worker, model, step)
        models.append(model)
    torch.testing.assert_close(simulator.synced, mean(models))


def test_local_steps_are_counted_through() -> None:
    """The gradient is asked for step 0, 1, 2, … of each worker, whatever the rounds."""
    asked = []

    def gradient(worker: int, x: Tensor, step: int) -> Tensor:
        asked.append((worker, step))
        return x

    feedbacks = [ErrorFeedback(Identity(), 1) for _ in range(2)]
    Simulator(feedbacks, gradient, torch.ones(1), plain, placement="update", local_steps=2).run(2)
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_an_outer_optimizer_gets_the_mean_as_its_gradient() -> None:
    """DiLoCo's form: SGD with rate 1 is subtraction, and Nesterov momentum is torch's."""
    outers: list[Callable[[list[Tensor]], torch.optim.Optimizer] | None] = [
        None,
        partial(SGD, lr=1.0),
        partial(SGD, lr=0.7, momentum=0.9, nesterov=True),
    ]
    ends = []
    for outer in outers:
        simulator = Simulator(
            workers(lambda: ErrorFeedback(Identity(), NUMEL)),
            quadratic,
            torch.zeros(NUMEL),
            plain,
            placement="update",
            outer=outer,
        )
        ends.append(simulator.run(3)[-1].x)
    assert torch.equal(ends[0], ends[1])
    x = torch.zeros(NUMEL)
    reference = SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(3):
        x.grad = mean([0.5 * quadratic(worker, x, step) for worker in range(WORKERS)])
        reference.step()
    torch.testing.assert_close(ends[2], x)


def test_a_threshold_of_the_run_may_change_in_between() -> None:
    steps = torch.tensor([[[3.0, 1.0]], [[0.0, 1.0]]])
    feedbacks = [ErrorFeedback(HardThreshold(), 2)]
    simulator = Simulator(feedbacks, played(steps), torch.zeros(2), plain, threshold=3.0)
    (first,) = simulator.run(1)
    simulator.threshold = 2.0
    (second,) = simulator.run(1)
    assert [message.indices.tolist() for message in (*first.messages, *second.messages)] == [[0], [1]]


def test_a_threshold_of_the_run_is_scaled_where_updates_are_sent() -> None:
    """Algorithm 1: λ is in the unit of the gradient, and an update is the learning rate times as large."""
    feedbacks = [ErrorFeedback(HardThreshold(), 2)]
    sequence = torch.tensor([[[3.0, 1.0]]])
    simulator = Simulator(feedbacks, played(sequence), torch.zeros(2), plain, placement="update", threshold=2.0)
    (done,) = simulator.run(1)
    assert [message.values.tolist() for message in done.messages] == [[1.5]]


def test_the_history_counts_what_is_sent_and_what_is_kept() -> None:
    """Elements of all workers together, their share of all, and the mean square norm of the residuals."""
    sequence = torch.tensor([[[3.0, 1.0], [0.5, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    feedbacks = [ErrorFeedback(HardThreshold(2.0), 2) for _ in range(2)]
    history = Simulator(feedbacks, played(sequence), torch.zeros(2), plain).run(2)
    assert [(done.step, done.elements, done.density, done.error) for done in history] == [
        (0, 1, 0.25, (1.0 + 1.25) / 2),
        (1, 2, 0.5, 0.25 / 2),
    ]


@some_runs
@given(compressors)
def test_a_run_in_two_parts_is_the_same_run(compressor: Compressor) -> None:
    """It goes on where it was, to the bit, and what it has returned does not change."""
    whole, parts = (
        Simulator(
            workers(lambda: ErrorFeedback(compressor, NUMEL)),
            quadratic,
            torch.zeros(NUMEL),
            partial(SGD, lr=0.1, momentum=0.9),
        )
        for _ in range(2)
    )
    history = whole.run(6)
    again = parts.run(2) + parts.run(4)
    assert [done.step for done in again] == list(range(6))
    assert all(torch.equal(one.x, other.x) for one, other in zip(history, again, strict=True))


def test_a_gradient_may_be_the_point_itself() -> None:
    """The gradient of ‖x‖²/2 is x: what is given back is not written to, and neither is the start."""
    start = torch.ones(2)
    for placement in ("gradient", "update"):
        simulator = Simulator(
            [ErrorFeedback(Identity(), 2)], lambda _worker, x, _step: x, start, plain, placement=placement
        )
        assert simulator.run(2)[-1].x.tolist() == [0.25, 0.25]
    assert start.tolist() == [1.0, 1.0]


def error_feedbacks(count: int = 2, numel: int = 2) -> list[Feedback]:
    return [ErrorFeedback(TopK(0.5), numel) for _ in range(count)]


SHARED = ErrorFeedback(TopK(0.5), 2)


@pytest.mark.parametrize(
    ("feedbacks", "how", "message"),
    [
        ([], {}, "at least one worker's feedback"),
        ([SHARED, SHARED], {}, "make a feedback for each"),
        ([*error_feedbacks(1), EF21(TopK(0.5), 2)], {}, r"one method, not EF21\(.*\) and ErrorFeedback\("),
        (error_feedbacks(2, 3), {}, r"ErrorFeedback\(TopK\(0.5\)\) is for numel 3, x has 2"),
        (error_feedbacks(), {"placement": "hook"}, "placement must be one of gradient, update, not 'hook'"),
        (error_feedbacks(), {"local_steps": 2}, "set placement='update'"),
        (error_feedbacks(), {"outer": plain}, "set placement='update'"),
        (error_feedbacks(), {"placement": "update", "local_steps": 0}, "at least one local step, not 0"),
        ([DetachedErrorFeedback(TopK(0.5), 2)], {}, r"Detached.* runs in simulator, update, not gradient-placed"),
        (
            [MomentumCorrection(TopK(0.5), 2)],
            {"placement": "update"},
            r"MomentumCorrection\(.* runs in gradient, hook, simulator, not update-placed",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(feedbacks: list[Feedback], how: dict[str, Any], message: str) -> None:
    """Each says what is wrong with it."""
    with pytest.raises(ConfigurationError, match=message):
        Simulator(feedbacks, quadratic, torch.zeros(2), plain, **how)


def test_a_start_that_is_no_vector_is_refused() -> None:
    """Flat and float32, as all vectors."""
    with pytest.raises(ConfigurationError, match="one-dimensional float32"):
        Simulator(error_feedbacks(), quadratic, torch.zeros(2, dtype=torch.float64), plain)


def test_updates_need_a_learning_rate() -> None:
    """Thresholds are in the unit of the gradient, and a step of size 0 has none."""
    simulator = Simulator(
        error_feedbacks(), lambda _w, x, _s: x, torch.zeros(2), partial(SGD, lr=0.0), placement="update"
    )
    with pytest.raises(ConfigurationError, match="which must be above 0"):
        simulator.run(1)


@pytest.mark.parametrize(
    ("feedbacks", "how"),
    [
        (error_feedbacks(), {}),
        (error_feedbacks(), {"placement": "update", "outer": plain}),
        ([EF21(TopK(0.5), 2)], {"placement": "update"}),
    ],
)
def test_the_virtual_iterate_is_refused_where_residuals_mean_something_else(
    feedbacks: list[Feedback], how: dict[str, Any]
) -> None:
    """Gradients, the input of an outer optimizer, and differences of EF21 can't be taken from x."""
    simulator = Simulator(feedbacks, quadratic, torch.zeros(2), plain, **how)
    with pytest.raises(ConfigurationError, match="x - mean residual means something only"):
        _ = simulator.virtual
