"""The user's model as one flat vector: gradients are gathered from it, replica parameters are copied into it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from thresher.protos.errors import LayoutError, NonFiniteGradientError
from thresher.protos.layout import Layout, Slice, TensorSpec
from thresher.protos.replica import PARAMETERS, state_name, whole_optimizer_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Presence


@final
class ModelParameters:
    """A model and its optimizer, laid out.

    Trained tensors are those that the optimizer holds and that require a gradient, in the order of
    ``model.named_parameters()``; a tied parameter counts once. Everything else in ``model.state_dict()`` is untrained.

    Raises:
        LayoutError: when nothing is left to train, or the optimizer holds a tensor that is not the model's.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Lay the model out as it is now; later changes of its structure are not seen."""
        self._model = model
        self._optimizer = optimizer
        groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        named = dict(model.named_parameters())
        unknown = len(set(groups) - {id(parameter) for parameter in named.values()})
        if unknown:
            raise LayoutError(f"the optimizer holds {unknown} tensors that are not parameters of the model")
        self._trained = {n: p for n, p in named.items() if id(p) in groups and p.requires_grad}
        aliases = self._aliases()
        _check_types(self._trained)
        self.layout = Layout(
            tuple(_spec(n, p, groups[id(p)], aliases.get(n, ())) for n, p in self._trained.items()),
            tuple(_spec(n, t, 0, aliases.get(n, ())) for n, t in self.untrained().items()),
        )
        self._gradient = torch.zeros(self.layout.numel)  # [numel] float32
        # Views of it with the shapes of the parameters.
        self._pieces = [
            self._gradient[low:high].view(parameter.shape)
            for parameter, (low, high) in zip(self._trained.values(), pairwise(self.layout.offsets), strict=True)
        ]

    def untrained(self, *, buffers_only: bool = False) -> dict[str, Tensor]:
        """Return the tensors that go with the model but are not trained, by name: frozen parameters and buffers."""
        left_out = self._model.parameters() if buffers_only else self._trained.values()
        ids = {id(parameter) for parameter in left_out}
        return {name: value.detach() for (name, *_), value in self._named_tensors() if id(value) not in ids}

    def gather(self, inverse_scale: float = 1.0) -> tuple[Tensor, Presence]:
        """Return the flat gradient [numel] float32, and for each trained tensor whether it has one.

        The vector is a buffer that the next call overwrites; a tensor without gradient is zero in it.

        Args:
            inverse_scale: What to multiply gradients by, for a loss scaler.

        Raises:
            LayoutError: when a tensor of the optimizer that was frozen at wrapping has a gradient now.
        """
        self._refuse_unfrozen()
        presence = tuple(parameter.grad is not None for parameter in self._trained.values())
        for parameter, piece in zip(self._trained.values(), self._pieces, strict=True):
            if parameter.grad is None:
                piece.zero_()
            else:
                piece.copy_(parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad)
        if inverse_scale != 1.0:
            self._gradient.mul_(inverse_scale)
        return self._gradient, presence

    def _refuse_unfrozen(self) -> None:
        """What the optimizer does not hold may have gradients: torch leaves it alone, and so do we."""
        trained = {id(parameter) for parameter in self._trained.values()}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in trained:
                    name = next((n for n, p in self._model.named_parameters() if p is parameter), "without a name")
                    raise LayoutError(
                        f"parameter {name} has a gradient, but was frozen or missing from the optimizer when the "
                        "optimizer was wrapped; unfreeze it and hand it to the optimizer before that"
                    )

    def check_finite(self, rank: int, step: int) -> None:
        """Look at what `gather` returned last.

        Raises:
            NonFiniteGradientError: naming worker, step and parameters, when there is NaN or infinity in it.
        """
        if bool(self._gradient.sum().isfinite()):  # NaN and infinity survive a sum, and a sum is cheap
            return
        bad = [
            f"{name} ({int((~piece.isfinite()).sum())} of {piece.numel()} elements)"
            for name, piece in zip(self._trained, self._pieces, strict=True)
            if not bool(piece.isfinite().all())
        ]
        if bad:
            raise NonFiniteGradientError(
                f"NaN or infinity in the gradient of worker {rank} at step {step}: {', '.join(bad)}; nothing was sent. "
                "Lower the learning rate, clip, use a GradScaler, or have such steps skipped (--nonfinite skip)"
            )

    def hide_gradients(self) -> list[Tensor | None]:
        """Take the gradients off the parameters, so that the user's optimizer finds nothing to do; return them."""
        hidden = [parameter.grad for parameter in self._trained.values()]
        for parameter in self._trained.values():
            parameter.grad = None
        return hidden

    def restore_gradients(self, hidden: Sequence[Tensor | None]) -> None:
        """Put back what `hide_gradients` returned."""
        for parameter, gradient in zip(self._trained.values(), hidden, strict=True):
            parameter.grad = gradient

    def heard(self, presence: Presence, sent: SparseGradient) -> Presence:
        """Return ``presence``, and True also for a tensor without gradient whose residual is sent now.

        A threshold of 0 sends zeros too; they are no residual.
        """
        if all(presence):
            return presence
        bounds = torch.searchsorted(sent.indices, torch.tensor(self.layout.offsets)).tolist()
        return tuple(
            present or bool(sent.values[low:high].any())
            for present, (low, high) in zip(presence, pairwise(bounds), strict=True)
        )

    @torch.no_grad()
    def assign(self, pieces: Sequence[tuple[Slice, Tensor]]) -> None:
        """Copy flat parameters, slice by slice, into the model, cast to its own types and devices."""
        targets = list(self._trained.values())
        for piece, values in pieces:
            for segment in piece.segments:
                part = values[segment.begin : segment.end]
                target = targets[segment.tensor]
                if part.numel() == target.numel():
                    target.copy_(part.view(target.shape))
                else:
                    _assign_part(target, segment.offset, part)

    def replace(self, pieces: Sequence[tuple[Slice, Tensor]]) -> list[str]:
        """Do as `assign` does, and return the names of the tensors whose values have changed."""
        before = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self.assign(pieces)
        return [name for name, parameter in self._trained.items() if not torch.equal(before[name], parameter)]

    @torch.no_grad()
    def assign_untrained(self, values: Mapping[str, Tensor]) -> None:
        """Copy untrained tensors into the model, as far as it has them."""
        mine = self.untrained()
        for name, value in values.items():
            if name in mine:
                mine[name].copy_(value)

    def _named_tensors(self) -> list[tuple[list[str], Tensor]]:
        """Return each tensor of the model's ``state_dict()`` once, with all its names: tied ones have several."""
        found: dict[int, tuple[list[str], Tensor]] = {}
        for name, value in self._model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor):
                found.setdefault(id(value), ([], value))[0].append(name)
        return list(found.values())

    def _aliases(self) -> dict[str, tuple[str, ...]]:
        """Return the further names of tied tensors, by their first."""
        return {name: tuple(others) for (name, *others), _ in self._named_tensors() if others}

    def state(self, piece: Slice) -> dict[str, Tensor]:
        """Return parameters and optimizer state of one slice, as `Replica` takes them: float32 on the CPU."""
        parts: list[Tensor] = []
        targets = list(self._trained.values())
        named: dict[str, Tensor] = {}
        for segment in piece.segments:
            target, length = targets[segment.tensor], segment.end - segment.begin
            parts.append(_part(target, segment.offset, length))
            for key, value in self._optimizer.state.get(target, {}).items():
                if isinstance(value, Tensor):
                    whole = value.numel() == target.numel() and value.dim() == target.dim()
                    part = _part(value, segment.offset, length) if whole else value.detach().cpu().clone()
                    named[state_name(key, segment.tensor)] = part
        return {PARAMETERS: torch.cat(parts), **named}

    def publish_state(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Show the replicas' optimizer state, shard by shard, as the user's optimizer's own, for ``state_dict()``."""
        parameters = list(self._trained.values())
        for (tensor, key), value in whole_optimizer_state(self.layout, states).items():
            parameter = parameters[tensor]
            self._optimizer.state[parameter][key] = value if value.dim() == 0 else value.to(parameter.device)


def _check_types(trained: Mapping[str, Tensor]) -> None:
    """Refuse what a float32 master cannot stand for. Raises LayoutError naming the first."""
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise LayoutError(
                f"parameter {name} is {parameter.dtype}; parameters are trained as float32, bfloat16 or float16, with "
                "float32 masters. Convert it (model.float()), or freeze it"
            )


def _spec(name: str, tensor: Tensor, group: int, aliases: tuple[str, ...]) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), group, aliases)


def _part(tensor: Tensor, offset: int, length: int) -> Tensor:
    return tensor.detach().reshape(-1)[offset : offset + length].to("cpu", torch.float32, copy=True)


def _assign_part(target: Tensor, offset: int, part: Tensor) -> None:
    if target.is_contiguous():
        target.view(-1)[offset : offset + part.numel()].copy_(part)
        return
    flat = target.reshape(-1)  # a copy: a shard boundary inside a tensor that is laid out unusually is rare
    flat[offset : offset + part.numel()] = part.to(flat)
    target.copy_(flat.view(target.shape))
