"""All that was found, as one value: told in a sentence, as tables, and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from rich.console import Console

from thresher.deploy.advise.delays import Delay
from thresher.deploy.advise.link import Link, Way
from thresher.deploy.advise.model import Model
from thresher.deploy.advise.past import PastRun
from thresher.deploy.advise.prediction import (
    PARTS,
    Group,
    Prediction,
    best,
    break_even,
    fastest_compressed,
    predict,
)
from thresher.deploy.advise.rates import rate_text
from thresher.deploy.advise.rehearsal import Costs
from thresher.deploy.advise.samples import Sample, exactly, middle
from thresher.deploy.results import bytes_text
from thresher.deploy.watching_columns import Row, fitting


@final
@dataclass(frozen=True, slots=True)
class Advice:
    """What was measured, and what follows.

    Attributes:
        model: What is to be trained.
        costs: Of each setting, from the mildest on: first, of everything.
        workers: How many train.
        here: How many of them share a host.
        shards: How many shards.
        link: To the shards; None where nothing is known of it.
        compute: Seconds of the passes of a step; None where nothing says so.
        past: An earlier run, if there is one.
    """

    model: Model
    costs: Sequence[Costs]
    workers: int
    here: int
    shards: int
    link: Link | None
    compute: Sample | None
    past: PastRun | None

    @property
    def group(self) -> Group:
        """Who trains."""
        return Group(self.workers, self.here, exactly(0.0) if self.compute is None else self.compute)

    def predictions(self) -> list[Prediction]:
        """Return one for each setting, in their order; none without a link."""
        return [] if self.link is None else [predict(one, self.link, self.group) for one in self.costs]

    def break_even(self, sparse: Costs) -> float | None:
        """Return the bandwidth below which a setting is faster than everything, as `prediction.break_even` does."""
        each = [[shard] for shard in range(self.shards)]
        hosts = each if self.link is None else [shards for shards, _ in self.link.hosts()]
        return break_even(self.costs[0], sparse, hosts, self.group)

    def compared(self, predictions: Sequence[Prediction]) -> Costs:
        """Return the setting whose break-even is told: the advised one, or the one that comes nearest to paying."""
        if not predictions:
            return self.costs[-1]
        chosen = best(predictions)
        return (fastest_compressed(predictions) if chosen.costs.setting.is_everything else chosen).costs


def sentence(advice: Advice, predictions: Sequence[Prediction]) -> str:
    """Return what to do, and why."""
    compared = advice.compared(predictions)
    where = _where(advice, compared)
    if not predictions:
        return f"Nothing is known of the link, so no step is predicted. {where}"
    dense, chosen = predictions[0], best(predictions)
    if chosen is dense:
        other = fastest_compressed(predictions)
        return (
            f"Compressing does not pay here: send everything ({dense.costs.setting.options}). A step takes "
            f"{_span(dense)}, and {_span(other)} with {other.costs.setting.options}. {where}"
        )
    surely = "" if chosen.high < dense.low else " The two overlap: measure again, or try both."
    return (
        f"Compressing pays: {chosen.costs.setting.options} takes {_span(chosen)} a step instead of {_span(dense)} with "
        f"everything sent, {dense.seconds / chosen.seconds:.1f} times as fast.{surely} {where} What it does to the "
        "accuracy only a run can tell."
    )


def _where(advice: Advice, compared: Costs) -> str:
    bandwidth, options = advice.break_even(compared), compared.setting.options
    if bandwidth is None:
        return f"{options} costs this machine no more than sending everything, so no bandwidth is too large for it."
    if not bandwidth:
        return f"{options} saves no bytes, so it pays at no bandwidth."
    return f"{options} is the faster where links carry less than {rate_text(bandwidth)}."


def _span(prediction: Prediction) -> str:
    return f"{prediction.seconds:.3g} s ({prediction.low:.3g} … {prediction.high:.3g})"


def document(advice: Advice) -> dict[str, Any]:
    """Return all of it as JSON has it; docs/advise.md lists the fields. What is not known is null."""
    predictions = advice.predictions()
    link, past, compute = advice.link, advice.past, advice.compute
    return {
        "link": [] if link is None else [_way(way) for way in (*link.alone, link.together)],
        "delays": {} if link is None else {"up": _delay(link.up_delay), "down": _delay(link.down_delay)},
        "machine": {
            "settings": [
                {
                    "setting": one.setting.options,
                    "compress_seconds": middle(one.compress),
                    "shard_seconds": middle(one.shard),
                    "replay_seconds": middle(one.replay),
                    "compress_elements_per_second": advice.model.numel / middle(one.compress),
                }
                for one in advice.costs
            ]
        },
        "model": {
            "name": advice.model.name,
            "numel": advice.model.numel,
            "tensors": len(advice.model.sizes),
            "optimizer": advice.model.optimizer.name,
            "compute_seconds": None if compute is None else middle(compute),
            "workers": advice.workers,
            "workers_here": advice.here,
            "shards": advice.shards,
        },
        "run": None if past is None else _run(past),
        "predictions": [_prediction(one) for one in predictions],
        "break_even_bandwidth": advice.break_even(advice.compared(predictions)),
        "break_even_setting": advice.compared(predictions).setting.options,
        "advice": sentence(advice, predictions),
    }


def _way(way: Way) -> dict[str, Any]:
    return {
        "name": way.name,
        "round_trip_seconds": middle(way.round_trip),
        "up_bytes_per_second": middle(way.up),
        "down_bytes_per_second": middle(way.down),
    }


def _delay(delay: Delay) -> list[dict[str, Any]]:
    return [
        {"bytes": size, "seconds": middle(seconds)} for size, seconds in zip(delay.sizes, delay.seconds, strict=True)
    ]


def _run(past: PastRun) -> dict[str, Any]:
    return {
        "name": past.name,
        "density": past.density,
        "update_density": past.update_density,
        "push_bytes": past.push_bytes,
        "pull_bytes": past.pull_bytes,
        "step_seconds": past.step_seconds,
    }


def _prediction(one: Prediction) -> dict[str, Any]:
    return {
        "setting": one.costs.setting.options,
        "density": one.costs.setting.density,
        "update_density": one.costs.update_density,
        "seconds": one.seconds,
        "low": one.low,
        "high": one.high,
        "up_bytes": sum(one.costs.push_bytes),
        "down_bytes": sum(one.costs.pull_bytes),
        "parts": {part: getattr(one, part) for part in PARTS},
    }


def show(advice: Advice, console: Console) -> None:
    """Print the tables and the sentence."""
    predictions = advice.predictions()
    who = f"{advice.model.name}, {advice.model.optimizer.name}; workers: {advice.workers}, shards: {advice.shards}"
    console.print(who, highlight=False, markup=False, soft_wrap=True)
    if advice.link is not None:
        console.print(fitting("link", _link_rows(advice.link), console))
    rows = _step_rows(predictions) if predictions else _cost_rows(advice.costs)
    console.print(fitting("a step", rows, console))
    if advice.compute is None:
        note = "Computing is not known, and left out: name --compute SECONDS, or --run RUN."
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(sentence(advice, predictions), highlight=False, markup=False, soft_wrap=True)


def _link_rows(link: Link) -> list[Row]:
    ways = (*link.alone, link.together) if len(link.alone) > 1 else link.alone
    return [
        {
            "where": way.name,
            "round trip": _milliseconds(middle(way.round_trip)),
            "up": rate_text(middle(way.up)),
            "down": rate_text(middle(way.down)),
        }
        for way in ways
    ]


def _step_rows(predictions: Sequence[Prediction]) -> list[Row]:
    return [
        {
            "setting": one.costs.setting.name,
            "seconds": f"{one.seconds:.4f}",
            "low": f"{one.low:.4f}",
            "high": f"{one.high:.4f}",
            **_moved(one.costs),
            **{part: _milliseconds(getattr(one, part)) for part in PARTS},
        }
        for one in predictions
    ]


def _cost_rows(costs: Sequence[Costs]) -> list[Row]:
    return [
        {
            "setting": one.setting.name,
            **_moved(one),
            **{part: _milliseconds(middle(getattr(one, part))) for part in ("compress", "shard", "replay")},
        }
        for one in costs
    ]


def _moved(costs: Costs) -> dict[str, str]:
    return {"bytes up": bytes_text(sum(costs.push_bytes)), "bytes down": bytes_text(sum(costs.pull_bytes))}


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"
