"""The model: its size, its optimizer and its seconds, or what is wrong with how it was named."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.advise.model import load_model, model_of
from thresher.protos.errors import ConfigurationError, OptimizerError

SOURCE = """
import torch

def small():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    return model

def with_adam():
    model = small()
    return model, torch.optim.AdamW(model.parameters(), lr=0.5)

def with_lbfgs():
    model = small()
    return model, torch.optim.LBFGS(model.parameters())

def number():
    return 3

def failing():
    raise RuntimeError("no weights here")

constant = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "of_a_test.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


@given(st.integers(1, 5 << 20))
def test_a_number_of_parameters_is_a_model(parameters: int) -> None:
    made = model_of(parameters)
    assert made.numel == parameters
    assert all(0 < size <= 1 << 20 for size in made.sizes)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one parameter"):
        model_of(0)


def test_only_what_is_trained_counts(file: Path) -> None:
    made = load_model(f"{file}:small")
    assert made.sizes == (12, 4, 4)
    assert (made.optimizer.name, made.compute) == ("SGD", None)


def test_its_own_optimizer_is_taken(file: Path) -> None:
    spec = load_model(f"{file}:with_adam").optimizer
    assert (spec.name, spec.groups[0]["lr"]) == ("AdamW", 0.5)


def test_a_step_is_timed(file: Path) -> None:
    """Where there is a function of that name beside the model."""
    file.write_text(SOURCE + "\ndef step(model):\n    model(torch.ones(2, 3)).sum().backward()\n", encoding="utf-8")
    compute = load_model(f"{file}:small").compute
    assert compute is not None
    assert (compute > 0).all()


def test_a_module_of_the_folder_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m` would find it."""
    monkeypatch.chdir(file.parent)
    monkeypatch.syspath_prepend("")
    assert load_model("of_a_test:small").numel == 20


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("FILE", "names no function"),
        ("FILE:", "names no function"),
        ("FILE:a b", "names no function"),
        ("FILE:missing", "has no function missing"),
        ("FILE:constant", "has no function constant"),
        ("FILE:number", "returned a int, no model"),
        ("FILE:failing", "RuntimeError: no weights here"),
        ("missing.py:small", "there is no file missing.py"),
        ("there.is.none:small", "takes the module there"),
    ],
)
def test_what_is_no_model_is_told(file: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_model(path.replace("FILE", str(file)))


def test_a_file_that_cannot_be_imported_is_told(file: Path) -> None:
    file.write_text("1 / 0", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot be imported: ZeroDivisionError"):
        load_model(f"{file}:small")


def test_a_step_that_fails_is_told(file: Path) -> None:
    file.write_text(SOURCE + "\ndef step(model):\n    model(1)\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="step failed: TypeError"):
        load_model(f"{file}:small")


def test_an_optimizer_that_the_shards_do_not_apply_is_told(file: Path) -> None:
    with pytest.raises(OptimizerError, match="LBFGS"):
        load_model(f"{file}:with_lbfgs")
