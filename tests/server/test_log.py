"""The update log: readers get exactly what they lack or are told to take a snapshot, and memory stays below the cap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.errors import BehindError
from thresher.protos.sealed import SealedUpdate, sealed
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.server.log import UpdateLog


def update(version: int, size: int = 100) -> SealedUpdate:
    mean = SparseGradient.dense(torch.zeros(size)) if size else None
    return sealed(Update(version, 1, (0,), mean, (True,)), b"")


@given(st.lists(st.integers(0, 500), max_size=30), st.integers(0, 4000), st.integers(0, 30), st.integers(0, 30))
def test_a_reader_gets_what_it_lacks_or_is_told_that_it_is_gone(
    sizes: list[int], cap: int, cut: int, reader: int
) -> None:
    """After any updates, cap and cut: `since(v)` is all of v+1 … w, or an error when some of it is forgotten."""
    log = UpdateLog(cap)
    for version, size in enumerate(sizes, start=1):
        log.append(update(version, size))
    log.cut(cut)
    try:
        found = [one.update.version for one in log.since(reader)]
    except BehindError:
        assert reader != len(sizes)  # who has everything is never sent away
    else:
        assert found == list(range(reader + 1, len(sizes) + 1))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=30), st.integers(0, 4000))
def test_memory_stays_below_the_cap_but_for_the_newest(sizes: list[int], cap: int) -> None:
    """After each append the log is within its cap, or holds the newest update alone."""
    log = UpdateLog(cap)
    for version, size in enumerate(sizes, start=1):
        log.append(update(version, size))
        assert log.bytes <= cap or len(log.since(version - 1)) == 1
        with pytest.raises(BehindError):
            log.since(version - 1 - cap // 256 - 1)  # more updates than the cap can hold are never there
    log.cut(len(sizes))
    assert [one.update.version for one in log.since(len(sizes) - 1)] == [len(sizes)]  # who comes back is told of it


def test_the_newest_update_is_kept_however_large() -> None:
    """A model that is larger than the cap must still be able to train."""
    log = UpdateLog(cap_bytes=10)
    log.append(update(1, 1000))
    log.append(update(2, 1000))
    assert [one.update.version for one in log.since(1)] == [2]
    with pytest.raises(BehindError, match=r"after version 0 are no longer in the log, which now ends at 2.*snapshot"):
        log.since(0)


def test_a_cut_forgets_what_every_member_has() -> None:
    """The cut is at the slowest member: its next update is the oldest one kept."""
    log = UpdateLog(1 << 20)
    for version in (1, 2, 3):
        log.append(update(version))
    log.cut(2)
    assert [one.update.version for one in log.since(2)] == [3]
    with pytest.raises(BehindError):
        log.since(1)


def test_a_version_that_does_not_exist_yet_is_refused() -> None:
    """A reader ahead of the log belongs to another run."""
    with pytest.raises(BehindError):
        UpdateLog(100).since(1)


def test_sparse_updates_are_counted_with_their_indices() -> None:
    """An index takes twice the memory of a value; dense updates share theirs."""
    sparse, dense = UpdateLog(1 << 20), UpdateLog(1 << 20)
    mean = SparseGradient(torch.arange(10), torch.zeros(10), 20)
    sparse.append(sealed(Update(1, 1, (0,), mean, (True,)), b""))
    dense.append(update(1, 10))
    frames = [len(log.since(0)[0].frame) for log in (sparse, dense)]
    assert sparse.bytes - dense.bytes == 10 * 8 + 2 * (frames[0] - frames[1])


def test_the_messages_that_an_update_keeps_are_counted() -> None:
    """Once it has been told, an update holds its frame twice: as it is, and in the messages for all workers."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    one = sealed(Update(1, 1, (0,), SparseGradient.dense(values), (True,)), b"")
    parts = sum(len(message.chunk) for message in one.messages)
    log = UpdateLog(1 << 20)
    log.append(one)
    assert log.bytes >= values.nbytes + len(one.frame) + parts


def test_a_dense_baseline_does_not_eat_the_machine() -> None:
    """5,000 dense rounds that nobody reads stay below the cap, and the newest can be read."""
    cap = 100_000
    log = UpdateLog(cap)
    for version in range(1, 5001):
        log.append(update(version, 1000))
        assert log.bytes <= cap
    assert [one.update.version for one in log.since(4990)] == list(range(4991, 5001))
