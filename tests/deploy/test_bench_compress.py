"""What the measurement of compression says: every combination, right results, plausible numbers."""

import itertools
import sys

import pytest
import torch

from thresher.deploy import bench_compress
from thresher.deploy.bench_compress import METHODS, Case, measure


@pytest.mark.slow
def test_every_combination_and_method_has_a_row() -> None:
    """In the order they were asked for; most of the time goes to a process for each, which measures memory."""
    rows = measure([1000], [0.01, 0.1], [1], repetitions=2)
    asked = itertools.product([1000], [0.01, 0.1], [1], METHODS)
    assert [(row["elements"], row["density"], row["threads"], row["method"]) for row in rows] == list(asked)
    assert {row["bandwidth_ratio_to_add"] for row in rows if row["method"].startswith("torch.add")} == {1.0}


def test_every_method_is_timed() -> None:
    """And agrees with plain torch, or it would raise."""
    seconds = bench_compress._seconds(70_000, 0.01, threads=2, repetitions=3)
    assert list(seconds) == list(METHODS)
    assert min(seconds.values()) > 0


def test_number_of_threads_is_put_back() -> None:
    """A measurement leaves torch as it was."""
    before = torch.get_num_threads()
    bench_compress._seconds(1000, 0.1, before + 1, repetitions=1)
    assert torch.get_num_threads() == before


def test_wrong_result_is_not_timed() -> None:
    """A method that takes something else than plain torch stops the measurement."""
    case = Case.of(1000, 0.1)
    case.threshold *= 2  # which the error feedback does not know of
    with pytest.raises(AssertionError, match="_error_feedback differs from plain torch"):
        bench_compress._check(case)


def test_density_is_the_wanted_one() -> None:
    """Within five standard deviations of a normal sample."""
    case = Case.of(100_000, 0.05)
    assert case.feedback.compress(case.gradient).density == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 1e5) ** 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_what_a_method_allocates() -> None:
    """Eager torch makes a vector of magnitudes; in one process of its own, as the measurement does."""
    peak = bench_compress._peak_extra_bytes(8_000_000, 0.01, 1, "eager torch threshold")
    assert peak is not None
    assert peak > 4 * 8_000_000 * 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_that_nobody_tells_is_an_error_of_the_system() -> None:
    """Which is what makes a peak None."""
    assert bench_compress._status("VmRSS") > 0
    with pytest.raises(OSError, match="no VmNothing"):
        bench_compress._status("VmNothing")
