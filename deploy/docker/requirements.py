"""Prints what Thresher needs, as pip reads it: `python requirements.py pyproject.toml EXTRA,EXTRA`."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extras = [extra for extra in sys.argv[2].split(",") if extra]
needed = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
print("\n".join(needed))
