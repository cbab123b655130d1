"""What becomes of a push before it takes part: each reason, and that looking changes nothing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.server.dialogues import ASYNC, LOCKSTEP, close_round, picture, push, training

from thresher.protos.consistency import Consistency
from thresher.protos.optimizers import Override
from thresher.protos.sparse import SparseGradient
from thresher.server.events import Push, Verdict
from thresher.server.judging import judge, returned
from thresher.server.shard import Shard

LR = (Override(0, "lr", 0.5),)


def after(rounds: int, consistency: Consistency = LOCKSTEP) -> Shard:
    shard = training(2, consistency)
    for step in range(rounds):
        close_round(shard, (0, 1), step)
    return shard


def judged(shard: Shard, one: Push, waiting: Push | None = None, *others: Push) -> tuple[Verdict, str] | None:
    before = picture(shard)
    found = judge(one, shard._state.members.seat(one.worker.rank), shard._state, waiting, others)
    assert picture(shard) == before
    return None if found is None else (found.verdict, found.reason)


@pytest.mark.parametrize("consistency", [LOCKSTEP, ASYNC], ids=Consistency.describe)
def test_a_push_that_is_new_and_right_has_no_verdict_yet(consistency: Consistency) -> None:
    """It takes part in the round."""
    assert judged(after(2, consistency), push(0, 2)) is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"step": 9, "version": 9}, "pushed step 9 of version 9; round 2 is open"),
        ({"version": 1}, "pushed step 2 of version 1; round 2 is open"),
        ({"gradient": SparseGradient.empty(5)}, "5 elements pushed, not 4"),
        (
            {"gradient": SparseGradient.dense(torch.tensor([0.0, math.nan, 0.0, 0.0]))},
            "pushed NaN or infinity in step 2",
        ),
        ({"gradient": SparseGradient.dense(torch.tensor([0.0, 0.0, -math.inf, 0.0]))}, "pushed NaN or infinity"),
        ({"next_threshold": math.nan}, "proposes nan as the threshold"),
        ({"next_threshold": -1.0}, "proposes -1.0 as the threshold"),
        ({"next_threshold": math.inf}, "proposes inf as the threshold"),
        ({"presence": (True,)}, "presence of 1 tensors pushed"),
    ],
)
def test_what_is_wrong_is_rejected_with_the_reason(wrong: dict[str, Any], reason: str) -> None:
    """The worker reads what was wrong with it."""
    found = judged(after(2), replace(push(0, 2), **wrong))
    assert found is not None
    assert found[0] is Verdict.REJECTED
    assert reason in found[1]


@pytest.mark.parametrize("who", [0, 1])
def test_who_follows_does_not_disagree(who: int) -> None:
    """Whichever of the two comes first: its schedule is not the others'."""
    one, other = (push(rank, 2, overrides=LR if rank == who else (), follows=rank == who) for rank in (0, 1))
    assert judged(after(2), one, None, other) is None
    found = judged(after(2), replace(one, follows=False), None, replace(other, follows=False))
    assert found is not None
    assert "members disagree on hyper-parameters" in found[1]


@pytest.mark.parametrize(
    ("step", "changes", "verdict"),
    [
        (2, {}, Verdict.APPLIED),
        (2, {"content": 9}, Verdict.REJECTED),
        (2, {"content": 9, "lost": True}, Verdict.APPLIED),
        (1, {"content": 9}, Verdict.APPLIED),
        (0, {}, Verdict.APPLIED),
    ],
)
def test_a_step_that_has_its_verdict_keeps_it(step: int, changes: dict[str, Any], verdict: Verdict) -> None:
    """Of the last one the content is known, and another one is a conflict; earlier ones are told as they were."""
    found = judged(after(3), push(0, step, **changes))
    assert found is not None
    assert found[0] is verdict


@pytest.mark.parametrize(
    ("step", "changes", "verdict", "reason"),
    [
        (2, {}, Verdict.DUPLICATE, ""),
        (2, {"content": 9}, Verdict.REJECTED, "pushed step 2 before, with other content"),
        (2, {"content": 9, "lost": True}, Verdict.DUPLICATE, ""),
        (3, {}, Verdict.REJECTED, "one push at a time"),
    ],
)
def test_while_a_push_waits_it_is_the_only_one(
    step: int, changes: dict[str, Any], verdict: Verdict, reason: str
) -> None:
    """At most one of each worker; its repetition changes nothing."""
    found = judged(after(2), push(0, step, **changes), push(0, 2))
    assert found is not None
    assert found[0] is verdict
    assert reason in found[1]


def test_members_that_disagree_are_told_what_about() -> None:
    """Whether a mean is all they want, and on every hyper-parameter, with both values."""
    shard = after(1)
    for other, said in (
        (push(1, 1, only_mean=True), "disagree in step 1: one wants a mean only"),
        (push(1, 1, overrides=LR), "members disagree on hyper-parameters in step 1"),
    ):
        found = judged(shard, push(0, 1), None, other)
        assert found is not None
        assert found[0] is Verdict.REJECTED
        assert said in found[1]
    assert judged(shard, push(0, 1), None, push(1, 1, overrides=LR, lost=True)) is None
    assert judged(shard, push(0, 1, lost=True), None, push(1, 1, overrides=LR)) is None
    assert judged(shard, push(0, 1), None, push(1, 0, overrides=LR)) is None  # late: of another step


@pytest.mark.parametrize(("most", "back"), [(0, False), (2, True), (3, False)])
def test_a_push_is_returned_when_it_is_older_than_is_allowed(most: int, back: bool) -> None:
    """And taken at just that age; 0 takes all."""
    shard = training(2, Consistency("async", max_staleness=most))
    for step in range(3):
        close_round(shard, [0], step)
    reason = returned(push(1, 0), shard._state.members.seat(1), shard._state)
    assert bool(reason) == back
