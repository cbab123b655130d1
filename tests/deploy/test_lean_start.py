"""A shard's optimizers work without torch's compiler, and a process that wants the compiler has it."""

import inspect
import json
import subprocess
import sys
from typing import Any

import torch

from thresher.protos.optimizers import SUPPORTED

LEAN = """
import json, sys, torch
from thresher.deploy.lean_start import without_compiler
from thresher.protos.optimizers import SUPPORTED

without_compiler()
without_compiler()
exec(sys.argv[1])
compiler = [name for name in sys.modules if name.startswith("torch._dynamo.")]
print(json.dumps({"parameters": parameters(), "compiler": compiler}))
"""

COMPILES = """
import torch
from thresher.deploy.lean_start import without_compiler

without_compiler()
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
import torch._dynamo.config
assert torch._dynamo.list_backends()
"""


def parameters() -> dict[str, list[float]]:
    """Return what a few steps of each optimizer that a shard may run make of the same numbers."""
    found = {}
    nothing: dict[str, Any] = {}  # of their base class the type checkers want more
    for name, build in SUPPORTED.items():
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64))
        optimizer, again = build([parameter], **nothing), build([parameter], **nothing)
        for one in (optimizer, optimizer, again):
            again.load_state_dict(optimizer.state_dict())
            parameter.grad = torch.randn(64)
            one.step()
        found[name] = parameter.tolist()
    return found


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_optimizers_do_the_same_without_the_compiler() -> None:
    """Each optimizer that a shard may run gives the same bits, and imports nothing of the compiler."""
    found = json.loads(run(LEAN, inspect.getsource(parameters)))
    assert found == {"parameters": parameters(), "compiler": []}


def test_who_compiles_gets_the_compiler() -> None:
    """The stand-in makes way for the real module."""
    run(COMPILES)
