"""The exchange inside ``optimizer.step()``, by torch's own hooks: nothing is patched, nothing subclassed."""

from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from torch import Tensor

from thresher.protos.errors import ProtocolError
from thresher.worker.parameters import ModelParameters


class Stepping(Protocol):
    """What happens in a step."""

    def __call__(self, *, skip: bool, inverse_scale: float) -> None:
        """Exchange the model's gradients times ``inverse_scale``; or say that there are none, and ``skip``."""
        ...


@final
class StepHooks:
    """Puts a step into a user's optimizer, whose own arithmetic then finds nothing left to do.

    Args:
        optimizer: The user's.
        model: Whose gradients are hidden from it.
        step: What happens instead.
        publish_state: Called before the optimizer's ``state_dict()`` is made.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: ModelParameters,
        step: Stepping,
        publish_state: Callable[[], None],
    ) -> None:
        """Begin to take part in its steps."""
        self._model, self._step, self._publish_state = model, step, publish_state
        self._hidden: list[Tensor | None] = []
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_pre_hook(self._before_state_dict)
        optimizer.register_load_state_dict_pre_hook(self._before_load_state_dict)
        # GradScaler then calls step() even on overflow and says so, as it does for fused optimizers. An overflow on one
        # worker only must still be heard by the others.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # noqa: SLF001 - its only switch

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Exchange; then hide the gradients, so that the user's optimizer itself finds nothing left to do."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        skip, inverse_scale = _taken_from_scaler(optimizer)
        self._step(skip=skip, inverse_scale=inverse_scale)
        self._hidden = self._model.hide_gradients()
        return ((optimizer, lambda: loss), {}) if closure is not None else None

    def _after_step(self, *_: Any) -> None:
        self._model.restore_gradients(self._hidden)
        self._hidden = []

    def _before_state_dict(self, *_: Any) -> None:
        self._publish_state()

    def _before_load_state_dict(self, *_: Any) -> None:
        raise ProtocolError(
            "the optimizer's state lives at the shards now; load a state_dict before the optimizer is wrapped, "
            "and rank 0's seeds the shards"
        )


def _taken_from_scaler(optimizer: torch.optim.Optimizer) -> tuple[bool, float]:
    """Return what a GradScaler left on the optimizer: is this step to be skipped, and what unscales its gradients?

    Both are taken off, or the optimizer itself would use them; the scaler deletes the attributes, so they stay.
    """
    overflow, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if overflow is not None:
        optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]
    return overflow is not None and bool(overflow), 1.0 if scale is None else 1.0 / float(scale)
