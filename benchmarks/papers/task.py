"""What is trained in the deep recipes: a network on data that is dealt to workers, with the way it is trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.papers.recipe import Form

WORKERS = 8


@final
@dataclass(frozen=True)
class Plan:
    """How a task is trained, whatever is sent.

    Args:
        rounds: in all.
        rate: learning rate at its height; a short warm-up leads there, and it falls at the given fractions of the run.
        momentum: of SGD; 0 is none.
        nesterov: whether that is Nesterov's.
        weight_decay: on all parameters.
        adam: the two betas of Adam, which then takes the place of SGD.
        warm_up: the fraction of the run in which the rate climbs from a tenth.
        drops: the fractions of the run at which the rate is divided by ten.
    """

    rounds: int
    rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    adam: tuple[float, float] | None = None
    warm_up: float = 0.1
    drops: tuple[float, ...] = (0.6, 0.85)
    nesterov: bool = True

    def rate_at(self, step: int) -> float:
        """The learning rate of round ``step``."""
        done = step / self.rounds
        height = self.rate * 0.1 ** sum(done >= drop for drop in self.drops)
        return height * (0.1 + 0.9 * done / self.warm_up) if done < self.warm_up else height

    def optimizer(self) -> Callable[[list[Tensor]], Optimizer]:
        """What makes the optimizer for the parameters it is given; its rate is that of round 0."""
        if self.adam is not None:
            return partial(Adam, lr=self.rate_at(0), betas=self.adam)
        return partial(
            SGD,
            lr=self.rate_at(0),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )


class Flat:
    """A network whose parameters are views of one flat vector, and their gradients of another."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parameters = list(module.named_parameters())
        self.names = tuple(name for name, _ in parameters)
        self.shapes = tuple(tuple(parameter.shape) for _, parameter in parameters)
        self.point = torch.cat([parameter.detach().flatten() for _, parameter in parameters])
        self._gradient = torch.zeros_like(self.point)
        begin = 0
        for _, parameter in parameters:
            end = begin + parameter.numel()
            parameter.data = self.point[begin:end].view_as(parameter)
            parameter.grad = self._gradient[begin:end].view_as(parameter)
            begin = end

    def gradient(self, point: Tensor, loss: Callable[[nn.Module], Tensor]) -> Tensor:
        """The gradient of ``loss`` at ``point``, [numel] float32; the next call overwrites it."""
        self.point.copy_(point)
        self._gradient.zero_()
        self.module.train()
        loss(self.module).backward()  # type: ignore[no-untyped-call]
        return self._gradient

    def at(self, point: Tensor) -> nn.Module:
        """The network with the parameters ``point``, set to evaluate."""
        self.point.copy_(point)
        return self.module.eval()


class Task(ABC):
    """A network, its data, and how it is trained: the same for all methods of a seed.

    Attributes:
        quality_name: of the number that :meth:`quality` gives, with its unit.
        higher_is_better: whether more of it is better.
        network: the network at its start, which the seed decides.
    """

    quality_name: str
    higher_is_better: bool
    network: Flat

    @abstractmethod
    def __init__(self, seed: int) -> None:
        """Make the network and the order of the data."""

    @abstractmethod
    def plan(self, form: Form) -> Plan:
        """How it is trained."""

    @abstractmethod
    def gradient(self, worker: int, point: Tensor, step: int) -> Tensor:
        """The gradient of one worker's batch of round ``step`` at ``point``, [numel] float32."""

    @abstractmethod
    def quality(self, point: Tensor) -> float:
        """How good the network is at ``point``, on data it was not trained on."""
