"""From a question to all that the answer rests on: an earlier run, the link and the machine, measured in turn."""

from thresher.deploy.advise.advice import Advice
from thresher.deploy.advise.link import Link, given_link, measure_link
from thresher.deploy.advise.model import Model, load_model, model_of
from thresher.deploy.advise.past import PastRun, read_past
from thresher.deploy.advise.question import Question
from thresher.deploy.advise.rehearsal import rehearse
from thresher.deploy.advise.samples import Sample, exactly, middle
from thresher.deploy.advise.settings import pool_of, settings_for, update_density
from thresher.deploy.watching_places import Place
from thresher.protos.errors import ConfigurationError


def study(question: Question, place: Place | None) -> Advice:
    """Measure what has to be known.

    Args:
        question: What is asked; it is the last word wherever it says something.
        place: Where the shards are; None where there are none yet.

    Raises:
        ConfigurationError: when the model or the run is none, or the run of the shards has ended.
        ThresherError: as `measure_link` raises it.
    """
    if place is not None and place.outcome is not None and (outcome := place.outcome()):
        raise ConfigurationError(
            f"{place.name} has ended ({outcome}): name it as --run, and shards that serve, or --bandwidth"
        )
    past = None if question.run is None else read_past(question.run)
    compared = (past.density,) if past is not None and 0 < past.density < 1 else ()
    settings = settings_for([*question.densities, *compared])
    model = _model(question, past)
    workers = question.workers or (2 if past is None else past.workers)
    here = min(question.here, workers)
    compute = _compute(question, model, past)
    link = _link(question, past, place, compute)
    shards = _shards(question, past) if link is None else len(link.alone)
    pool = 1.0 if past is None else pool_of(past.density, past.update_density, past.workers)
    costs = rehearse(
        model, shards, workers, here, [(one, update_density(one.density, workers, pool)) for one in settings]
    )
    return Advice(model, costs, workers, here, shards, link, compute, past)


def _model(question: Question, past: PastRun | None) -> Model:
    if question.model is not None:
        return load_model(question.model)
    return model_of(question.parameters or (0 if past is None else past.numel))


def _shards(question: Question, past: PastRun | None) -> int:
    return question.shards or (1 if past is None else past.shards)


def _link(question: Question, past: PastRun | None, place: Place | None, compute: Sample | None) -> Link | None:
    if place is not None:
        idle = {} if compute is None else {"idle": middle(compute)}
        return measure_link(place, question.timeout, question.shard_bandwidth, **idle)
    if question.bandwidth is None:
        return None
    shards = _shards(question, past)
    return given_link(question.bandwidth, question.round_trip, shards, question.shard_bandwidth)


def _compute(question: Question, model: Model, past: PastRun | None) -> Sample | None:
    if question.compute is not None:
        return exactly(question.compute)
    return model.compute if model.compute is not None or past is None else past.compute
