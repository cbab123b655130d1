"""The bench of transports: it measures every way to hand bytes over, and all of them arrive."""

from importlib.metadata import PackageNotFoundError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.deploy.bench_transport import grpc_stream, measure
from thresher.deploy.ray_cluster import requirement

RAY = [
    "Ray actor call",
    "Ray async actor call",
    "Ray put, actor gets",
    "Ray actor call to another node",
    "Ray put, actor on another node gets",
]


def test_all_bytes_arrive_whatever_their_number() -> None:
    """Chunks are put together again, at the seams too, and exchanges follow each other on one stream."""
    near_a_seam = st.builds(lambda chunks, more: max(1, (chunks << 20) + more), st.integers(0, 3), st.integers(-2, 2))

    with grpc_stream() as carriers:
        (prepare,) = carriers.values()

        @settings(max_examples=25)
        @given(size=near_a_seam)
        def arrive(size: int) -> None:
            exchange = prepare(bytes(size))
            assert [exchange(), exchange()] == [size, size]

        arrive()


def test_rates_are_those_of_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without Ray it is said what would bring the missing rows."""

    def nothing_is_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(requirement, "version", nothing_is_installed)
    rows, missing = measure((1, 100, 3_000_000), repetitions=3)
    assert [(row["transport"], row["bytes"]) for row in rows] == [("gRPC stream", n) for n in (1, 100, 3_000_000)]
    for row in rows:
        rate = float(row["megabytes_per_second"])
        assert rate * float(row["microseconds_per_exchange"]) == pytest.approx(float(row["bytes"]))
    assert "pip install 'thresher[ray]'" in missing


@pytest.mark.slow
def test_ray_is_measured_beside_it() -> None:
    """Every transport at each size."""
    rows, missing = measure((100, 3_000_000), repetitions=3)
    transports = ("gRPC stream", *RAY)
    assert [(row["transport"], row["bytes"]) for row in rows] == [(t, n) for t in transports for n in (100, 3_000_000)]
    assert not missing
