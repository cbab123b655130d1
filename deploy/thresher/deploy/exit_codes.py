"""How the commands end: 0 done, 1 failed, 2 bad usage, 128 + signal; and one clear message with each but the first."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from thresher.protos.errors import ConfigurationError, ThresherError


@contextmanager
def errors_told(console: Console) -> Iterator[None]:
    """Turn our errors into one clear message and an exit code."""
    try:
        yield
    except ConfigurationError as error:
        console.print(f"thresher: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except ThresherError as error:
        console.print(f"thresher: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(128 + getattr(error, "number", -127)) from None
    except OSError as error:  # a full disk, a folder that may not be written to
        console.print(f"thresher: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
