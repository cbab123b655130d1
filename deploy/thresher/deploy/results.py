"""What a run leaves behind: numbers, the per-iteration file, the final model."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, final

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from thresher.deploy.whole_files import write_whole
from thresher.protos.accounting import compression_ratio, dense_bytes
from thresher.protos.errors import ConfigurationError, ProtocolError
from thresher.protos.layout import Layout
from thresher.protos.replica import whole_optimizer_state
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.snapshot import Snapshot


@final
@dataclass(frozen=True, slots=True)
class RunResult:
    """One run in numbers.

    Attributes:
        accuracy: As the script printed it last, of rank 0; None when it printed none.
        loss: Likewise.
        steps: Rounds closed; by the shard that closed most, where shards close rounds for themselves.
        versions: Rounds closed by each shard.
        push_bytes: Bytes of exchange messages from workers to shards.
        pull_bytes: Bytes of exchange messages from shards to workers.
        dense_bytes: What the same pushes and updates would be as dense float32, both directions, without framing.
        mean_density: Elements pushed over elements that could have been pushed, calibration included.
        compression_ratio: ``dense_bytes / (push_bytes + pull_bytes)``.
        seconds: From the start of the first process to the end of the last worker.
    """

    accuracy: float | None
    loss: float | None
    steps: int
    versions: list[int]
    push_bytes: int
    pull_bytes: int
    dense_bytes: int
    mean_density: float
    compression_ratio: float
    seconds: float


def summarize(statistics: Sequence[pb.StatisticsResponse], printed: Mapping[str, Any], seconds: float) -> RunResult:
    """Add up what the shards counted and what rank 0 printed."""
    workers = [(shard, worker) for shard in statistics for worker in shard.workers]
    push = sum(worker.push_bytes for _, worker in workers)
    pull = sum(worker.pull_bytes for _, worker in workers)
    pushable = sum(worker.pushable_elements for _, worker in workers)
    versions = [shard.version for shard in statistics]
    return RunResult(
        accuracy=_printed_number(printed, "accuracy"),
        loss=_printed_number(printed, "loss"),
        steps=max(versions),
        versions=versions,
        push_bytes=push,
        pull_bytes=pull,
        dense_bytes=dense_bytes(pushable),
        mean_density=sum(worker.pushed_elements for _, worker in workers) / pushable if pushable else 0.0,
        compression_ratio=compression_ratio(pushable, push + pull),
        seconds=seconds,
    )


def write_results(path: Path, results: Mapping[str, RunResult], **facts: int) -> None:
    """Write ``result.json``: one object per run, and the facts they share."""
    document = {**{name: asdict(result) for name, result in results.items()}, **facts}
    write_whole(path, json.dumps(document, indent=2) + "\n")


def read_results(path: Path) -> dict[str, RunResult]:
    """Return the runs that ``result.json`` holds, by name; none where there is no file.

    Raises:
        ConfigurationError: when it cannot be read.
    """
    if not path.exists():
        return {}
    text = _text_of(path)
    try:
        document = json.loads(text)
        return {name: RunResult(**one) for name, one in document.items() if isinstance(one, dict)}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} holds no results: {error}; remove it to have them made again") from None


def results_table(results: Mapping[str, RunResult]) -> Table:
    """Set runs beside each other."""
    table = Table(title="Result")
    table.add_column("")
    rows: list[tuple[str, list[str]]] = [
        ("test accuracy", [_number(r.accuracy, ".2%") for r in results.values()]),
        ("loss", [_number(r.loss, ".4f") for r in results.values()]),
        ("steps", [_span(r.versions) for r in results.values()]),
        ("bytes pushed", [bytes_text(r.push_bytes) for r in results.values()]),
        ("bytes pulled", [bytes_text(r.pull_bytes) for r in results.values()]),
        ("mean density", [f"{r.mean_density:.2%}" for r in results.values()]),
        ("compression ratio", [f"{r.compression_ratio:.1f}" for r in results.values()]),
        ("seconds", [f"{r.seconds:.1f}" for r in results.values()]),
    ]
    for name in results:
        table.add_column(name, justify="right")
    for title, cells in rows:
        table.add_row(title, *cells)
    return table


def bytes_text(count: float) -> str:
    """Return a byte count for people, in decimal units.

    >>> bytes_text(999), bytes_text(1_234_567)
    ('999 B', '1.23 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def read_bytes(text: str) -> int:
    """Return the byte count that people write, in decimal units: the inverse of `bytes_text`, up to its digits.

    Raises:
        ConfigurationError: when it is none, or below 1.

    >>> read_bytes("500MB"), read_bytes("1.5 GB"), read_bytes("2000")
    (500000000, 1500000000, 2000)
    """
    found = re.fullmatch(r"([0-9.]+)\s*(k|M|G|T)?B?", text.strip())
    try:
        count = int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " ")) if found else 0
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigurationError(f"{text!r} is no number of bytes; write it as 500MB, 2GB or 1000000")
    return count


def merge_iterations(parts: Iterable[Path], whole: Path, *, lockstep: bool) -> None:
    """Fold the shards' per-iteration files into one, in order of versions.

    In lockstep it has a row per round of the whole model: counts add up over shards, the squared residual norm too;
    times are those of the slowest shard, for each contributor by itself where they say how long its push has waited.
    Elsewhere shards close rounds for themselves, and those of one version need
    not be of the same pushes: the file has a row per round of each shard, with its ``shard``.

    Raises:
        ConfigurationError: when one of them cannot be read.
    """
    rows = [json.loads(line) for part in parts for line in _text_of(part).splitlines()]
    keys = ("version",) if lockstep else ("version", "shard")
    key = itemgetter(*keys)
    rows.sort(key=key)
    with whole.open("w", encoding="utf-8") as file:
        for _, group in groupby(rows, key=key):
            file.write(json.dumps(_merged(list(group), keys)) + "\n")


def _merged(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    first = rows[0]
    numel = sum(row["numel"] for row in rows)
    summed = ("push_bytes", "pull_bytes", "pushed_elements", "update_elements", "residual_squared")
    total = {name: sum(row[name] for row in rows) for name in summed}
    shared = (*keys, "members", "contributors", "skipped", "only_mean", "threshold", "learning_rate")
    return {
        "time": max(row["time"] for row in rows),
        **{name: first[name] for name in shared},
        "numel": numel,
        **total,
        "push_density": sum(row["push_density"] * row["numel"] for row in rows) / numel,
        "update_density": total["update_elements"] / numel,
        "residual_norm": math.sqrt(total["residual_squared"]),
        "round_seconds": max(row["round_seconds"] for row in rows),
        "barrier_seconds": _longest_waits(first["contributors"], rows),
    }


def _longest_waits(ranks: Sequence[int], rows: Iterable[Mapping[str, Any]]) -> list[float] | None:
    """Return for each rank how long its push has waited where it waited longest; None where a shard does not know."""
    longest = dict.fromkeys(ranks, 0.0)
    for row in rows:
        if row.get("barrier_seconds") is None:
            return None
        for rank, seconds in zip(row["contributors"], row["barrier_seconds"], strict=True):
            if rank in longest:
                longest[rank] = max(longest[rank], seconds)
    return list(longest.values())


def save_model(path: Path, snapshots: Sequence[Snapshot], *, lockstep: bool) -> None:
    """Write the model that the workers see, whole, as safetensors: ``model.load_state_dict`` takes it.

    Outside of lockstep each shard closes rounds, and returns pushes, for itself: there a model is a vector of versions.
    The file's metadata has them as ``versions``, by shard.

    Args:
        path: Where it goes.
        snapshots: Of all shards, when nobody pushes any more.
        lockstep: As `Consistency.lockstep` of the run.

    Raises:
        ProtocolError: in lockstep, when the shards are not at one version.
    """
    versions = {snapshot.version for snapshot in snapshots}
    if lockstep and len(versions) != 1:
        raise ProtocolError(
            f"the shards are at versions {sorted(versions)}; in lockstep a model is whole at one version only"
        )
    untrained = {name: value for snapshot in snapshots for name, value in snapshot.untrained.items()}
    parameters = torch.cat([snapshot.visible for snapshot in snapshots])
    save_file(model_tensors(snapshots[0].layout, parameters, untrained), path, _versions_of(snapshots))


def save_optimizer(path: Path, snapshots: Sequence[Snapshot]) -> None:
    """Write the optimizer state that the shards hold, whole: ``<parameter>/<key>``, as safetensors.

    The file's metadata has the shards' ``versions``, as that of the model.
    """
    layout = snapshots[0].layout
    whole = whole_optimizer_state(layout, [snapshot.state for snapshot in snapshots])
    named = {f"{layout.trained[tensor].name}/{key}": value for (tensor, key), value in whole.items()}
    save_file(named, path, _versions_of(snapshots))


def _versions_of(snapshots: Sequence[Snapshot]) -> dict[str, str]:
    return {"versions": json.dumps([snapshot.version for snapshot in snapshots])}


def model_tensors(layout: Layout, parameters: Tensor, untrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model by name, as its ``state_dict`` has them.

    Parameters are cast to the types of the model; tied parameters appear under each of their names.

    Args:
        layout: Of the model.
        parameters: All trained elements, [layout.numel] float32.
        untrained: The other tensors, by name.
    """
    tensors: dict[str, Tensor] = {}
    for spec, begin in zip(layout.trained, layout.offsets, strict=False):
        value = parameters[begin : begin + spec.numel].view(spec.shape).to(getattr(torch, spec.dtype))
        for name in (spec.name, *spec.aliases):
            tensors[name] = value.clone()
    for spec in layout.untrained:
        for name in (spec.name, *spec.aliases):
            tensors[name] = untrained[spec.name].clone()
    return tensors


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}; mend what keeps it from being read, and try again"
        ) from None


def _printed_number(printed: Mapping[str, Any], key: str) -> float | None:
    value = printed.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} … {most}"
