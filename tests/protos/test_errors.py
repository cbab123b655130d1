"""The errors: one tree, and each of them survives the trip over the wire by its name."""

import pytest

from thresher.protos import errors
from thresher.protos.errors import ProtocolError, ThresherError, error_named

NAMED = sorted(name for name, value in vars(errors).items() if isinstance(value, type) and name != "ThresherError")


@pytest.mark.parametrize("name", NAMED)
def test_an_error_survives_by_name(name: str) -> None:
    """The other side raises the same class with the same message."""
    error = error_named(name, "what was wrong")
    assert type(error) is getattr(errors, name)
    assert str(error) == "what was wrong"


@pytest.mark.parametrize("name", NAMED)
def test_one_root_and_a_builtin_cousin(name: str) -> None:
    """``except ThresherError`` catches each, and so does the builtin that a reader would expect."""
    cls = getattr(errors, name)
    assert issubclass(cls, ThresherError)
    assert issubclass(cls, (ValueError, RuntimeError, ArithmeticError, TimeoutError, OSError))


@pytest.mark.parametrize("name", ["KeyError", "ThresherError", "", "__class__"])
def test_an_unknown_name_is_a_protocol_error(name: str) -> None:
    """Whatever else the other side claims to have raised keeps its message, and names no class to be looked up."""
    error = error_named(name, "what was wrong")
    assert type(error) is ProtocolError
    assert str(error) == "what was wrong"
