"""Prints what Thresher needs, as pip reads it: `python requirements.py pyproject.toml EXTRA,EXTRA`."""

import sys
import tomllib
from pathlib import Path


def needed(project: Path, extras: list[str]) -> list[str]:
    """Requirements of the project, then those of its extras."""
    found = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return [*found["dependencies"], *(one for extra in extras for one in found["optional-dependencies"][extra])]


if __name__ == "__main__":
    print("\n".join(needed(Path(sys.argv[1]), [extra for extra in sys.argv[2].split(",") if extra])))
