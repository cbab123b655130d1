"""Kernels: compiled late, once, with the kernels they call, and also where the cache on disk fails."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from thresher.protos.kernels import Kernel, kernel, prefetch

Integers = npt.NDArray[np.int64]


@kernel
def squared(number: int) -> int:
    """The square."""
    return number * number


@kernel
def sum_of_squares(numbers: Integers) -> int:
    """The sum of the squares."""
    total = 0
    for i in range(numbers.size):
        total += squared(numbers[i])
    return total


MODULE = """
import numpy as np
from thresher.protos.kernels import kernel

@kernel
def total(numbers):
    result = 0
    for i in range(numbers.size):
        result += numbers[i]
    return result
"""


def loaded(folder: Path) -> ModuleType:
    """A module with a kernel, whose cache is beside it."""
    path = folder / "counted.py"
    path.write_text(MODULE, encoding="utf-8")
    module = ModuleType("counted")
    exec(compile(MODULE, str(path), "exec"), vars(module))  # noqa: S102
    return module


def test_kernel_calls_kernels() -> None:
    """A kernel of the same module is compiled into the one that calls it."""
    assert sum_of_squares(np.arange(5)) == 30
    assert sum_of_squares.__doc__ == "The sum of the squares."


def test_threads_that_come_first_compile_once() -> None:
    """All threads call the same compiled function."""

    @kernel
    def plus_one(number: int) -> int:
        return number + 1

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(plus_one, range(8))) == list(range(1, 9))
    assert len(plus_one._compiled) == 1


def test_wrong_arguments_are_reported() -> None:
    """What numba cannot compile is raised, and not taken for a matter of the cache."""
    with pytest.raises(TypeError, match="argument"):
        sum_of_squares()  # type: ignore[call-arg]


@pytest.mark.parametrize("damage", [b"", b"no pickle at all", b"\x80"])
def test_damaged_cache_costs_a_warning(
    tmp_path: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An index that a crash left empty or half written is not read, and the kernel runs."""
    assert loaded(tmp_path).total(np.arange(4)) == 6
    (index,) = tmp_path.rglob("*.nbi")
    index.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path).total(np.arange(4)) == 6
    assert "total is compiled without numba's cache" in caplog.text


def test_cache_is_beside_the_source(tmp_path: Path) -> None:
    """What is documented: the folder of the bytecode, where it can be written."""
    loaded(tmp_path).total(np.arange(4))
    assert {path.suffix for path in (tmp_path / "__pycache__").iterdir()} == {".nbi", ".nbc"}


@pytest.mark.parametrize(
    "statement",
    [
        "import thresher.protos.seeded, thresher.protos.codec",
        "import thresher.compression, thresher.worker",
        "import thresher.server.shard",
        "from thresher.deploy.cli import app",
    ],
)
def test_nothing_is_compiled_at_import(statement: str) -> None:
    """An import costs no numba, which takes as long to import as all the rest."""
    code = f"{statement}\nimport sys\nprint([name for name in ('numba', 'llvmlite') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "[]\n", ran.stderr


def test_help_waits_for_neither_torch_nor_numba() -> None:
    """``thresher --help`` imports what it prints."""
    code = (
        "import sys\nfrom thresher.deploy.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', [name for name in ('torch', 'numba') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout.endswith("loaded []\n"), ran.stdout + ran.stderr


def test_a_kernel_is_a_kernel() -> None:
    """The decorator makes what other kernels recognise."""
    assert isinstance(squared, Kernel)
    assert squared(3) == 9


@kernel
def total_asked_ahead(vector: Any) -> float:
    """Sum, asking for memory that lies ahead, and at last for what lies beyond the end."""
    total = 0.0
    for index in range(vector.size):
        prefetch(vector, np.uint64(index + 100))
        total += vector[index]
    return total


def test_memory_may_be_asked_beyond_the_end() -> None:
    """A prefetch changes nothing and reads nothing: in a kernel it is an instruction, elsewhere not even that."""
    vector = np.arange(1000, dtype=np.float32)
    assert total_asked_ahead(vector) == float(vector.sum())
    assert total_asked_ahead.function(vector) == float(vector.sum())
