"""Messages and what they mean: everything that is said arrives, and what identifies a push tells pushes apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.server.conversing import LAYOUT, SGD, frame_of, register, zeros

from thresher.protos.bookmark import Bookmark
from thresher.protos.consistency import Consistency
from thresher.protos.errors import ConfigurationError, FrameError, LayoutError, ProtocolError, RegistrationError
from thresher.protos.messages import bookmark_to_message
from thresher.protos.optimizers import Override
from thresher.protos.replica import PARAMETERS
from thresher.protos.snapshots import pack_state, unpack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership
from thresher.server import effects, events
from thresher.server.config import ShardConfig
from thresher.server.events import History, Verdict, Worker
from thresher.server.facts import Agreed
from thresher.server.statistics import MemberStatistics, ShardStatistics
from thresher.server.translation import (
    agreed_to_message,
    hello_from_message,
    history_from_message,
    history_to_message,
    judged_to_message,
    leave_from_message,
    push_from_message,
    refill_from_message,
    register_from_message,
    registered_to_message,
    snapshot_to_messages,
    statistics_to_message,
)
from thresher.v1 import aggregation_pb2 as pb

ME = Worker(3, 9)
PIECE = LAYOUT.shard_slice(0, 1)
HISTORY = History(5, 7, b"digest")
PLACE = Bookmark(5, 1, 2, 3, ((2, 1), (4, 0)), 9)


def read(push: pb.Push, frame: bytes = b"", worker: Worker = ME) -> events.Push:
    gradient = SparseGradient.dense(torch.ones(4)) if frame else None
    return push_from_message(worker, push, gradient, PIECE, bytearray(frame), 123)


def test_a_registration_is_read_whole() -> None:
    """Every field of the message is in the event."""
    message = register(3, workers=5, incarnation=9, consistency=Consistency("ssp", staleness=4))
    message.metrics_address = "host:1"
    message.environment.CopyFrom(pb.Environment(torch_version="2", cpu_capability="AVX2", threads=8))
    assert register_from_message(message) == events.Register(
        ME, 5, 0, 1, LAYOUT, SGD, "Identity", Consistency("ssp", staleness=4), "host:3", "host:1", ("2", "AVX2", "8")
    )


def test_a_registration_of_another_understanding_is_refused() -> None:
    """Another fingerprint of the same layout, and settings that make no sense, are told before anything is decided."""
    message = register(3)
    message.fingerprint = ""
    with pytest.raises(LayoutError, match=r"worker 3 says its layout is nameless, here it reads as .*same version"):
        register_from_message(message)
    message = register(3)
    message.consistency.mode = "later"
    with pytest.raises(ConfigurationError, match="mode must be one of"):
        register_from_message(message)


@pytest.mark.parametrize("name", ["origin", "metrics_address"])
def test_what_is_kept_of_a_worker_for_people_is_bounded(name: str) -> None:
    """Of each rank: nobody reads more, and a message may hold megabytes."""
    message = register(3)
    setattr(message, name, "x" * 1000)
    assert register_from_message(message).worker.rank == 3
    setattr(message, name, "x" * 1001)
    with pytest.raises(RegistrationError, match="origin and metrics address of worker 3 have over 1000 characters"):
        register_from_message(message)


def test_the_answer_to_a_registration_is_written_whole() -> None:
    """Where the shard is, what became of the rank's pushes, and how long an answer may take."""
    answer = effects.Registered(HISTORY, True, 4, True, Verdict.RETURNED, Membership(2, (0, 3)), 6)
    config = ShardConfig(0, 1, 2, start_timeout=100.0, round_timeout=50.0, lease=20.0)
    assert registered_to_message(answer, config) == pb.RegisterResponse(
        run=5, version=7, seeded=True, answer_timeout=170.0, settled_steps=4, in_open_round=True,
        last_verdict=pb.VERDICT_RETURNED, membership=pb.Membership(epoch=2, ranks=[0, 3]), agreements=6,
        round_timeout=50.0, lease=20.0,
    )  # fmt: skip


@given(st.builds(History, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=16)))
def test_a_place_in_a_history_comes_back(history: History) -> None:
    """Law: read(write(x)) = x, and a hello says the same."""
    assert history_from_message(history_to_message(history)) == history
    hello = pb.Hello(rank=3, incarnation=9, run=history.run, version=history.version, digest=history.digest)
    assert hello_from_message(hello) == events.Hello(ME, history)


def test_a_push_is_read_whole() -> None:
    """Every field of the message is in the event."""
    override = pb.Override(group=0, name="lr", value=pb.Value(number=0.5))
    message = pb.Push(
        step=4, version=2, presence=b"\x02", overrides=[override], residual_squared=1.5, next_threshold=0.25,
        only_mean=True, membership=pb.Membership(epoch=1, ranks=[0]), lost=True, bookmark=bookmark_to_message(PLACE),
        follows=True,
    )  # fmt: skip
    event = read(message)
    assert event == events.Push(
        ME, 4, 2, None, (False, True), (Override(0, "lr", 0.5),), 1.5, 0.25, True, Membership(1, (0,)), True, 123,
        event.content, PLACE, True,
    )  # fmt: skip
    plain = read(pb.Push(step=4), frame_of(1.0))
    assert (plain.next_threshold, plain.membership, plain.presence) == (None, None, (True, True))
    assert plain.bookmark is None
    assert plain.gradient is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"presence": b"\xff"},
        {"presence": b"\x01\x01"},
        {"membership": pb.Membership(ranks=[1, 0])},
        {"bookmark": pb.Bookmark()},
    ],
)
def test_a_push_of_something_else_is_refused(fields: dict[str, object]) -> None:
    """Other tensors than the shard has, a membership that is no list of ranks, a bookmark of no place."""
    message = pb.Push(**fields)  # type: ignore[arg-type] # of the right types
    with pytest.raises(ProtocolError):
        read(message)


CHANGES: list[dict[str, object]] = [
    {"step": 5}, {"version": 3}, {"skipped": True}, {"presence": b"\x01"}, {"residual_squared": 2.0},
    {"next_threshold": 0.0}, {"only_mean": True}, {"lost": True},
    {"overrides": [pb.Override(name="lr", value=pb.Value(number=1.0))]}, {"bookmark": bookmark_to_message(PLACE)},
]  # fmt: skip


def test_every_change_of_a_push_changes_what_identifies_it() -> None:
    """Equal for a repetition, also by one who knows another membership since; different for anything else."""
    same = pb.Push(step=4, version=4)
    content = read(same, frame_of(1.0)).content
    assert read(same, frame_of(1.0)).content == content
    knowing = pb.Push(step=4, version=4, membership=pb.Membership(epoch=9, ranks=[0, 1]))
    assert read(knowing, frame_of(1.0)).content == content
    others = [read(pb.Push(**{"step": 4, "version": 4} | change), frame_of(1.0)).content for change in CHANGES]  # type: ignore[arg-type] # of the right types
    assert len({content, *others, read(same, frame_of(2.0)).content, read(same).content}) == len(CHANGES) + 3
    assert all(0 < one < 2**64 for one in others)


def test_a_leave_is_read_whole() -> None:
    """Its counts, whether they are all, what is abandoned, and the buffers."""
    message = pb.Leave(push_bytes=10, pull_bytes=20, abandoned_squared=3.0, counted=True)
    event = leave_from_message(ME, message, bytearray(pack_state({}, {"bn.mean": torch.ones(2)})))
    assert (event.worker, event.push_bytes, event.pull_bytes) == (ME, 10, 20)
    assert (event.counted, event.abandoned_squared) == (True, 3.0)
    assert {name: value.tolist() for name, value in event.untrained.items()} == {"bn.mean": [1.0, 1.0]}
    assert leave_from_message(ME, pb.Leave(), bytearray()) == events.Leave(ME)
    with pytest.raises(FrameError, match="not a safetensors file"):
        leave_from_message(ME, message, bytearray(b"noise"))


def test_a_refill_is_read_whole() -> None:
    """The replica, where it is in the history, and what is in force there."""
    message = pb.Refill(
        history=pb.History(run=5, version=7, digest=b"digest"), next_threshold=0.5,
        overrides=[pb.Override(name="lr", value=pb.Value(number=1.0))], membership=pb.Membership(epoch=1, ranks=[3]),
        bookmark=bookmark_to_message(PLACE),
    )  # fmt: skip
    event = refill_from_message(ME, message, zeros())
    assert (event.worker, event.history, event.threshold, event.bookmark) == (ME, HISTORY, 0.5, PLACE)
    assert (event.overrides, event.membership) == ((Override(0, "lr", 1.0),), Membership(1, (3,)))
    assert event.state[PARAMETERS].tolist() == [0.0] * 4
    assert event.untrained["bn.mean"].tolist() == [1.0, 1.0]
    plain = refill_from_message(ME, pb.Refill(), zeros())
    assert (plain.threshold, plain.bookmark) == (None, None)
    with pytest.raises(FrameError, match="not a safetensors file"):
        refill_from_message(ME, message, b"noise")


@pytest.mark.parametrize("verdict", Verdict)
def test_each_verdict_has_its_word_on_the_wire(verdict: Verdict) -> None:
    """By name, so that a verdict that is added on one side only is seen."""
    result = judged_to_message(effects.Judged(4, verdict, "why")).result
    assert (result.step, result.reason) == (4, "why")
    assert pb.Verdict.Name(result.verdict) == f"VERDICT_{verdict.name}"


def test_a_reason_that_quotes_much_is_cut() -> None:
    """It waits at the shard until the worker reads it."""
    result = judged_to_message(effects.Judged(4, Verdict.REJECTED, "why " * 1000)).result
    assert result.reason == "why " * 250


def test_an_agreement_is_written_whole() -> None:
    """Its number and all its values."""
    agreed = agreed_to_message(Agreed(3, {"loss": 0.5, "stop": 1.0})).agreed
    assert (agreed.number, dict(agreed.values)) == (3, {"loss": 0.5, "stop": 1.0})


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5])
def test_a_snapshot_says_in_its_first_part_what_it_is(threshold: float | None) -> None:
    """The parts together are the file; layout, optimizer, history and membership come once."""
    data = pack_state({PARAMETERS: torch.arange(600_000.0)}, {})
    snapshot = effects.Snapshot(HISTORY, {}, LAYOUT, SGD, threshold, Membership(2, (0, 3)), PLACE)
    parts = list(snapshot_to_messages(snapshot, data))
    assert [part.HasField("layout") for part in parts] == [True, False, False]
    assert {(part.version, part.total_bytes) for part in parts} == {(7, len(data))}
    assert torch.equal(unpack_state(b"".join(part.chunk for part in parts))[0][PARAMETERS], torch.arange(600_000.0))
    assert history_from_message(parts[0].history) == HISTORY
    assert parts[0].membership == pb.Membership(epoch=2, ranks=[0, 3])
    assert parts[0].bookmark == bookmark_to_message(PLACE)
    assert parts[0].HasField("next_threshold") == (threshold is not None)
    assert parts[0].next_threshold == (threshold or 0.0)


def test_counters_are_written_whole() -> None:
    """Also before the first round, when there is no last row."""
    member = MemberStatistics(3, "exchanging", 1, 2, 3, 4, 5, 0.5, "host:3", "host:1", 0.75, 6)
    now = ShardStatistics(0, 2, "failed", "why", 7, 4, 8, (member,), {}, 0.0, 0.0, 99, 0.25, None)
    assert statistics_to_message(now, 1.5) == pb.StatisticsResponse(
        shard=0, shards=2, state="failed", failure="why", version=7, numel=4, model_numel=8, threshold=0.25,
        log_bytes=99, last_iteration_age=1.5,
        workers=[
            pb.WorkerStatistics(
                rank=3, state="exchanging", steps=1, push_bytes=2, pull_bytes=3, pushed_elements=4,
                pushable_elements=5, density=0.5, origin="host:3", metrics_address="host:1", wait_seconds=0.75, waits=6,
                counts=True,
            )
        ],
    )  # fmt: skip
