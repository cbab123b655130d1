"""The figures of what is made up of parts: seconds by phase, bytes by shard, elements by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from thresher.deploy.report.rounds import WHOLE
from thresher.deploy.report.rows import Numbers
from thresher.deploy.report.runs import Run
from thresher.deploy.report.series import LeftOut
from thresher.deploy.report.steps import Worker
from thresher.deploy.report.thinning import stretches, thin
from thresher.deploy.results import bytes_text

PHASES: Final = ("compute", "compress", "wait", "exchange")
"""Where the time of a step goes, in the order in which it does."""

SPANS: Final = 100
"""Stretches of iterations that layers are shown by."""


@final
@dataclass(frozen=True, slots=True)
class RunTime:
    """Where the time of one run went, as a mean over its workers.

    Attributes:
        run: Position of the run.
        name: Its name.
        iteration: Where the stretches are, [points].
        seconds: Of an iteration in each stretch, by phase, [points] each.
        total: Of the run, by phase.
        longest: The longest iteration: its seconds, and its number.
    """

    run: int
    name: str
    iteration: Numbers
    seconds: Mapping[str, Numbers]
    total: Mapping[str, float]
    longest: tuple[float, int]


@final
@dataclass(frozen=True, slots=True)
class Times:
    """The figure of where the time went: a picture over iterations for each run, and the totals of all."""

    name: str
    title: str
    caption: tuple[str, ...]
    runs: tuple[RunTime, ...]

    def table(self) -> Iterator[Sequence[Any]]:
        """Yield the numbers, a header first: a line per stretch, and one with the totals at ``all``."""
        yield "run", "iteration", *(f"{phase}_seconds" for phase in PHASES)
        for run in self.runs:
            for at, *seconds in zip(run.iteration, *(run.seconds[phase] for phase in PHASES), strict=True):
                yield run.name, float(at), *map(float, seconds)
            yield run.name, "all", *(run.total[phase] for phase in PHASES)


@final
@dataclass(frozen=True, slots=True)
class ShardBar:
    """Bytes between one shard and all workers.

    Attributes:
        run: Position of the run.
        name: Its name.
        shard: Number of the shard.
        up: Bytes pushed to it.
        down: Bytes pulled from it.
    """

    run: int
    name: str
    shard: int
    up: float
    down: float


@final
@dataclass(frozen=True, slots=True)
class ShardBytes:
    """The figure of bytes by shard and direction."""

    name: str
    title: str
    caption: tuple[str, ...]
    bars: tuple[ShardBar, ...]

    def table(self) -> Iterator[Sequence[Any]]:
        """Yield the numbers, a header first: a line per shard."""
        yield "run", "shard", "push_bytes", "pull_bytes"
        for bar in self.bars:
            yield bar.name, bar.shard, bar.up, bar.down


@final
@dataclass(frozen=True, slots=True)
class RunLayers:
    """Density by layer of one run.

    Attributes:
        name: The run.
        layers: Names of its tensors.
        iteration: The last of each span, [spans].
        density: Of the pushes, [layers, spans]; NaN where no row says it.
        mean: Over all spans, [layers].
    """

    name: str
    layers: tuple[str, ...]
    iteration: Numbers
    density: Numbers
    mean: Numbers


@final
@dataclass(frozen=True, slots=True)
class LayerDensity:
    """The figure of density by layer: a map for each run."""

    name: str
    title: str
    caption: tuple[str, ...]
    runs: tuple[RunLayers, ...]

    def table(self) -> Iterator[Sequence[Any]]:
        """Yield the numbers, a header first: a line per layer and span."""
        yield "run", "layer", "iteration", "density"
        for run in self.runs:
            for layer, row in zip(run.layers, run.density, strict=True):
                for at, density in zip(run.iteration, row, strict=True):
                    yield run.name, layer, float(at), float(density)


def time_figure(runs: Sequence[Run]) -> Times | LeftOut:
    """Return where the time went, of the runs whose workers and shards say it."""
    title = "Where the time went"
    parts = tuple(part for position, run in enumerate(runs) if (part := _run_time(position, run)) is not None)
    if not parts:
        return LeftOut(title, "no run has worker-N.iterations.jsonl, and barrier_seconds in its shards' rows")
    caption = (
        *map(_time_text, parts),
        "Means over the workers of a run.",
        *_missing(runs, [one.name for one in parts]),
    )
    return Times("time", title, caption, parts)


def _run_time(position: int, run: Run) -> RunTime | None:
    steps = [_phases(rank, worker, run) for rank, worker in run.workers.items() if f"wait {rank}" in run.rounds]
    if not steps:
        return None
    versions = np.unique(np.concatenate([version for version, _ in steps]))
    mean = {phase: _mean_over(versions, [(v, seconds[phase]) for v, seconds in steps]) for phase in PHASES}
    whole = np.asarray(sum(mean.values()))
    thinned = {phase: thin(versions, seconds) for phase, seconds in mean.items()}
    total = {phase: sum(float(seconds[phase].sum()) for _, seconds in steps) / len(steps) for phase in PHASES}
    longest = int(whole.argmax())
    return RunTime(
        position, run.name, thinned["compute"].x, {phase: one.mean for phase, one in thinned.items()}, total,
        (float(whole[longest]), int(versions[longest])),
    )  # fmt: skip


def _phases(rank: int, worker: Worker, run: Run) -> tuple[Numbers, dict[str, Numbers]]:
    """Return the versions of a worker's steps, and its seconds by phase; the shards' wait is taken from exchange.

    A step waits in the round that makes its version; where that was a round without it, it did not wait.
    """
    version, exchange = worker.columns["version"], worker.columns["exchange_seconds"]
    place = np.searchsorted(run.rounds["version"], version).clip(max=run.rounds["version"].size - 1)
    is_there = run.rounds["version"][place] == version
    wait = np.minimum(np.nan_to_num(np.where(is_there, run.rounds[f"wait {rank}"][place], 0.0)), exchange)
    return version, {
        "compute": worker.columns["compute_seconds"],
        "compress": worker.columns["compress_seconds"],
        "wait": wait,
        "exchange": exchange - wait,
    }


def _mean_over(versions: Numbers, parts: Sequence[tuple[Numbers, Numbers]]) -> Numbers:
    """Return the mean at each version, over the workers that have a step there."""
    total, count = np.zeros(versions.size), np.zeros(versions.size)
    for version, seconds in parts:
        place = np.searchsorted(versions, version)
        np.add.at(total, place, seconds)
        np.add.at(count, place, 1.0)
    return total / count


def _time_text(part: RunTime) -> str:
    whole = sum(part.total.values()) or 1.0
    shares = ", ".join(f"{phase} {seconds:.3g} s ({seconds / whole:.0%})" for phase, seconds in part.total.items())
    seconds, iteration = part.longest
    return f"{part.name}: {shares}; iteration {iteration} is the longest with {seconds:.3g} s."


def shard_figure(runs: Sequence[Run]) -> ShardBytes | LeftOut:
    """Return the bytes of each shard, of the runs whose rows tell shards apart."""
    title = "Bytes by shard and direction"
    bars = tuple(
        ShardBar(position, run.name, shard, float(columns["push_bytes"].sum()), float(columns["pull_bytes"].sum()))
        for position, run in enumerate(runs)
        for shard, columns in sorted(run.shards.items())
        if shard != WHOLE
    )
    if not bars:
        return LeftOut(title, "no run has the files of its shards, shard-N.iterations.jsonl")
    names = list(dict.fromkeys(bar.name for bar in bars))
    caption = tuple(f"{name}: {', '.join(_bar_text(bar) for bar in bars if bar.name == name)}." for name in names)
    return ShardBytes("shards", title, (*caption, *_missing(runs, names)), bars)


def _bar_text(bar: ShardBar) -> str:
    return f"shard {bar.shard} {bytes_text(bar.up)} up and {bytes_text(bar.down)} down"


def layer_figure(runs: Sequence[Run]) -> LayerDensity | LeftOut:
    """Return the density of each layer, of the runs that have their workers' rows and a saved model."""
    title = "Density by layer"
    parts = tuple(part for run in runs if (part := _run_layers(run)) is not None)
    if not parts:
        return LeftOut(
            title,
            "no run has both worker-N.iterations.jsonl with layers, and model.safetensors, which is written at the end "
            "and says how large the layers are",
        )
    caption = (*map(_layer_text, parts), *_missing(runs, [part.name for part in parts]))
    return LayerDensity("layers", title, caption, parts)


def _run_layers(run: Run) -> RunLayers | None:
    rows = {rank: worker for rank, worker in run.workers.items() if worker.layer_versions.size}
    sizes = {name: size for name, size in run.layer_sizes.items() if any(name in one.layers for one in rows.values())}
    if not sizes:
        return None
    versions = np.unique(np.concatenate([worker.layer_versions for worker in rows.values()]))
    starts = stretches(versions.size, SPANS)
    pushed, could = np.zeros((len(sizes), starts.size)), np.zeros((len(sizes), starts.size))
    for worker in rows.values():
        span = np.searchsorted(versions[starts], worker.layer_versions, side="right") - 1
        for layer, (name, size) in enumerate(sizes.items()):
            if name in worker.layers:
                there = np.isfinite(worker.layers[name])
                np.add.at(pushed[layer], span[there], worker.layers[name][there])
                np.add.at(could[layer], span[there], size)
    density = np.divide(pushed, could, out=np.full_like(pushed, np.nan), where=could > 0)
    ends = np.append(starts[1:], versions.size) - 1
    return RunLayers(run.name, tuple(sizes), versions[ends], density, pushed.sum(1) / could.sum(1))


def _layer_text(part: RunLayers) -> str:
    most, least = int(part.mean.argmax()), int(part.mean.argmin())
    if part.mean[most] == part.mean[least]:
        return f"{part.name}: each of {len(part.layers)} layers has {part.mean[most]:.2%} on average."
    return (
        f"{part.name}: {part.layers[most]} is the densest of {len(part.layers)} layers with {part.mean[most]:.2%} on "
        f"average, {part.layers[least]} the sparsest with {part.mean[least]:.2%}."
    )


def _missing(runs: Sequence[Run], shown: Sequence[str]) -> tuple[str, ...]:
    missing = [run.name for run in runs if run.name not in shown]
    return (f"Not shown, because their files do not say it: {', '.join(missing)}.",) if missing else ()
