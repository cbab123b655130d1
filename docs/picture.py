"""Draws docs/images/launch.svg from a real run: the live display in the middle of it, and the table at its end.

python docs/picture.py
"""

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

from thresher.deploy.display import Picture, table_of
from thresher.deploy.launch import LaunchConfig, StopSignals, launch
from thresher.deploy.results import results_table
from thresher.worker import Method

ROOT = Path(__file__).parent.parent


def main() -> None:
    pictures: list[Picture] = []
    config = LaunchConfig((str(ROOT / "examples" / "digits.py"),), shards=2, workers=4, method=Method(density=0.01))
    with tempfile.TemporaryDirectory() as folder, StopSignals() as stop:
        results = launch(config, Path(folder) / "run", pictures.append, stop, baseline=True)
    sparse = [picture for picture in pictures if picture.title.startswith("sparse") and picture.shards]
    console = Console(record=True, width=100, force_terminal=True, file=io.StringIO())
    console.print("$ thresher launch --shards 2 --workers 4 --density 0.01 --baseline examples/digits.py\n")
    console.print(table_of(min(sparse, key=lambda picture: abs(picture.shards[0].version - 240))))
    console.print()
    console.print(results_table(results))
    drawing = console.export_svg(title="thresher launch")
    # Without the fonts that it would load over the network: any monospaced one will do.
    drawing = re.sub(r"@font-face \{[^}]*\}|<!--.*?-->", "", drawing, flags=re.DOTALL)
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    (ROOT / "docs" / "images" / "launch.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
