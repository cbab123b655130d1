"""The plan of a training, and the network in one vector."""

import torch
from torch import nn
from torch.optim import SGD, Adam

from benchmarks.papers.task import Flat, Plan


def test_rate_climbs_stays_and_falls() -> None:
    plan = Plan(rounds=100, rate=2.0, warm_up=0.1, drops=(0.6, 0.85))
    rates = [plan.rate_at(step) for step in (0, 5, 10, 59, 60, 84, 85, 99)]
    torch.testing.assert_close(rates, [0.2, 1.1, 2.0, 2.0, 0.2, 0.2, 0.02, 0.02])


def test_rate_without_drops_stays() -> None:
    assert Plan(rounds=10, rate=0.5, drops=()).rate_at(9) == 0.5


def test_optimizer_is_the_one_of_the_plan() -> None:
    parameter = torch.zeros(3)
    plain = Plan(rounds=10, rate=1.0).optimizer()([parameter])
    assert isinstance(plain, SGD)
    assert (plain.defaults["lr"], plain.defaults["momentum"], plain.defaults["nesterov"]) == (0.1, 0.0, False)
    heavy = Plan(rounds=10, rate=1.0, momentum=0.9, weight_decay=1e-4).optimizer()([parameter])
    assert (heavy.defaults["momentum"], heavy.defaults["nesterov"]) == (0.9, True)
    adam = Plan(rounds=10, rate=1.0, adam=(0.25, 0.5)).optimizer()([parameter])
    assert isinstance(adam, Adam)
    assert adam.defaults["betas"] == (0.25, 0.5)


def test_flat_gradient_is_that_of_each_parameter() -> None:
    flat = Flat(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    assert flat.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert flat.shapes == ((2, 3), (2,), (2,), (2,))
    point = torch.arange(12.0)
    gradient = flat.gradient(
        point, lambda network: sum((p.square().sum() for p in network.parameters()), torch.zeros(())) / 2
    )
    assert torch.equal(gradient, point)
    again = flat.gradient(2 * point, lambda network: next(network.parameters()).sum())
    assert torch.equal(again, torch.tensor([1.0] * 6 + [0.0] * 6))
    assert torch.equal(point, torch.arange(12.0))


def test_flat_evaluates_at_the_point_it_is_given() -> None:
    flat = Flat(nn.Linear(2, 1, bias=False))
    network = flat.at(torch.tensor([2.0, 3.0]))
    assert not network.training
    assert network(torch.tensor([10.0, 1.0])).tolist() == [23.0]
