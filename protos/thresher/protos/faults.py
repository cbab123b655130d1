"""Named places in the code at which a test, a storm or a curious operator may kill a process.

Nothing is armed unless a plan is: with `plan`, in the same process; with ``THRESHER_FAULTS=FOLDER`` by a file in that
folder, named after the process (``shard-1``, ``worker-0``) and holding the name of a place. A process that reaches a
place named in its file removes the file and kills itself with SIGKILL.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

Plan = Callable[[str, str], None]
"""Called with who (``shard 1``) and where (``append``); what it raises strikes there."""

PHASES: Final = (
    "gradient", "compress", "flip", "in flight",
    "round open", "apply", "append", "tell", "checkpoint", "recovery",
)  # fmt: skip
"""The places: at a worker a gradient is there, is compressed, is half kept, is on its way; at a shard a push has come,
a round is applied in memory, a record of it is half written, is on disk and told to nobody, a checkpoint is being
written, a recovery is half done."""

VARIABLE: Final = "THRESHER_FAULTS"

_plan: Plan | None = None


def reached(who: str, phase: str) -> None:
    """Say that ``who`` is at a place; returns unless a plan strikes there."""
    if _plan is not None:
        _plan(who, phase)


@contextmanager
def plan(strike: Plan) -> Iterator[None]:
    """Have ``strike`` called at every place until the block ends."""
    global _plan  # noqa: PLW0603 - one plan for the process: the places know no other way to it
    before, _plan = _plan, strike
    try:
        yield
    finally:
        _plan = before


def armed_by_files(folder: Path) -> Plan:
    """Return the plan that looks for files in ``folder``."""

    def strike(who: str, phase: str) -> None:
        file = folder / who.replace(" ", "-")
        try:
            armed = file.read_text(encoding="utf-8").strip()
        except OSError:
            return
        if armed == phase:
            file.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


if VARIABLE in os.environ:
    _plan = armed_by_files(Path(os.environ[VARIABLE]))
