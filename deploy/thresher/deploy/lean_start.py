"""Keeps torch's compiler out of a shard that starts: half as much to import as torch itself, and never used there."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _Stub(ModuleType):
    """Says what optimizers ask of `torch._dynamo`; makes way for the real module when asked for anything else."""

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        """Return ``function`` as it is: nothing compiles it."""
        return function

    @staticmethod
    def graph_break() -> None:
        """Break no graph."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the real module has
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        return getattr(importlib.import_module(_NAME), name)


def without_compiler() -> None:
    """Let torch's optimizers work without importing torch's compiler, which they do only to keep it off themselves.

    It takes as long as most of the rest of a shard's start. For processes that compile nothing; who does all the same
    gets the real module, by the first name of it that is looked up.
    """
    if _NAME not in sys.modules:
        stub = _Stub(_NAME)
        sys.modules[_NAME] = stub
        torch._dynamo = stub  # noqa: SLF001 - as the import system would
