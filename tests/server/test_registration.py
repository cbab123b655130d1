"""What a worker must agree on: each refusal says what differs, and an optimizer that cannot run never gets in."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from thresher.protos.bookmark import Bookmark
from thresher.protos.consistency import Consistency
from thresher.protos.errors import LayoutError, OptimizerError, ProtocolError, RegistrationError
from thresher.protos.layout import Layout, TensorSpec
from thresher.protos.optimizers import SUPPORTED, Hyperparameters, OptimizerSpec, spec_of
from thresher.server.events import Register, Worker
from thresher.server.registration import check_bringer, check_registration, check_untrained, doubts

LAYOUT = Layout((TensorSpec("w", (3,), "float32"), TensorSpec("b", (1,), "float32", group=1)))
FIRST = Register(
    Worker(0, 5), 2, 0, 2, LAYOUT, OptimizerSpec("SGD", ({"lr": 0.1}, {"lr": 0.2})), "Identity, gradient-placed"
)


def test_an_equal_registration_is_welcome() -> None:
    """Also from another rank, life and machine."""
    check_registration(FIRST, None, 0, 2)
    check_registration(replace(FIRST, worker=Worker(1, 9), origin="b:2", environment=("x",)), FIRST, 0, 2)


@pytest.mark.parametrize(("shard", "shards"), [(1, 2), (0, 3)])
def test_another_place_among_the_shards_is_refused(shard: int, shards: int) -> None:
    """Lists of shards in another order would train another slice."""
    with pytest.raises(
        RegistrationError, match=rf"takes this for shard 0 of 2, it is shard {shard} of {shards}.*order"
    ):
        check_registration(FIRST, None, shard, shards)


def test_another_model_is_refused_with_its_difference() -> None:
    """One line for each tensor that differs."""
    other = replace(FIRST, worker=Worker(1, 1), layout=Layout((LAYOUT.trained[0],)))
    with pytest.raises(LayoutError, match=r"worker 1 differs .* worker 0 registered:\n  trained tensor b"):
        check_registration(other, FIRST, 0, 2)


@pytest.mark.parametrize(
    "other",
    [
        replace(FIRST, optimizer=OptimizerSpec("Adam", FIRST.optimizer.groups)),
        replace(FIRST, optimizer=OptimizerSpec("SGD", ({"lr": 0.1}, {"lr": 0.3}))),
        replace(FIRST, method="TopK(0.1), gradient-placed"),
    ],
    ids=["optimizer", "hyper-parameter", "method"],
)
def test_another_optimizer_or_method_is_refused_with_both(other: Register) -> None:
    """The message shows what each of the two workers wants."""
    with pytest.raises(RegistrationError) as caught:
        check_registration(other, FIRST, 0, 2)
    for one in (other, FIRST):
        assert one.method in str(caught.value)
        assert str(list(one.optimizer.groups)) in str(caught.value)


def test_another_consistency_is_refused_with_both() -> None:
    """A worker that expects lockstep must not train with one that expects none."""
    other = replace(FIRST, worker=Worker(1, 1), consistency=Consistency("ssp", staleness=4))
    with pytest.raises(RegistrationError, match=r"worker 1 wants ssp, staleness 4; worker 0 registered sync; use"):
        check_registration(other, FIRST, 0, 2)


def test_a_tensor_of_a_group_that_does_not_exist_is_refused() -> None:
    """It would end the shard at the seed; it is refused here, by name."""
    with pytest.raises(OptimizerError, match="tensor b is in parameter group 1; the optimizer has 1"):
        check_registration(replace(FIRST, optimizer=OptimizerSpec("SGD", ({"lr": 0.1},))), None, 0, 2)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("SGD", {"lr": "fast"}),
        ("SGD", {"lr": -1.0}),
        ("SGD", {"lr": 0.1, "nesterov": True}),
        ("Adam", {"lr": 0.1, "betas": (0.9,)}),
        ("Adam", {"lr": 0.1, "betas": 0.9}),
        ("AdamW", {"lr": 0.1, "fused": True, "foreach": True}),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_an_optimizer_that_cannot_run_is_refused(name: str, group: Hyperparameters, position: int) -> None:
    """In whichever group the impossible value is: torch's own reason is passed on, before anything is registered."""
    good: Hyperparameters = {"lr": 0.1}
    groups = (group, good) if position == 0 else (good, group)
    with pytest.raises(OptimizerError, match=f"{name} cannot run with"):
        check_registration(replace(FIRST, optimizer=OptimizerSpec(name, groups)), None, 0, 2)


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_every_supported_optimizer_is_welcome(name: str) -> None:
    """With torch's defaults, as a worker describes them."""
    rate: dict[str, Any] = {} if name == "Subtract" else {"lr": 0.1}
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    spec = spec_of(SUPPORTED[name]([{"params": [parameter]} for parameter in parameters], **rate))
    check_registration(replace(FIRST, optimizer=spec), None, 0, 2)


KEPT = Layout(LAYOUT.trained, (TensorSpec("mean", (2,), "float32"), TensorSpec("seen", (), "int64")))
PLACE = Bookmark(4, 1, 1, 0, ((2, 4),))


@pytest.mark.parametrize(
    ("workers", "environment", "said"),
    [
        (2, (), ""),
        (2, ("2.13", "AVX2", "4"), r"worker 0 runs on .*results may differ in the last bits$"),
        (3, (), r"^worker 0 takes its share of the data as one of 3, so far they were dealt for 2: where all are"),
        (3, ("2.13", "AVX2", "4"), r"last bits; worker 0 takes its share"),
    ],
)
def test_what_the_operator_should_know_of_a_worker(workers: int, environment: tuple[str, ...], said: str) -> None:
    """It is let in all the same."""
    found = doubts(replace(FIRST, workers=workers, environment=environment), FIRST, PLACE)
    assert re.search(said, found)
    assert bool(found) == bool(said)
    assert not doubts(FIRST, None, None)


FITTING = {"mean": torch.ones(2), "seen": torch.tensor(3)}


def test_untrained_tensors_may_be_any_of_those_registered() -> None:
    """All of them, some, or none; to the other shards none."""
    for untrained in (FITTING, {"seen": FITTING["seen"]}, {}):
        check_untrained(untrained, KEPT, shard=0, rank=0)
    check_untrained({}, KEPT, shard=1, rank=0)


@pytest.mark.parametrize(
    ("wrong", "shard", "said"),
    [
        ({"mean": torch.ones(3)}, 0, r"worker 4 brings mean float32 \[3\], which is none of the 2"),
        ({"mean": torch.ones(2, dtype=torch.float16)}, 0, r"mean float16 \[2\]"),
        ({"seen": torch.ones(1, dtype=torch.int64)}, 0, r"seen int64 \[1\]"),
        ({"w": torch.ones(3)}, 0, r"w float32 \[3\]"),
        ({"mean": torch.ones(2)}, 1, "none of the 0 untrained tensors that shard 1 keeps"),
    ],
)
def test_an_untrained_tensor_that_was_not_registered_is_refused(
    wrong: dict[str, torch.Tensor], shard: int, said: str
) -> None:
    """Whoever joins later would copy it into a model that has no place for it."""
    with pytest.raises(ProtocolError, match=said):
        check_untrained(wrong, KEPT, shard, rank=4)


def test_buffers_come_from_the_first_rank_to_the_first_shard() -> None:
    """Nobody else has any to bring."""
    check_bringer(0, 0)
    for rank, shard in ((1, 0), (0, 1)):
        with pytest.raises(ProtocolError, match=f"not from worker {rank} to shard {shard}"):
            check_bringer(rank, shard)
