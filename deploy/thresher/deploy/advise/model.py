"""The model that is to be trained: how large it is, and how long a step of it computes."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeVar, final

import numpy as np
import torch
from torch import nn

from thresher.deploy.advise.samples import Sample
from thresher.protos.errors import ConfigurationError
from thresher.protos.optimizers import OptimizerSpec, spec_of
from thresher.worker.parameters import ModelParameters

T = TypeVar("T")

_TENSOR: Final = 1 << 20  # elements of a tensor, where only their sum is known
_REPETITIONS: Final = 5
_HOW: Final = "write it as package.module:function or path/to/file.py:function, a function that returns a model"
_DEFAULT: Final = OptimizerSpec("SGD", ({"lr": 0.1, "momentum": 0.9},))


@final
@dataclass(frozen=True, slots=True)
class Model:
    """What is to be trained.

    Attributes:
        name: For people.
        sizes: Elements of each trained tensor.
        optimizer: The one that shards and replicas run; with its first parameter group for all tensors.
        compute: Seconds of forward and backward pass; None where nothing says so.
    """

    name: str
    sizes: tuple[int, ...]
    optimizer: OptimizerSpec = _DEFAULT
    compute: Sample | None = None

    @property
    def numel(self) -> int:
        """Trained elements."""
        return sum(self.sizes)


def model_of(parameters: int) -> Model:
    """Return a model of which only the number of parameters is known, with SGD and momentum.

    Raises:
        ConfigurationError: when there is none.

    >>> model_of(2_500_000).sizes
    (1048576, 1048576, 402848)
    """
    if parameters < 1:
        raise ConfigurationError(f"a model has at least one parameter, not {parameters}")
    whole, rest = divmod(parameters, _TENSOR)
    return Model(f"{parameters:,} parameters", (*(_TENSOR,) * whole, *((rest,) if rest else ())))


def load_model(path: str) -> Model:
    """Make the model that ``path`` names.

    The function returns an `nn.Module`, or a pair of one and its optimizer. If its module also has a function ``step``,
    that is called with the model and makes one forward and one backward pass; it is timed.

    Args:
        path: ``package.module:function`` or ``file.py:function``.

    Raises:
        ConfigurationError: when there is no such function, it fails, or returns something else.
        ThresherError: when Thresher does not train such a model, or with such an optimizer.
    """
    where, _, name = path.rpartition(":")
    if not where or not name.isidentifier():
        raise ConfigurationError(f"{path!r} names no function: {_HOW}")
    module = _module(where, path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigurationError(f"{where} has no function {name}: {_HOW}")
    made = _called(path, function)
    model, optimizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer | None):
        raise ConfigurationError(f"{path} returned a {type(made).__name__}, no model: {_HOW}, or it and its optimizer")
    spec = _DEFAULT if optimizer is None else spec_of(optimizer)
    layout = ModelParameters(model, optimizer or torch.optim.SGD(model.parameters())).layout
    step = getattr(module, "step", None)
    compute = _timed(f"{where}:step", step, model) if callable(step) else None
    sizes = tuple(tensor.numel for tensor in layout.trained)
    return Model(path, sizes, OptimizerSpec(spec.name, spec.groups[:1]), compute)


def _module(where: str, path: str) -> ModuleType:
    if not where.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` has it: modules of the folder that one is in
        return _imported(path, lambda: importlib.import_module(where))
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None or not Path(where).is_file():
        raise ConfigurationError(f"there is no file {where}: {_HOW}")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    _imported(path, lambda: loader.exec_module(module))
    return module


def _imported(path: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"--model {path} takes the module {error.name}, which is not here: {_HOW}") from None
    except Exception as error:
        raise ConfigurationError(f"--model {path} cannot be imported: {type(error).__name__}: {error}") from error


def _called(path: str, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - the user's own
    try:
        return function(*arguments)
    except Exception as error:
        raise ConfigurationError(f"{path} failed: {type(error).__name__}: {error}") from error


def _timed(path: str, step: Callable[..., Any], model: nn.Module) -> Sample:
    _called(path, step, model)  # the first one makes buffers and chooses kernels
    taken = []
    for _ in range(_REPETITIONS):
        begin = time.perf_counter()
        _called(path, step, model)
        taken.append(time.perf_counter() - begin)
    return np.array(taken)
