"""The hook for DistributedDataParallel: the algorithm, whatever the buckets; an error on one worker reaches all."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ddp.ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thresher.compression import ErrorFeedback, Guarantee, HardThreshold, Round, Sparsifier, parse_feedback
from thresher.compression.base import FIRST_ROUND
from thresher.compression.catalogue import COMPRESSORS
from thresher.ddp import CompressionState, CompressionStatistics, compress
from thresher.ddp.transfer import HEADER_BYTES
from thresher.protos.codec import encode
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError, ProtocolError
from thresher.protos.mean import mean_of
from thresher.protos.sparse import SparseGradient

WORKERS = 2
SHAPES = {"a": (2, 3), "b": (), "c": (5,), "d": (0,), "e": (4, 1)}
LAST = len(SHAPES) - 1
ONE_EACH, ALL_IN_ONE = 1e-6, 25.0  # bucket_cap_mb

Gradients = dict[str, Tensor]
Steps = list[Gradients]

# These conserve to the bit; the others round, draw random numbers, or have a memory of another kind.
EXACT = ["HardThreshold(3.0)", "HardThreshold(0)", "TopK(0.3)", "Identity()", "RandomK(0.4)"]
METHODS = [*EXACT, "Quantized(TopK(0.5), QSGD(4))", "OneBit()", "UnbiasedRandomK(0.5)", "MomentumCorrection(TopK(0.3))"]
OPTIONS: list[Mapping[str, Any]] = [
    {"bucket_cap_mb": ONE_EACH},
    {"bucket_cap_mb": ALL_IN_ONE},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": ONE_EACH},
    {"find_unused_parameters": True},
    {"static_graph": True},
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(WORKERS) as started:
        yield started


class Given(nn.Module):
    """A model whose gradients are what it is given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, gradients: Gradients) -> Tensor:
        """A sum in which a parameter that is not given does not occur."""
        return torch.stack([(getattr(self, name) * given).sum() for name, given in gradients.items()]).sum()


def wrapped(method: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, CompressionState]:
    """The model, and the state it is hooked to."""
    model = DistributedDataParallel(Given(dtype), **options)
    state = CompressionState(model, method)
    model.register_comm_hook(state, compress)
    return model, state


def backward(model: DistributedDataParallel, gradients: Gradients) -> dict[str, Tensor | None]:
    """What the parameters get as their gradients."""
    model.zero_grad()
    model(gradients).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.module.named_parameters()}


def train(method: str, given: Sequence[Steps], options: Mapping[str, Any]) -> tuple[list[Any], Gradients, Any, int]:
    """On each rank: received gradients of each step, residuals, statistics, and the step at the end."""
    model, state = wrapped(method, **options)
    received = [backward(model, gradients) for gradients in given[dist.get_rank()]]
    return received, {name: state.residual(name).clone() for name in SHAPES}, state.statistics(), state.step


def reference(method: str, given: Sequence[Steps]) -> tuple[list[Gradients], list[Gradients], int]:
    """The same by the algorithm alone: received gradients, each rank's residuals, elements sent by rank 0."""
    feedbacks = [{name: parse_feedback(method, [shape]) for name, shape in SHAPES.items()} for _ in given]
    received, elements = [], 0
    for step in range(len(given[0])):
        means = {}
        for index, (name, shape) in enumerate(SHAPES.items()):
            sent = [
                feedback[name].compress(steps[step][name].reshape(-1), Round(step, index, worker=rank))
                for rank, (feedback, steps) in enumerate(zip(feedbacks, given, strict=True))
            ]
            elements += sent[0].count
            means[name] = mean_of(sent, len(given)).densify().view(shape)
        received.append(means)
    return received, [{name: f.residual for name, f in own.items()} for own in feedbacks], elements


def equal(one: Gradients, other: Gradients) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name].view(torch.int32), other[name].view(torch.int32))
        for name in one
    )


def drawn(*, seed: int, steps: int = 3, workers: int = WORKERS) -> list[Steps]:
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(3)

    return [[{name: normal(shape) for name, shape in SHAPES.items()} for _ in range(steps)] for _ in range(workers)]


def tensors(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    numel = torch.Size(shape).numel()
    return st.lists(st.integers(-9, 9), min_size=numel, max_size=numel).map(
        lambda values: torch.tensor(values, dtype=torch.float32).view(shape)
    )


gradients = st.fixed_dictionaries({name: tensors(shape) for name, shape in SHAPES.items()})
runs = st.integers(1, 4).flatmap(
    lambda steps: st.tuples(*[st.lists(gradients, min_size=steps, max_size=steps)] * WORKERS)
)


@settings(max_examples=15)
@given(method=st.sampled_from(METHODS), given=runs, options=st.sampled_from(OPTIONS))
def test_every_worker_gets_the_mean_of_what_all_sent(
    ranks: Ranks, method: str, given: Sequence[Steps], options: Mapping[str, Any]
) -> None:
    """Bit for bit the algorithm, one parameter at a time, whatever the buckets; residuals too."""
    means, residuals, elements = reference(method, given)
    for own, (received, kept, statistics, step) in zip(
        residuals, ranks.run(train, method, given, options), strict=True
    ):
        assert all(equal(mine, mean) for mine, mean in zip(received, means, strict=True))
        assert equal(kept, own)
        assert step == statistics.steps == len(given[0])
        assert statistics.rank or statistics.sent_elements == elements


@settings(max_examples=10)
@given(method=st.sampled_from(EXACT), given=runs)
def test_nothing_is_lost(ranks: Ranks, method: str, given: Sequence[Steps]) -> None:
    """Law 2: Σ received means + mean residual = Σ mean gradients, exactly on integers and two workers."""
    outcomes = ranks.run(train, method, given, OPTIONS[0])
    for name in SHAPES:
        put_in = torch.stack([step[name].reshape(-1) for steps in given for step in steps]).sum(0) / WORKERS
        applied = torch.stack([step[name].reshape(-1) for step in outcomes[0][0]]).sum(0)
        kept = torch.stack([residuals[name] for _, residuals, _, _ in outcomes]).sum(0) / WORKERS
        assert torch.equal(applied + kept, put_in)


@pytest.mark.parametrize("method", METHODS)
def test_neither_buckets_nor_options_change_a_bit(ranks: Ranks, method: str) -> None:
    """Real numbers this time: all of torch's options give the bits of the first."""
    given = drawn(seed=1)
    first, *others = [ranks.run(train, method, given, options) for options in OPTIONS]
    for other in others:
        for (received, kept, *_), (received_too, kept_too, *_) in zip(first, other, strict=True):
            assert all(equal(one, two) for one, two in zip(received, received_too, strict=True))
            assert equal(kept, kept_too)


def accumulate(given: Sequence[Steps]) -> tuple[Any, CompressionStatistics]:
    model, state = wrapped("HardThreshold(3.0)")
    *others, last = given[dist.get_rank()]
    with model.no_sync():
        for gradients in others:
            model(gradients).backward()
    model(last).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}, state.statistics()


def test_accumulated_gradients_are_one_step(ranks: Ranks) -> None:
    """Under `no_sync` nothing is sent; what is compressed then is the sum."""
    given = drawn(seed=2)
    sums = [[{name: torch.stack([step[name] for step in steps]).sum(0) for name in SHAPES}] for steps in given]
    means, _, elements = reference("HardThreshold(3.0)", sums)
    (received, statistics), _ = ranks.run(accumulate, given)
    assert equal(received, means[0])
    assert (statistics.steps, statistics.sent_elements) == (1, elements)


def test_unused_parameters_keep_their_memory(ranks: Ranks) -> None:
    """Where a parameter is not used nothing of it is sent; used nowhere, it gets no gradient and loses none."""
    one = {name: torch.full(shape, 2.0) for name, shape in SHAPES.items()}
    without_c = {name: gradient for name, gradient in one.items() if name != "c"}
    given = [[one, one, without_c, one], [one, without_c, without_c, one]]
    expected = [[2.0, 0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0], None, [0.0, 2.0, 3.0, 0.0, 0.0]]
    for cap in (ONE_EACH, ALL_IN_ONE):
        options = {"find_unused_parameters": True, "bucket_cap_mb": cap}
        for received, *_ in ranks.run(train, "TopK(0.2)", given, options):  # of the five elements of c, one a step
            assert [None if step["c"] is None else step["c"].tolist() for step in received] == expected


def use_once_without_sync() -> tuple[Any, Gradients]:
    model, state = wrapped("HardThreshold(3.0)", find_unused_parameters=True)
    used = {name: torch.full(shape, 2.0 * (1 + dist.get_rank())) for name, shape in SHAPES.items()}
    with model.no_sync():
        model(used).backward()
    model({name: gradient for name, gradient in used.items() if name != "c"}).backward()
    return {name: p.grad for name, p in model.module.named_parameters()}, {n: state.residual(n) for n in SHAPES}


def test_use_without_sync_counts(ranks: Ranks) -> None:
    """A parameter that only an earlier batch of the same step used is exchanged like the others."""
    for rank, (received, kept) in enumerate(ranks.run(use_once_without_sync)):
        assert received["a"].flatten().tolist() == [6.0] * 6  # (4 + 8) / 2
        assert received["c"].tolist() == [2.0] * 5  # (0 + 4) / 2: the 2 of rank 0 is below the threshold
        assert kept["c"].tolist() == [0.0 if rank else 2.0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_compressed_in_float32(ranks: Ranks, dtype: torch.dtype) -> None:
    """The residual is float32, and the mean is cast back."""
    given = [[{name: g.to(dtype) for name, g in step.items()} for step in steps] for steps in drawn(seed=3)]
    rounded = [[{name: gradient.float() for name, gradient in step.items()} for step in steps] for steps in given]
    means, residuals, _ = reference("HardThreshold(3.0)", rounded)
    for own, (received, kept, *_) in zip(residuals, ranks.run(train_as, given, dtype), strict=True):
        assert equal(kept, own)
        for mine, mean in zip(received, means, strict=True):
            assert all(torch.equal(mine[name], mean[name].to(dtype)) for name in SHAPES)


def train_as(given: Sequence[Steps], dtype: torch.dtype) -> tuple[list[Any], Gradients]:
    model, state = wrapped("HardThreshold(3.0)", dtype=dtype)
    received = [backward(model, gradients) for gradients in given[dist.get_rank()]]
    return received, {name: state.residual(name) for name in SHAPES}


class ChannelsLast(nn.Module):
    """One parameter whose elements lie in another order than they are counted in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, 2, 2).contiguous(memory_format=torch.channels_last))

    def forward(self) -> Tensor:
        return self.weight.sum()


def train_channels_last() -> tuple[Tensor, Tensor]:
    module = ChannelsLast()
    model = DistributedDataParallel(module)
    state = CompressionState(model, "TopK(0.25)")
    model.register_comm_hook(state, compress)
    model().backward()
    assert module.weight.grad is not None
    return module.weight.grad.reshape(-1), state.residual("weight")


def test_elements_are_counted_as_in_the_parameter(ranks: Ranks) -> None:
    """Of equal ones Top-k takes the first: first in the tensor, not in memory."""
    for received, residual in ranks.run(train_channels_last):
        assert received.nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
        assert residual.tolist() == [0.0] * 4 + [1.0] * 12


def spoiled(value: float) -> list[Steps]:
    given = drawn(seed=4)
    given[1][1]["c"][3] = value
    return given


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("cap", [ONE_EACH, ALL_IN_ONE])
def test_a_gradient_that_is_not_finite_is_told_to_all(ranks: Ranks, value: float, cap: float) -> None:
    """All workers raise, none waits, and each knows where it was."""
    options = {"bucket_cap_mb": cap}
    for outcome in ranks.outcomes(train, "HardThreshold(3.0)", spoiled(value), options):
        assert isinstance(outcome, NonFiniteGradientError)
        expected = (
            f"worker 1, step 1, parameter c: gradient has 1 non-finite of 5 elements, the first is {value} at index 3"
        )
        assert str(outcome) == expected


@dataclass(frozen=True)
class Breaking(Sparsifier):
    """Sends everything, but fails in the second step on rank 1, with an error that is not Thresher's."""

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee(conserves=True)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        if round.step == 1 and dist.get_rank() == 1:
            raise LookupError("a bug")
        return SparseGradient.dense(gradient.clone())


def train_breaking(given: Sequence[Steps]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPRESSORS, "Breaking", Breaking)
        train("Breaking()", given, {})


def test_any_other_failure_is_told_to_all(ranks: Ranks) -> None:
    """Also a bug."""
    for outcome in ranks.outcomes(train_breaking, drawn(seed=5)):
        assert isinstance(outcome, ProtocolError)
        assert str(outcome) == "worker 1, step 1, LookupError('a bug')"


def train_differently(methods: Sequence[str], first_steps: Sequence[int]) -> None:
    model, state = wrapped(methods[dist.get_rank()])
    state.load_state_dict({**state.state_dict(), "step": first_steps[dist.get_rank()]})
    backward(model, drawn(seed=6)[0][0])


@pytest.mark.parametrize(
    ("methods", "steps", "found"),
    [
        (["TopK(0.5)", "TopK(0.25)"], [0, 0], r"worker 0 has .*TopK\(0.5\).*; worker 1 has .*TopK\(0.25\)"),
        (["TopK(0.5)", "TopK(0.5)"], [7, 8], "worker 0 has .* step 7, .*; worker 1 has .* step 8, "),
    ],
)
def test_workers_that_differ_are_refused(
    ranks: Ranks, methods: Sequence[str], steps: Sequence[int], found: str
) -> None:
    """Another method, or another step, on one of them: all refuse, and say what differs."""
    for outcome in ranks.outcomes(train_differently, methods, steps):
        assert isinstance(outcome, ConfigurationError)
        assert re.search(found, str(outcome))


def refused(method: str, threshold: float | None = None) -> str:
    """What the state says of it; the model may be used as before."""
    model = DistributedDataParallel(Given())
    with pytest.raises(ConfigurationError) as refusal:
        CompressionState(model, method, threshold=threshold)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("method", "threshold", "found"),
    [
        ("Nonsense()", None, "there is no method 'Nonsense'"),
        ("TopK(2)", None, "density must be in (0, 1]"),
        ("EF21(TopK(0.5))", None, "cannot run in a hook for DistributedDataParallel; it runs in: simulator"),
        ("DetachedErrorFeedback(TopK(0.5))", None, "it runs in: simulator, update"),
        ("HardThreshold()", None, "HardThreshold() has no threshold of its own: give it one"),
        ("HardThreshold()", -1.0, "threshold must be a finite number >= 0, not -1.0"),
        ("HardThreshold(0.5)", 0.25, "HardThreshold(0.5) does not take the threshold 0.25"),
    ],
)
def test_bad_settings_are_refused(ranks: Ranks, method: str, threshold: float | None, found: str) -> None:
    """Before anything is sent, and by name."""
    assert found in ranks.run(refused, method, threshold, workers=1)[0]


def test_only_a_wrapped_model_has_a_hook() -> None:
    """A bare module is refused."""
    with pytest.raises(ConfigurationError, match="a Given has no communication hook; wrap it"):
        CompressionState(Given(), "Identity()")  # type: ignore[arg-type] # that is the point


def train_open(given: Sequence[Steps], method: str, threshold: float | None) -> tuple[list[Any], str]:
    model = DistributedDataParallel(Given())
    state = CompressionState(model, method, threshold=threshold)
    model.register_comm_hook(state, compress)
    return [backward(model, gradients) for gradients in given[dist.get_rank()]], state.method


def test_an_open_threshold_takes_the_given_one(ranks: Ranks) -> None:
    """`HardThreshold()` with a threshold is `HardThreshold(threshold)`."""
    given = drawn(seed=7)
    (one, described), _ = ranks.run(train_open, given, "HardThreshold()", 3)
    (other, _), _ = ranks.run(train_open, given, "HardThreshold(3.0)", None)
    assert described == "ErrorFeedback(HardThreshold())"
    assert all(equal(mine, yours) for mine, yours in zip(one, other, strict=True))


def embed() -> None:
    model = DistributedDataParallel(nn.Embedding(4, 2, sparse=True))
    model.register_comm_hook(CompressionState(model, "Identity()"), compress)
    model(torch.tensor([1])).sum().backward()


def test_sparse_tensors_are_refused(ranks: Ranks) -> None:
    """With what to do about it."""
    for outcome in ranks.outcomes(embed):
        assert isinstance(outcome, ConfigurationError)
        assert "make the embedding with sparse=False" in str(outcome)


def hook_another_model() -> None:
    other = DistributedDataParallel(nn.Linear(2, 3))
    _, state = wrapped("Identity()")
    other.register_comm_hook(state, compress)
    other(torch.ones(1, 2)).sum().backward()


def test_a_state_belongs_to_its_model(ranks: Ranks) -> None:
    """Registered with another one it refuses, on all workers."""
    for outcome in ranks.outcomes(hook_another_model):
        assert isinstance(outcome, ConfigurationError)
        assert re.search(r"made for another model: it has no parameter of shape \(3(, 2)?,?\)", str(outcome))


def interrupted(method: str, given: Sequence[Steps], at: int) -> tuple[list[Any], Gradients, int]:
    """Train, but with a new model and a new state from step ``at`` on."""
    steps = given[dist.get_rank()]
    model, state = wrapped(method)
    received = [backward(model, gradients) for gradients in steps[:at]]
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    model, state = wrapped(method, bucket_cap_mb=ONE_EACH)
    state.load_state_dict(torch.load(file, weights_only=True))
    received += [backward(model, gradients) for gradients in steps[at:]]
    return received, {name: state.residual(name) for name in SHAPES}, state.step


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_goes_on_bit_for_bit(ranks: Ranks, method: str) -> None:
    """Through a file of tensors and plain values, into a model with other buckets."""
    given = drawn(seed=8, steps=4)
    for (received, kept, _, step), resumed in zip(
        ranks.run(train, method, given, {}), ranks.run(interrupted, method, given, 2), strict=True
    ):
        assert all(equal(one, two) for one, two in zip(received, resumed[0], strict=True))
        assert equal(kept, resumed[1])
        assert step == resumed[2]


def load_changed(changes: Mapping[str, Any]) -> str:
    """What the state says of another one, after which it is as it was."""
    model, state = wrapped("HardThreshold(3.0)")
    backward(model, drawn(seed=9)[0][0])
    before = state.state_dict()
    with pytest.raises(ConfigurationError) as refusal:
        state.load_state_dict({**before, "step": 9, **changes})
    after = state.state_dict()
    assert after.pop("parameters").keys() == before["parameters"].keys()
    assert all(torch.equal(state.residual(name), before["parameters"][name]["residual"]) for name in SHAPES)
    assert all(after[key] == before[key] for key in after)
    return str(refusal.value)


def saved(shapes: Mapping[str, int]) -> dict[str, Any]:
    return {name: ErrorFeedback(HardThreshold(3.0), numel).state_dict() for name, numel in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"method": "Other()"}, "the state belongs to Other(), this is ErrorFeedback(HardThreshold(3.0))"),
        ({"threshold": 1.0}, "the state belongs to threshold 1.0, this is threshold None"),
        ({"rank": 1}, "the state belongs to rank 1, this is rank 0"),
        ({"workers": 5}, "the state belongs to workers 5, this is workers 1"),
        ({"parameters": {"a": {}, "b": {}, "z": {}}}, "it lacks ['c', 'd', 'e'], and has ['z'] instead"),
        ({"parameters": saved({"a": 6, "b": 1, "c": 5, "d": 0, "e": 7})}, "parameter e: the residual in the state is"),
        ({"more": 1}, "not a state of ErrorFeedback(HardThreshold(3.0))"),
    ],
)
def test_a_state_of_something_else_is_refused(ranks: Ranks, changes: Mapping[str, Any], found: str) -> None:
    """The difference is named, and nothing is changed."""
    assert found in ranks.run(load_changed, changes, workers=1)[0]


def unknown_residual() -> None:
    wrapped("Identity()")[1].residual("z")


def test_an_unknown_name_is_refused(ranks: Ranks) -> None:
    """There is no residual of what is not trained."""
    with pytest.raises(ConfigurationError, match="no trained parameter is called 'z'"):
        ranks.run(unknown_residual, workers=1)


def test_what_is_counted(ranks: Ranks) -> None:
    """Frames as they are sent; received is what came: frames padded to the longest, and headers."""
    numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    nothing, everything = encode(SparseGradient.empty(numel)), encode(SparseGradient.dense(torch.full((numel,), 2.0)))
    outcomes = ranks.run(train, "HardThreshold(2.0)", [[ones, ones], [zeros, zeros]], {"bucket_cap_mb": ALL_IN_ONE})
    received = len(nothing) + len(everything) + 2 * HEADER_BYTES
    assert [statistics for _, _, statistics, _ in outcomes] == [
        CompressionStatistics(0, 2, numel, numel, len(nothing) + len(everything), received, 1.0),
        CompressionStatistics(1, 2, numel, 0, 2 * len(nothing), received, 0.0),
    ]
