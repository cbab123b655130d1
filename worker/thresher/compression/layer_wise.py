"""Layer-wise: each tensor of the model alone, instead of all of them as one vector."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, final

from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    LAYOUT_BOUND,
    Compressor,
    Guarantee,
    Round,
    check_compressor,
    check_flat,
    check_state,
)
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(slots=True)
class LayerWise(Compressor):
    """Applies a compressor to each trained tensor by itself: the layer-wise form of a method.

    Every tensor has a copy of the compressor, so state and random draws are its own: its round has the number of the
    tensor in ``Round.tensor``. A tensor without elements is passed over. A hard threshold gives the same either way,
    Top-k does not (arXiv:2108.00951).

    Args:
        compressor: what is applied to each, a compressor of one vector.
        shapes: of the trained tensors, in the order in which they make up the flat vector.

    Raises:
        ConfigurationError: ``compressor`` is none, or is itself bound to the tensors of a model.

    References:
        Dutta et al., "On the discrepancy between the theoretical analysis and practical implementations of compressed
        communication for distributed deep learning", arXiv:1911.08250.

    Examples:
        >>> import torch
        >>> from thresher.compression import TopK
        >>> LayerWise(TopK(0.5), [(2,), (2,)]).compress(torch.tensor([9.0, 8.0, 2.0, 1.0])).indices
        tensor([0, 2])
    """

    compressor: Compressor
    shapes: Sequence[Sequence[int]]
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _each: tuple[Compressor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_compressor("LayerWise", self.compressor)
        _check_of_one_vector("LayerWise", self.compressor)
        self.shapes = tuple(map(tuple, self.shapes))
        self._sizes = tuple(prod(shape) for shape in self.shapes)
        self._each = tuple(copy.deepcopy(self.compressor) for _ in self.shapes)

    @property
    def guarantee(self) -> Guarantee:
        """What follows for all tensors together (baseline): errors and squared norms add up, tensor by tensor."""
        return combined("LayerWise", [(self.compressor.guarantee, size) for size in self._sizes])

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of each tensor of ``gradient``, [numel] float32, put together.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or not one of these tensors.
            NonFiniteGradientError: as by the compressor; the index it names is that in the tensor.
        """
        check_flat(gradient)
        check_numel("LayerWise", sum(self._sizes), gradient.numel())
        tensors = gradient.split_with_sizes(self._sizes) if self._sizes else ()
        return SparseGradient.concatenate(
            [
                compressor.compress(tensor, replace(round, tensor=round.tensor + number))
                for number, (compressor, tensor) in enumerate(zip(self._each, tensors, strict=True))
                if tensor.numel()
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: that of each tensor's compressor, by the tensor's number."""
        return {"method": self.describe(), "tensors": states(self._each)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another number of tensors (both are named), or is
                not such a state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "tensors"})
        self._each = restored("tensors", self._each, state["tensors"])


def fitted(owner: str, compressor: Compressor, shapes: Sequence[Sequence[int]]) -> Compressor:
    """A copy of ``compressor`` for a vector that consists of tensors of ``shapes``, layer-wise if it is.

    Raises:
        ConfigurationError: it is bound to the tensors of a model in another way.
    """
    if isinstance(compressor, LayerWise):
        return LayerWise(compressor.compressor, shapes)
    _check_of_one_vector(owner, compressor)
    return copy.deepcopy(compressor)


def _check_of_one_vector(owner: str, compressor: Compressor) -> None:
    if inspect.signature(type(compressor)).parameters.keys() & (LAYOUT_BOUND - {"device"}):
        raise ConfigurationError(
            f"{owner} takes compressors of one vector, {compressor.describe()} is bound to the tensors of a model"
        )


def check_numel(owner: str, expected: int, found: int) -> None:
    """Refuse a vector that is not the model's.

    Raises:
        ConfigurationError: the lengths differ; both are named.
    """
    if expected != found:
        raise ConfigurationError(f"{owner} was made for tensors of {expected} elements in all, found {found}")


def combined(owner: str, parts: Sequence[tuple[Guarantee, int]]) -> Guarantee:
    """What holds for a vector of which every part, [size], has its own guarantee; parts without elements don't count.

    κ² adds up, δ is the least, ω the largest, each if every part has one.
    """
    parts = [(guarantee, size) for guarantee, size in parts if size]
    total = sum(size for _, size in parts)

    def all_of(
        bounds: Sequence[Callable[[int], float] | None], combine: Callable[[list[float]], float]
    ) -> Callable[[int], float] | None:
        if None in bounds:
            return None

        def bound(numel: int) -> float:
            check_numel(owner, total, numel)
            return combine([of(size) for of, (_, size) in zip(bounds, parts, strict=True) if of is not None])

        return bound

    return Guarantee(
        conserves=all(guarantee.conserves for guarantee, _ in parts),
        kappa=all_of([guarantee.kappa for guarantee, _ in parts], lambda kappas: math.hypot(*kappas)),
        delta=all_of([guarantee.delta for guarantee, _ in parts], lambda deltas: min(deltas, default=1.0)),
        omega=all_of([guarantee.omega for guarantee, _ in parts], lambda omegas: max(omegas, default=0.0)),
    )


def states(compressors: Sequence[Compressor]) -> dict[str, Any]:
    """A copy of the state of each, by its number."""
    return {str(number): compressor.state_dict() for number, compressor in enumerate(compressors)}


def restored(of_what: str, compressors: Sequence[Compressor], state: object) -> tuple[Compressor, ...]:
    """Copies of ``compressors`` with the states from :func:`states`; they themselves are not changed.

    Raises:
        ConfigurationError: one of the states is not that compressor's, or there are more or fewer.
    """
    if not isinstance(state, Mapping) or set(state) != {str(number) for number in range(len(compressors))}:
        found = len(state) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise ConfigurationError(f"the state has {of_what} {found}, this is made for {len(compressors)}")
    copies = tuple(copy.deepcopy(compressor) for compressor in compressors)
    for number, compressor in enumerate(copies):
        compressor.load_state_dict(state[str(number)])
    return copies
