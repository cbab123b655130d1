"""Rules on the shape of the code that no linter knows: size, the tests' mirror, sources of methods.

They read the modules wherever `thresher` is installed: in the repository, or in a wheel.
"""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

import thresher.compression

TESTS = Path(__file__).parent

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60

# Modules without a test file of their own, and why.
WITHOUT_MIRROR = {
    "__init__": "only names what is public",
    "__main__": "only wires a process together; the integration tests start it",
    "server.events": "plain values without behaviour: tests/server/test_shard.py speaks in them",
    "server.statistics": "plain values without behaviour: tests/server/test_shard.py and test_metrics.py read them",
    "worker.statistics": "plain values without behaviour: tests/worker/test_session.py and test_metrics.py read them",
}

# Public names of thresher.compression that are no method from the literature, and why.
WITHOUT_SOURCE = {
    "Compressor": "the contract itself",
    "Feedback": "the other contract",
    "Quantizer": "a kind of compressor",
    "Sparsifier": "a kind of compressor",
}


def module_files() -> dict[str, Path]:
    """Every hand-written module, by what follows `thresher.` in its dotted name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for root in importlib.import_module("thresher").__path__
        for path in sorted(Path(root).rglob("*.py"))
        if "_pb2" not in path.name
    }


MODULES = module_files()

each_module = pytest.mark.parametrize("module", sorted(MODULES))


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def test_modules_are_found() -> None:
    assert {"compression.hard_threshold", "protos.sparse"} <= MODULES.keys()


@each_module
def test_module_has_its_test_file(module: str) -> None:
    *package, name = module.split(".")
    if {name, module} & WITHOUT_MIRROR.keys():
        return
    mirror = Path(*package, f"test_{name}.py")
    assert TESTS.joinpath(mirror).is_file(), f"tests/{mirror} is missing"


@each_module
def test_module_is_short(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: it probably has two responsibilities"


@each_module
def test_functions_are_short(module: str) -> None:
    functions = (node for node in ast.walk(parsed(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert not {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FUNCTION}


@each_module
def test_library_does_not_print(module: str) -> None:
    calls = (node for node in ast.walk(parsed(module)) if isinstance(node, ast.Call))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not lines, "what a library says goes to its log, what a command says to its console"


@pytest.mark.parametrize("name", sorted(set(thresher.compression.__all__) - WITHOUT_SOURCE.keys()))
def test_method_names_its_source(name: str) -> None:
    text = inspect.getdoc(getattr(thresher.compression, name)) or ""
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi:10\.|\bbaseline\b", text, re.IGNORECASE), "whose method is it?"
