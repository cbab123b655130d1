"""The optimizer that the shards run on what the workers' own optimizers have moved."""

import ast
from typing import Any

import torch

from thresher.protos.errors import ConfigurationError, OptimizerError
from thresher.protos.optimizers import SUPPORTED, OptimizerSpec, Subtract, spec_of


def outer_spec(text: str, groups: int) -> OptimizerSpec:
    """Return the optimizer that ``text`` names, for ``groups`` parameter groups; nothing subtracts the mean.

    Source: Douillard et al., "DiLoCo", arXiv:2311.08105 (Nesterov SGD with lr 0.7 and momentum 0.9).

    Args:
        text: A call with plain arguments by name, such as ``SGD(lr=0.7, momentum=0.9, nesterov=True)``, or nothing.
        groups: The user's parameter groups; the outer optimizer treats them alike.

    Raises:
        ConfigurationError: when it is no such call, or torch refuses the arguments.

    >>> outer_spec("SGD(lr=0.5)", 1).groups[0]["lr"]
    0.5
    """
    if not text:
        return OptimizerSpec(Subtract.__name__, ({},) * groups)
    name, arguments = _read(text)
    try:
        optimizer = SUPPORTED[name]([torch.nn.Parameter(torch.zeros(1))], **arguments)
        spec = spec_of(optimizer)
    except (KeyError, TypeError, ValueError, OptimizerError) as error:
        known = ", ".join(known for known in SUPPORTED if known != Subtract.__name__)
        raise ConfigurationError(f"outer optimizer {text!r}: {error}; the shards apply {known}") from None
    return OptimizerSpec(spec.name, spec.groups * groups)


def check_outer(text: str) -> None:
    """Refuse what `outer_spec` would refuse."""
    outer_spec(text, 1)


def _read(text: str) -> tuple[str, dict[str, Any]]:
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ConfigurationError(f"outer optimizer {text!r}: write it as a call, such as SGD(lr=0.7, momentum=0.9)")
