"""An error that we thought of is one line and an exit code; any other keeps its traceback."""

from pathlib import Path

import pytest
import typer
from rich.console import Console

from thresher.deploy.exit_codes import errors_told
from thresher.deploy.stop_signals import StopRequestedError
from thresher.protos.errors import ConfigurationError, DataLossError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("a [setting] is wrong"), 2),
        (DataLossError("a [file] is gone"), 1),
        (StopRequestedError(15), 143),
        (PermissionError(13, "denied", "[file]"), 1),
    ],
)
def test_an_error_is_a_line_and_an_exit_code(capsys: pytest.CaptureFixture[str], error: Exception, code: int) -> None:
    with pytest.raises(typer.Exit) as ended, errors_told(Console(stderr=True)):
        raise error
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == f"thresher: {error}\n"


def test_a_file_that_cannot_be_written_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What was wrong and where, and no traceback: a traceback is for what we did not think of."""
    with pytest.raises(typer.Exit) as ended, errors_told(Console(stderr=True)):
        Path("/dev/full").write_text("x", encoding="utf-8")
    assert ended.value.exit_code == 1
    assert "No space left on device" in capsys.readouterr().err


def test_what_nobody_thought_of_goes_through() -> None:
    with pytest.raises(ZeroDivisionError), errors_told(Console(stderr=True)):
        raise ZeroDivisionError
