"""``thresher report``: the command."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from thresher.deploy.exit_codes import errors_told
from thresher.protos.errors import ConfigurationError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, finished or not.")],
    output: Annotated[Path, typer.Option(help="The page: one HTML file that needs no network.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as PNG, and their numbers as CSV.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Draw runs side by side: bytes, density, accuracy, error, and where the time went."""
    with errors_told(Console(stderr=True)):
        try:
            from thresher.deploy.report import page
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"to draw a report takes the package {error.name}: pip install 'thresher[report]'"
            ) from None
        from thresher.deploy.report.runs import read_runs

        made = page.make_report(read_runs(runs))
        page.write_page(made, output)
        if figures is not None:
            page.write_figures(made, figures)
        if as_json:
            typer.echo(json.dumps({
                "output": str(output),
                "runs": [{"name": run.name, "notices": run.notices} for run in made.runs],
                "figures": [{"name": one.name, "title": one.title, "caption": one.caption} for one in made.figures],
                "left_out": [{"title": one.title, "why": one.why} for one in made.left_out],
            }))  # fmt: skip
        else:
            for run in made.runs:
                for notice in run.notices:
                    typer.echo(f"{run.name}: {notice}", err=True)
            typer.echo(str(output))
