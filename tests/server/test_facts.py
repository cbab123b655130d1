"""Records and their bytes: what is read is what was written, and what is no record is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.server.dialogues import LAYOUT, SSP, register

from thresher.protos.bookmark import Bookmark
from thresher.protos.errors import DataLossError
from thresher.protos.optimizers import Override
from thresher.protos.sealed import sealed
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Membership, Update
from thresher.server.events import Worker
from thresher.server.facts import (
    Admitted,
    Agreed,
    Closed,
    Contribution,
    Departed,
    Opened,
    Record,
    Returned,
    record_from_bytes,
    record_to_bytes,
)

PIECE = LAYOUT.shard_slice(0, 1)
numbers = st.integers(0, 2**63)
ranks = st.integers(0, 2**31)
reals = st.floats(allow_nan=False)
memberships = st.builds(
    Membership, st.integers(0, 2**31), st.sets(ranks, max_size=4).map(lambda some: tuple(sorted(some)))
)


@st.composite
def closed_rounds(draw: st.DrawFn) -> Closed:
    values = draw(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4) | st.none()
    )
    update = Update(
        version=draw(numbers),
        members=draw(st.integers(1, 9)),
        contributors=() if values is None else (0, 3),
        mean=None if values is None else SparseGradient.dense(torch.tensor(values)),
        presence=draw(st.sampled_from([(True, True), (False, True)])),
        overrides=(Override(0, "lr", 0.5),),
        next_threshold=draw(reals | st.none()),
        arrivals=((0, draw(numbers)), (3, 4)),
        membership=draw(memberships | st.none()),
        bookmark=draw(st.sampled_from([None, Bookmark(9, 0, 2, 3, ((2, 3), (4, 1)), 5, 8)])),
    )
    contribution = Contribution(draw(ranks), draw(numbers), draw(numbers), 7, 4, draw(numbers), draw(st.booleans()))
    told = ((0, 40), (3, 40))
    return Closed(sealed(update, b"before"), (contribution,), draw(reals | st.none()), 0.5, 1.5, told)


records: st.SearchStrategy[Record] = st.one_of(
    st.builds(Opened, numbers, st.just(register(0, consistency=SSP, environment=("2.13", "AVX2", "4")))),
    st.builds(Admitted, st.builds(Worker, ranks, numbers), st.text(max_size=9), st.text(max_size=9)),
    closed_rounds(),
    st.builds(Returned, ranks, numbers, numbers),
    st.builds(Departed, ranks, reals),
    memberships,
    st.builds(Agreed, numbers, st.dictionaries(st.text(max_size=5), reals, max_size=3)),
)


@given(records)
def test_what_is_read_is_what_was_written(record: Record) -> None:
    """Law 6 for records: byte for byte, so also value for value."""
    data = record_to_bytes(record)
    read = record_from_bytes(data, PIECE)
    assert type(read) is type(record)
    assert record_to_bytes(read) == data
    if not isinstance(record, Closed):
        assert read == record


@given(closed_rounds())
def test_a_closed_round_keeps_its_update_and_its_digest(closed: Closed) -> None:
    """Tensors are compared by their bits."""
    read = record_from_bytes(record_to_bytes(closed), PIECE)
    assert isinstance(read, Closed)
    said, found = closed.sealed.update, read.sealed.update
    assert replace(found, mean=None) == replace(said, mean=None)
    assert (said.mean is None) == (found.mean is None)
    assert said.mean is None or found.mean is None or torch.equal(said.mean.densify(), found.mean.densify())
    assert replace(read, sealed=closed.sealed) == closed


def test_buffers_are_kept() -> None:
    """The model's BatchNorm statistics go with who brought them."""
    departed = Departed(0, 1.5, {"bn.mean": torch.tensor([1.0, -0.0])})
    read = record_from_bytes(record_to_bytes(departed), None)
    assert isinstance(read, Departed)
    assert torch.equal(read.buffers["bn.mean"], departed.buffers["bn.mean"])


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"\x7a\x00"], ids=["nothing", "no message", "another kind"])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    """The journal is of another version, or its checksums were forged."""
    with pytest.raises(DataLossError, match="cannot be read"):
        record_from_bytes(data, PIECE)


@given(closed_rounds())
def test_a_round_before_the_run_began_is_refused(closed: Closed) -> None:
    """Without a slice nobody knows what its frame is about."""
    with pytest.raises(DataLossError, match="a record closed is not known here"):
        record_from_bytes(record_to_bytes(closed), None)
