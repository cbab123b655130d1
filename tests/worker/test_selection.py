"""Selection: a feedback with one threshold for the run."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.update import Update
from thresher.worker import Method, Settings
from thresher.worker.placement import Message
from thresher.worker.selection import Selection

NUMEL = 8
LAYOUT = Layout((TensorSpec("a", (NUMEL,), "float32"),))

messages = st.lists(st.floats(-8, 8, width=32), min_size=NUMEL, max_size=NUMEL).map(torch.tensor)
powers = st.sampled_from([0.25, 0.5, 1.0, 2.0])


def selection(method: Method, factor: float = 1.0) -> Selection:
    settings = Settings(("127.0.0.1:1",), rank=0, workers=1, method=method, threshold_factor=factor)
    return Selection(settings, LAYOUT, ({"lr": 0.5},))


def message(vector: Tensor, scale: float = 1.0) -> Message:
    return Message(vector * scale, (True,), scale, rate=scale, finite=False)


def update(threshold: float | None, elements: int = 0) -> Update:
    return Update(1, 1, (0,), None, (True,), next_threshold=threshold, pushed_elements=elements)


@given(st.lists(messages, min_size=1, max_size=6), st.sampled_from([0.125, 1.0, 4.0]), powers)
def test_scaling_the_unit_scales_what_is_sent(inputs: list[Tensor], threshold: float, scale: float) -> None:
    """C_γ(x) = γ·C(x/γ): messages in units of γ gradients, with γλ, select as gradients do with λ."""
    plain, scaled = selection(Method(threshold=threshold)), selection(Method(threshold=threshold))
    for number, vector in enumerate(inputs):
        expected = plain.select(message(vector), number)
        found = scaled.select(message(vector, scale), number)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values, expected.values * scale)
        assert torch.equal(scaled.residual, plain.residual * scale)


@given(st.lists(messages, min_size=1, max_size=4), st.sampled_from([0.5, 2.0]))
def test_a_factor_is_one_workers_own(inputs: list[Tensor], factor: float) -> None:
    """A worker with a slow uplink multiplies the run's λ, which itself stays what it is."""
    plain, own = selection(Method(threshold=1.0 * factor)), selection(Method(threshold=1.0), factor)
    for number, vector in enumerate(inputs):
        assert own.select(message(vector), number).equals(plain.select(message(vector), number))
    assert own.threshold == 1.0


def test_random_choices_follow_the_round() -> None:
    """Two workers in one round choose the same coordinates; in another round others."""
    chosen = [
        selection(Method("RandomK(0.25)")).select(message(torch.ones(NUMEL)), number).indices.tolist()
        for number in (0, 0, 1, 2, 3)
    ]
    assert chosen[0] == chosen[1]
    assert any(other != chosen[0] for other in chosen[2:])


def test_before_the_first_proposal_each_worker_keeps_its_largest() -> None:
    """The first round of a run without λ sends the wanted density of the worker's own gradient."""
    for rule in ("budget", "calibrated"):
        sent = selection(Method(density=0.25, rule=rule)).select(message(torch.arange(1.0, NUMEL + 1)), 0)
        assert sent.values.tolist() == [7.0, 8.0]


def test_a_skipped_round_proposes_what_was() -> None:
    """Nothing is learned from a round in which this worker had nothing to say."""
    for rule in ("budget", "calibrated"):
        one = selection(Method(density=0.25, rule=rule))
        assert one.propose(None, None) is None
        one.adopt([update(3.0)])
        assert one.propose(None, None) == 3.0


def test_no_news_is_no_new_threshold() -> None:
    """An update without a threshold leaves the one in force."""
    one = selection(Method(threshold=2.0))
    one.adopt([update(None)])
    assert one.threshold == 2.0


def test_methods_without_a_threshold_propose_none() -> None:
    """Top-k and identity have none, from the first round to the last."""
    for method, count in ((Method("Identity"), NUMEL), (Method("TopK(0.5)"), NUMEL // 2)):
        one = selection(method)
        heard = message(torch.arange(1.0, NUMEL + 1))
        sent = one.select(heard, 0)
        assert one.propose(heard, sent) is None
        assert sent.count == count
