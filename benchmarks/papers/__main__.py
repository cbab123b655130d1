"""The figures and tables of the two papers, repeated.

    python -m benchmarks.papers [NAME …] [--full] [--fresh] [--jobs 2] [--data FOLDER]
    python -m benchmarks.papers [NAME …] --draw

Without names, all of them. Each writes results/NAME.csv, results/NAME.json, docs/images/papers-NAME.png and its table
in docs/papers.md, and brings results/oracles.json up to date. A finished run is kept in runs/papers/ and not made again
until the module that makes it, or one that this imports from here, changes: what was interrupted goes on where it was.
--fresh makes all of them again; --draw makes figures and tables again, from the rows as they are.
"""

import argparse
from pathlib import Path
from typing import Final

from benchmarks.papers import results
from benchmarks.papers.running import recipe_of, run

NAMES: Final = (
    "convex_star",
    "convex_sgd",
    "convex_diana",
    "stability",
    "theory",
    "through_shards",
    "rates",
    "thresholds",
    "density",
    "growth",
    "layerwise",
    "without_feedback",
    "momentum",
    "accordion",
    "detached",
    "adaptive",
    "scales",
    "beyond",
)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description="Repeat the figures and tables of the two papers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--full", action="store_true", help="as long as the figures need, instead of twenty minutes")
    parser.add_argument("--fresh", action="store_true", help="make finished runs again")
    parser.add_argument("--draw", action="store_true", help="run nothing: draw the figures again, from the tables")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one core each")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="FOLDER", help="of the data sets")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(NAMES)):
        parser.error(f"no recipe is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    names = [name for name in NAMES if name in asked.names or not asked.names]
    if asked.draw:
        for name in names:
            results.draw(recipe_of(name))
        return
    run(names, "full" if asked.full else "short", jobs=asked.jobs, folder=asked.data, fresh=asked.fresh)


if __name__ == "__main__":
    main()
