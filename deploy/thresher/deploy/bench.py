"""``thresher bench``: what compressing, encoding and sending cost on this machine, beside what else there is."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from thresher.protos.errors import ConfigurationError

app = typer.Typer(no_args_is_help=True, help="Measure compressing, encoding and sending on this machine.")

_ELEMENTS = "25000000,250000000"
_DENSITIES = "1e-4,1e-3,1e-2,1e-1"


@app.command()
def compress(
    elements: Annotated[str, typer.Option(help="Sizes of the gradient, in float32 numbers.")] = _ELEMENTS,
    densities: Annotated[str, typer.Option(help="Fractions that are sent.")] = _DENSITIES,
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Add the residual, select, keep the rest: one pass over memory, beside torch's own operations."""
    from thresher.deploy.bench_compress import measure

    rows = measure(_numbers(elements, int), _numbers(densities, float), _numbers(threads, int))
    _show(rows, as_json=as_json, title="compress")


@app.command()
def wire(
    elements: Annotated[int, typer.Option(help="Length of the vector.")] = 25_000_000,
    densities: Annotated[str, typer.Option(help="Fractions that are sent.")] = _DENSITIES,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Bytes per element sent, and the speed of encoding and decoding on one thread."""
    from thresher.deploy.bench_wire import measure

    _show(measure(elements, _numbers(densities, float)), as_json=as_json, title="wire")


@app.command()
def transport(
    sizes: Annotated[str, typer.Option(help="Bytes that are handed over.")] = "100,100000000",
    repetitions: Annotated[int, typer.Option(min=1, help="Exchanges of each size; above 1 MiB a hundredth.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Hand bytes to another process: gRPC as workers and shards speak it, beside Ray's calls and object store."""
    from thresher.deploy.bench_transport import measure

    rows, missing = measure(_numbers(sizes, int), repetitions)
    _show(rows, as_json=as_json, title="transport")
    if missing:
        typer.echo(missing, err=True)


def _numbers(text: str, kind: type[Any]) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0:
        raise typer.BadParameter(f"{text!r} is no list of numbers above 0, such as 1,2")
    return numbers


def _show(rows: Sequence[Mapping[str, Any]], *, as_json: bool, title: str) -> None:
    if not rows:
        raise ConfigurationError("nothing was measured")
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def _cell(value: Any) -> str:  # noqa: ANN401 - whatever a measurement found
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
