"""Layers: exceptions from the rule, by the names of the parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Compressor,
    Guarantee,
    Round,
    check_compressor,
    check_flat,
    check_state,
)
from thresher.compression.layer_wise import (
    check_numel,
    combined,
    fitted,
    restored,
    states,
)
from thresher.protos.errors import ConfigurationError, LayoutError
from thresher.protos.sparse import SparseGradient

_NAMES_SHOWN = 5


class _Segment(NamedTuple):
    """A run of neighbours, [begin, end), that belong to one group, and where it begins in the group's own vector."""

    begin: int
    end: int
    group: int
    begin_in_group: int


@final
@dataclass(slots=True)
class Layers(Compressor):
    """Compresses the parameters whose names match a pattern by a rule of their own, and all the others together.

    The parameters of a rule make up one vector, and so do all that match none: the entire-model Top-k stays one over
    the entire rest. A :class:`~thresher.compression.layer_wise.LayerWise` among the compressors treats each tensor of
    its group alone. The first pattern that matches wins. Every group draws random numbers of its own.

    Args:
        rest: for the parameters that match no pattern.
        rules: compressor by pattern, as in a shell: ``*``, ``?`` and ``[...]``, in any case of letters as written.
        shapes: of the trained tensors, in the order in which they make up the flat vector.
        names: of the same tensors.

    Raises:
        ConfigurationError: a pattern matches no parameter, or none that an earlier one has left; a compressor is none,
            or is bound to the tensors of a model; shapes and names differ in number.

    References:
        Baseline: exceptions such as dense biases in Lin et al., "Deep gradient compression", arXiv:1712.01887.

    Examples:
        >>> from thresher.compression import Identity, TopK
        >>> layers = Layers(TopK(0.25), {"*.bias": Identity()}, [(4,), (2,)], ["out.weight", "out.bias"])
        >>> layers.compress(torch.tensor([1.0, 4.0, 3.0, 2.0, 0.0, 0.0])).indices
        tensor([1, 4, 5])
    """

    rest: Compressor
    rules: Mapping[str, Compressor]
    shapes: Sequence[Sequence[int]]
    names: Sequence[str]
    _segments: tuple[_Segment, ...] = field(init=False, repr=False, compare=False)
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)  # of the groups: the rest, then each rule
    _groups: tuple[Compressor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rules, self.names = dict(self.rules), tuple(self.names)
        self.shapes = tuple(map(tuple, self.shapes))
        if len(self.shapes) != len(self.names):
            raise ConfigurationError(f"Layers was given {len(self.shapes)} shapes and {len(self.names)} names")
        compressors = (self.rest, *self.rules.values())
        for compressor in compressors:
            check_compressor("Layers", compressor)
        group_of = _groups_of(tuple(self.rules), self.names)
        shapes_of = [
            [shape for shape, of in zip(self.shapes, group_of, strict=True) if of == group]
            for group in range(len(compressors))
        ]
        self._groups = tuple(
            fitted("Layers", compressor, shapes) for compressor, shapes in zip(compressors, shapes_of, strict=True)
        )
        self._sizes = tuple(sum(map(prod, shapes)) for shapes in shapes_of)
        self._segments = _segments(group_of, [prod(shape) for shape in self.shapes])

    @property
    def guarantee(self) -> Guarantee:
        """What follows for all groups together (baseline): errors and squared norms add up, group by group."""
        return combined(
            "Layers", [(group.guarantee, size) for group, size in zip(self._groups, self._sizes, strict=True)]
        )

    def describe(self) -> str:
        """Such as ``Layers(TopK(0.001), {'*.bias': Identity()})``."""
        rules = ", ".join(f"{pattern!r}: {compressor.describe()}" for pattern, compressor in self.rules.items())
        return f"Layers({self.rest.describe()}, {{{rules}}})"

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of each group of ``gradient``, [numel] float32, each coordinate in its place.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or not one of these tensors.
            NonFiniteGradientError: as by the compressors; the index it names is that in the group.
        """
        check_flat(gradient)
        check_numel("Layers", sum(self._sizes), gradient.numel())
        sent = {
            group: compressor.compress(
                self._vector_of(group, gradient),
                # Numbers that neither another group nor a layer-wise tensor of another group draws from.
                replace(round, tensor=round.tensor + group * len(self.shapes)),
            )
            for group, compressor in enumerate(self._groups)
            if self._sizes[group]
        }
        return SparseGradient.concatenate(
            [
                sent[group].slice(begin_in_group, begin_in_group + end - begin)
                for begin, end, group, begin_in_group in self._segments
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: that of each group's compressor, the rest's first, by number."""
        return {"method": self.describe(), "groups": states(self._groups)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another model (the difference is named), or is
                not such a state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "groups"})
        self._groups = restored("groups", self._groups, state["groups"])

    def _vector_of(self, group: int, gradient: Tensor) -> Tensor:
        """The coordinates of ``group``, in their order."""
        parts = [gradient[segment.begin : segment.end] for segment in self._segments if segment.group == group]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _groups_of(patterns: Sequence[str], names: Sequence[str]) -> list[int]:
    """To which group each name belongs: i + 1 if the i-th pattern is the first that matches, 0 if none does.

    Raises:
        LayoutError: a pattern matches no name.
        ConfigurationError: what a pattern matches is taken by those before it.
    """
    found = [
        next((number for number, pattern in enumerate(patterns, 1) if fnmatchcase(name, pattern)), 0) for name in names
    ]
    for number, pattern in enumerate(patterns, 1):
        if number in found:
            continue
        if any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(f"all that {pattern!r} matches is taken by the patterns before it; move it up")
        some = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
        raise LayoutError(f"no parameter matches {pattern!r}; there are {some or 'none at all'}")
    return found


def _segments(group_of: Sequence[int], sizes: Sequence[int]) -> tuple[_Segment, ...]:
    """The tensors of the model, neighbours of the same group as one; those without elements are left out."""
    filled: dict[int, int] = {}
    segments: list[_Segment] = []
    ends = accumulate(sizes, initial=0)
    for group, (begin, end) in zip(group_of, pairwise(ends), strict=True):
        if begin == end:
            continue
        begin_in_group = filled.get(group, 0)
        filled[group] = begin_in_group + end - begin
        if segments and segments[-1].group == group:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(_Segment(begin, end, group, begin_in_group))
    return tuple(segments)
