"""Workers and a server in one process: the algorithms of the papers, line by line, on a function of one's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from thresher.compression.base import Round, check_flat
from thresher.compression.ef21 import EF21
from thresher.compression.feedback import Feedback
from thresher.protos.errors import ConfigurationError
from thresher.protos.mean import mean_of
from thresher.protos.sparse import SparseGradient

GradientOf = Callable[[int, Tensor, int], Tensor]
"""(worker, point [numel] float32, local step) → that worker's gradient at the point, [numel] float32."""

OptimizerOf = Callable[[list[Tensor]], Optimizer]
"""Makes a torch optimizer for the parameters it is given, such as ``partial(SGD, lr=0.1, momentum=0.9)``."""

Placement = Literal["gradient", "update"]


@final
@dataclass(frozen=True, eq=False, slots=True)
class SimulatedRound:
    """What one round did.

    Args:
        step: number of the round.
        x: [numel] float32, the parameters that all workers share, after the round.
        error: (1/n) Σ ‖residual of worker i‖² after the round. The total error of a run is the sum over its rounds.
        elements: coordinates sent, by all workers together.
        density: the same as a fraction of n · numel.
        messages: what each worker has sent.

    References:
        arXiv:2108.00951, section 4, for the total error.
    """

    step: int
    x: Tensor
    error: float
    elements: int
    density: float
    messages: tuple[SparseGradient, ...]


@final
class Simulator:
    """n workers, each with its own feedback, and a server that applies the mean of what they send.

    ``gradient``-placed (arXiv:2108.00951, Algorithms 2 and 3), each worker sends its gradient at x through its
    feedback, and the server's optimizer gets the mean.

    ``update``-placed (Algorithm 1; DEF, arXiv:2004.05298; local SGD), each worker runs the optimizer on a point of its
    own for ``local_steps`` steps and sends how far it moved; the server subtracts the mean from x, or hands it to the
    ``outer`` optimizer as a gradient; each worker's point begins anew at x - c · residual, with c the feedback's
    ``detached``. The scale of a round is the optimizer's learning rate.

    Where the feedback is :class:`~thresher.compression.EF21`, the server adds the mean to its memory, and that is what
    moves x.

    It can go on: :meth:`run` continues where the last one ended, and :attr:`optimizers` and :attr:`threshold` may be
    changed in between.

    Args:
        feedbacks: one for each worker, made alike.
        gradient: the function to minimise, by its gradients. The point it gets must not be written to.
        start: [numel] float32, on the CPU: the first x.
        optimizer: the server's, or a copy of it for each worker if update-placed.
        placement: what is sent: gradients or finished updates.
        local_steps: steps of each worker in a round, if update-placed.
        outer: what the server runs if update-placed. None: it subtracts the mean.
        threshold: the run's λ in the unit of the gradient, for a hard threshold that has none of its own.

    Raises:
        ConfigurationError: feedbacks differ, don't fit ``start`` or don't run in this placement, or a setting has no
            meaning in it.

    References:
        arXiv:2108.00951, arXiv:2004.05298, arXiv:2106.05203 (EF21).

    Examples:
        >>> from functools import partial
        >>> from thresher.compression import ErrorFeedback, TopK
        >>> feedbacks = [ErrorFeedback(TopK(0.5), numel=2) for _ in range(3)]
        >>> simulator = Simulator(feedbacks, lambda worker, x, step: 2 * x, torch.ones(2), partial(SGD, lr=0.25))
        >>> [done.x.tolist() for done in simulator.run(2)]
        [[0.5, 1.0], [0.5, 0.0]]
    """

    def __init__(
        self,
        feedbacks: Sequence[Feedback],
        gradient: GradientOf,
        start: Tensor,
        optimizer: OptimizerOf,
        *,
        placement: Placement = "gradient",
        local_steps: int = 1,
        outer: OptimizerOf | None = None,
        threshold: float | None = None,
    ) -> None:
        _check_feedbacks(feedbacks, start, placement)
        if local_steps < 1:
            raise ConfigurationError(f"a round has at least one local step, not {local_steps}")
        if placement == "gradient" and (local_steps > 1 or outer is not None):
            raise ConfigurationError(
                "local steps and an outer optimizer are for finished updates; set placement='update'"
            )
        self._feedbacks = tuple(feedbacks)
        self._gradient = gradient
        self._placement = placement
        self._local_steps = local_steps
        self._plain = outer is None
        self.threshold = threshold
        self._step = 0
        self._x = start.clone()
        self._points = tuple(start.clone() for _ in feedbacks)
        self._memory = torch.zeros_like(start) if isinstance(feedbacks[0], EF21) else None
        if placement == "gradient":
            self._server = optimizer([self._x])
            self.optimizers: tuple[Optimizer, ...] = (self._server,)
        else:
            self._server = outer([self._x]) if outer is not None else SGD([self._x], lr=1.0)
            self.optimizers = tuple(optimizer([point]) for point in self._points)

    @property
    def synced(self) -> Tensor:
        """x, which all workers share, [numel] float32; a copy."""
        return self._x.clone()

    @property
    def virtual(self) -> Tensor:
        """Where x would be if nothing had been held back: x - mean residual, [numel] float32.

        It is the other point at which a model can be evaluated (arXiv:2004.05298), and the iterate of Lemma 10 of
        arXiv:2108.00951.

        Raises:
            ConfigurationError: the residuals are not what x still lacks: gradient-placed, with an outer optimizer, or
                with EF21.
        """
        if self._placement == "gradient" or not self._plain or self._memory is not None:
            raise ConfigurationError(
                "x - mean residual means something only where x moves by the mean of what is sent: set "
                "placement='update', without an outer optimizer, and not EF21"
            )
        return self._x - torch.stack([feedback.residual for feedback in self._feedbacks]).mean(dim=0)

    @property
    def points(self) -> tuple[Tensor, ...]:
        """Where each worker takes its next gradient, [numel] float32 each; copies."""
        return tuple(point.clone() for point in self._points)

    @property
    def memory(self) -> Tensor | None:
        """What the server of EF21 believes the mean gradient to be, [numel] float32, a copy; None for others."""
        return None if self._memory is None else self._memory.clone()

    def run(self, rounds: int) -> list[SimulatedRound]:
        """Go on for that many rounds, and say what each did."""
        return [self._round() for _ in range(rounds)]

    def _round(self) -> SimulatedRound:
        send = self._sent_gradient if self._placement == "gradient" else self._sent_update
        messages = [send(worker) for worker in range(len(self._feedbacks))]
        mean = mean_of(messages, members=len(messages)).densify()
        if self._memory is not None:
            mean = self._memory.add_(mean).clone()
        self._x.grad = mean
        self._server.step()
        for point, feedback in zip(self._points, self._feedbacks, strict=True):
            torch.sub(self._x, feedback.residual, alpha=feedback.detached, out=point)
        self._step += 1
        return self._summary(messages)

    def _sent_gradient(self, worker: int) -> SparseGradient:
        gradient = self._gradient(worker, self._points[worker], self._step)
        rate = float(self._server.param_groups[0].get("lr", 1.0))
        here = Round(self._step, threshold=self.threshold, worker=worker, rate=rate)
        return self._feedbacks[worker].compress(gradient, here)

    def _sent_update(self, worker: int) -> SparseGradient:
        point, optimizer = self._points[worker], self.optimizers[worker]
        before = point.clone()
        for step in range(self._step * self._local_steps, (self._step + 1) * self._local_steps):
            point.grad = self._gradient(worker, point, step).clone()  # it may be the point itself
            optimizer.step()
        rate = _rate(optimizer)
        here = Round(self._step, threshold=self.threshold, scale=rate, worker=worker, rate=rate)
        return self._feedbacks[worker].compress(before.sub_(point), here)

    def _summary(self, messages: Sequence[SparseGradient]) -> SimulatedRound:
        squares = [float(feedback.residual.double().square().sum()) for feedback in self._feedbacks]
        elements = sum(message.count for message in messages)
        return SimulatedRound(
            step=self._step - 1,
            x=self._x.clone(),
            error=sum(squares) / len(squares),
            elements=elements,
            density=elements / max(1, len(messages) * self._x.numel()),
            messages=tuple(messages),
        )


def _check_feedbacks(feedbacks: Sequence[Feedback], start: Tensor, placement: Placement) -> None:
    check_flat(start)
    if placement not in get_args(Placement):
        raise ConfigurationError(f"placement must be one of {', '.join(get_args(Placement))}, not {placement!r}")
    if not feedbacks:
        raise ConfigurationError("a simulation needs at least one worker's feedback")
    methods = sorted({feedback.describe() for feedback in feedbacks})
    if len(methods) > 1:
        raise ConfigurationError(f"all workers of a run follow one method, not {' and '.join(methods)}")
    if len({id(feedback) for feedback in feedbacks}) < len(feedbacks):
        raise ConfigurationError("each worker has a memory of its own: make a feedback for each")
    for feedback in feedbacks:
        if feedback.residual.numel() != start.numel():
            raise ConfigurationError(f"{methods[0]} is for numel {feedback.residual.numel()}, x has {start.numel()}")
        if feedback.runs_in != {"simulator"} and not {"simulator", placement} <= feedback.runs_in:
            raise ConfigurationError(
                f"{methods[0]} runs in {', '.join(sorted(feedback.runs_in))}, not {placement}-placed in the simulator"
            )


def _rate(optimizer: Optimizer) -> float:
    """The learning rate, which is the unit of its updates in units of gradients."""
    rate = float(optimizer.param_groups[0].get("lr", 0.0))
    if not rate > 0.0:
        raise ConfigurationError(
            f"updates are scaled by the optimizer's learning rate, which must be above 0, not {rate}"
        )
    return rate
