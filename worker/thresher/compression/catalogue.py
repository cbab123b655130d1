"""Methods by name: a description, such as ``ErrorFeedback(TopK(0.001))``, is the call that makes it."""

import ast
import inspect
import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

import torch

from thresher.compression.accordion import Accordion
from thresher.compression.base import Compressor
from thresher.compression.blockwise import Blockwise8Bit
from thresher.compression.decayed_error_feedback import DecayedErrorFeedback
from thresher.compression.detached_error_feedback import DetachedErrorFeedback
from thresher.compression.dgc import DGC
from thresher.compression.dryden_adaptive import DrydenAdaptive
from thresher.compression.ef21 import EF21
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.error_reset import ErrorReset
from thresher.compression.feedback import Feedback
from thresher.compression.float_rounding import BFloat16, Float16
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.identity import Identity
from thresher.compression.integer_rounding import IntegerRounding
from thresher.compression.layer_wise import LayerWise
from thresher.compression.layers import Layers
from thresher.compression.momentum_correction import MomentumCorrection
from thresher.compression.no_feedback import NoFeedback
from thresher.compression.one_bit import OneBit
from thresher.compression.qsgd import QSGD
from thresher.compression.quantized import Quantized
from thresher.compression.random_block import RandomBlock, RandomBlocks
from thresher.compression.random_k import RandomK, UnbiasedRandomK
from thresher.compression.scaled_sign import ScaledSign
from thresher.compression.sidco import SIDCo
from thresher.compression.stochastic_rounding import StochasticRounding
from thresher.compression.strom import Strom
from thresher.compression.tern_grad import TernGrad
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError

COMPRESSORS: Final[Mapping[str, type[Compressor]]] = {
    method.__name__: method
    for method in (
        BFloat16,
        Blockwise8Bit,
        DrydenAdaptive,
        Float16,
        HardThreshold,
        Identity,
        IntegerRounding,
        LayerWise,
        Layers,
        OneBit,
        QSGD,
        Quantized,
        RandomBlock,
        RandomBlocks,
        RandomK,
        SIDCo,
        ScaledSign,
        StochasticRounding,
        Strom,
        TernGrad,
        TopK,
        UnbiasedRandomK,
    )
}

FEEDBACKS: Final[Mapping[str, type[Feedback]]] = {
    method.__name__: method
    for method in (
        Accordion,
        DGC,
        DecayedErrorFeedback,
        DetachedErrorFeedback,
        EF21,
        ErrorFeedback,
        ErrorReset,
        MomentumCorrection,
        NoFeedback,
    )
}

_OPERATORS: Final = {ast.Div: operator.truediv, ast.Mult: operator.mul, ast.Pow: operator.pow}


def parse(
    text: str, shapes: Sequence[Sequence[int]], names: Sequence[str] = (), *, device: torch.device | str = "cpu"
) -> Compressor | Feedback:
    """Make the method that ``text`` describes, for a model.

    The text is a call of a class of the catalogue with plain arguments: numbers (also as ``1/64`` or ``2**20``), words,
    switches, None, tuples, dictionaries, and other such calls. Nothing of it is evaluated as a program. What comes from
    the model is filled in: ``numel``, ``shapes``, ``names`` and ``device``. A name alone is a call without arguments.

    Args:
        text: such as ``HardThreshold(0.01)``. Law: ``parse(made.describe(), shapes)`` makes an equal method.
        shapes: of the trained tensors, in the order in which they make up the flat vector.
        names: of the same; numbers by default.
        device: where the vectors live.

    Raises:
        ConfigurationError: it is no such call, an unknown name, or arguments that the class refuses; the message says
            which part, and what there is.

    References:
        Baseline: Python's own grammar, literals only.

    Examples:
        >>> parse("TopK(1/64)", [(128,)])
        TopK(density=0.015625)
        >>> parse("ErrorFeedback(HardThreshold)", [(2, 3)]).residual.numel()
        6
    """
    layout = {
        "numel": sum(prod(shape) for shape in shapes),
        "shapes": tuple(map(tuple, shapes)),
        "names": tuple(names) or tuple(map(str, range(len(shapes)))),
        "device": device,
    }
    made = _made(_expression(text), layout)
    if not isinstance(made, Compressor | Feedback):
        raise ConfigurationError(f"{text!r} is not a method; write it as a call, such as TopK(0.001)")
    return made


def parse_feedback(
    text: str, shapes: Sequence[Sequence[int]], names: Sequence[str] = (), *, device: torch.device | str = "cpu"
) -> Feedback:
    """Make the feedback that ``text`` describes; a compressor alone gets an :class:`ErrorFeedback`.

    Raises:
        ConfigurationError: as by :func:`parse`, or the compressor does not conserve, and no feedback is named.

    References:
        Baseline: as for :func:`parse`.

    Examples:
        >>> parse_feedback("TopK(0.01)", [(100,)]).describe()
        'ErrorFeedback(TopK(0.01))'
    """
    made = parse(text, shapes, names, device=device)
    if isinstance(made, Feedback):
        return made
    return ErrorFeedback(made, sum(prod(shape) for shape in shapes), device=device)


def takes_run_threshold(text: str) -> bool:
    """Whether ``text`` describes a method with a hard threshold that has no λ of its own.

    Raises:
        ConfigurationError: it is no Python expression.

    References:
        Baseline: as for :func:`parse`.

    Examples:
        >>> takes_run_threshold("ErrorFeedback(HardThreshold)"), takes_run_threshold("HardThreshold(0.1)")
        (True, False)
    """
    tree = _expression(text)
    settled = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and (node.args or node.keywords)}
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in settled)
    return any(node.id == HardThreshold.__name__ for node in names)


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigurationError(f"{text!r} is not a method; write it as a call, such as TopK(0.001)") from None


def _made(node: ast.expr, layout: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the text says
    match node:
        case ast.Call(func=ast.Name(id=name), args=positional, keywords=named):
            if any(keyword.arg is None for keyword in named):
                raise ConfigurationError(f"{ast.unparse(node)!r}: arguments must be written out")
            return _call(
                name,
                [_made(argument, layout) for argument in positional],
                {str(keyword.arg): _made(keyword.value, layout) for keyword in named},
                layout,
            )
        case ast.Name(id=name):
            return _call(name, [], {}, layout)
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, layout)
        case ast.BinOp(left=left, op=ast.Div() | ast.Mult() | ast.Pow() as operation, right=right):
            return _computed(node, operation, _number(left, layout), _number(right, layout))
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(_made(item, layout) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_made(key, layout): _made(value, layout) for key, value in zip(keys, values, strict=True) if key}
    raise ConfigurationError(f"{ast.unparse(node)!r} is not a plain value; write numbers, words and methods only")


def _number(node: ast.expr, layout: Mapping[str, Any]) -> float:
    value = _made(node, layout)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{ast.unparse(node)!r} is not a number")
    return value


def _computed(node: ast.expr, operation: ast.operator, left: float, right: float) -> float:
    if isinstance(operation, ast.Pow) and not (abs(left) <= 16 and abs(right) <= 64):
        raise ConfigurationError(f"{ast.unparse(node)!r} is too large a power")
    try:
        return float(_OPERATORS[type(operation)](left, right))
    except (ArithmeticError, TypeError):
        raise ConfigurationError(f"{ast.unparse(node)!r} is not a number") from None


def _call(name: str, positional: list[Any], named: dict[str, Any], layout: Mapping[str, Any]) -> Compressor | Feedback:
    construct = COMPRESSORS.get(name) or FEEDBACKS.get(name)
    if construct is None:
        raise ConfigurationError(
            f"there is no method {name!r}; there are the compressors {', '.join(sorted(COMPRESSORS))} "
            f"and the feedbacks {', '.join(sorted(FEEDBACKS))}"
        )
    parameters = inspect.signature(construct).parameters
    if layout.keys() & named.keys():
        raise ConfigurationError(f"{name} takes {', '.join(sorted(layout.keys() & named.keys()))} from the model")
    given = {key: value for key, value in layout.items() if key in parameters}
    settings = [key for key in parameters if key not in layout]
    by_position = [key for key in settings if parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY]
    try:
        # By name, so that an argument too many never lands where the model's own belong.
        return construct(
            **dict(zip(by_position, positional, strict=False)), **_rest(by_position, positional, named), **given
        )
    except TypeError as error:
        raise ConfigurationError(f"{name}: {error}; it takes {', '.join(settings) or 'no arguments'}") from None


def _rest(settings: Sequence[str], positional: Sequence[Any], named: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(positional) > len(settings):
        raise TypeError(f"{len(positional)} arguments given")
    twice = set(settings[: len(positional)]) & named.keys()
    if twice:
        raise TypeError(f"{', '.join(sorted(twice))} given twice")
    return named
