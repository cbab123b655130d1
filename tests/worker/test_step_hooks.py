"""Hooks in an optimizer's step: what the exchange is told, and what the optimizer itself still sees."""

from typing import Any

import pytest
import torch
from tests.worker.training import Scale, set_gradients, sgd

from thresher.protos.errors import ProtocolError
from thresher.worker.parameters import ModelParameters
from thresher.worker.step_hooks import StepHooks


def test_a_step_is_the_exchange_and_nothing_else() -> None:
    """Overflow and scale of a GradScaler are handed on; parameters stay, gradients come back, states are published."""
    model, steps, published = Scale(), [], []
    optimizer = sgd(model)

    def step(**arguments: Any) -> None:
        steps.append(arguments)

    StepHooks(optimizer, ModelParameters(model, optimizer), step, lambda: published.append(True))
    set_gradients(model, 1.0)
    optimizer.step()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert steps == [{"skip": False, "inverse_scale": 1.0}, {"skip": True, "inverse_scale": 0.25}]
    assert torch.equal(model.weight, torch.ones(2))
    assert model.weight.grad is not None
    state = optimizer.state_dict()
    assert published == [True]
    with pytest.raises(ProtocolError, match="before the optimizer is wrapped"):
        optimizer.load_state_dict(state)
