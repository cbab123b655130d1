"""Accuracy, density and bytes over seeds: dense beside several thresholds, each a full `thresher launch`.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py fashion_mnist --data FOLDER

Every run is seeded alike in data order and starting weights, so that within a seed only what is sent differs. Prints a
table with mean and spread (smallest … largest), and writes every single run to the JSON file; runs that are in it
already are not repeated, so that an interrupted series goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).parent.parent / "examples"
# Thresholds, 0 being the dense run; chosen so that the mean density is near 1.5 % and near 0.5 %.
THRESHOLDS = {"digits": (0.0, 0.025, 0.05), "fashion_mnist": (0.0, 0.007, 0.014)}


def run(example: str, threshold: float, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Launch once on two shards and four workers; return its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--shards", "2", "--workers", "4", "--threshold", str(threshold), "--seed", str(seed), "--json"]
        script = [str(EXAMPLES / f"{example}.py"), "--seed", str(seed), *arguments]
        command = [sys.executable, "-m", "thresher.deploy", "launch", *options, "--runs", folder, *script]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"threshold": threshold, "seed": seed, **json.loads(done.stdout)["sparse"]}


def table_of(example: str, runs: Sequence[dict[str, Any]]) -> Table:
    """Set the thresholds beside each other."""
    table = Table(title=f"{example}, {len({one['seed'] for one in runs})} seeds: mean (smallest … largest)")
    for column in ("threshold", "test accuracy", "mean density", "compression ratio", "MB pushed", "MB pulled"):
        table.add_column(column, justify="right")
    for threshold in sorted({one["threshold"] for one in runs}):
        those = [one for one in runs if one["threshold"] == threshold]
        table.add_row(
            "dense" if threshold == 0 else f"{threshold:g}",
            _spread([100 * one["accuracy"] for one in those], "{:.2f} %"),
            _spread([100 * one["mean_density"] for one in those], "{:.2f} %"),
            _spread([one["compression_ratio"] for one in those], "{:.1f}"),
            _spread([one["push_bytes"] / 1e6 for one in those], "{:.1f}"),
            _spread([one["pull_bytes"] / 1e6 for one in those], "{:.1f}"),
        )
    return table


def _spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (form.format(value) for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({low} … {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=sorted(THRESHOLDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--thresholds", type=float, nargs="+")
    parser.add_argument("--output", type=Path)
    options, arguments = parser.parse_known_args()
    output = options.output or Path(f"accuracy-{options.example}.json")
    runs: list[dict[str, Any]] = json.loads(output.read_text())["runs"] if output.exists() else []
    done = {(one["seed"], one["threshold"]) for one in runs}
    thresholds = options.thresholds or THRESHOLDS[options.example]
    for seed, threshold in product(range(options.seeds), thresholds):
        if (seed, threshold) not in done:
            runs.append(run(options.example, threshold, seed, arguments))
            output.write_text(json.dumps({"example": options.example, "runs": runs}, indent=2))
    runs = [one for one in runs if one["threshold"] in thresholds and one["seed"] < options.seeds]
    Console(width=160).print(table_of(options.example, runs))


if __name__ == "__main__":
    main()
