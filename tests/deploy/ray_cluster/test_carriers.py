"""Ray's ways to hand bytes over, on a real one: all bytes arrive, and nothing of it stays."""

import pytest
import ray

from thresher.deploy.ray_cluster.carriers import ray_calls

pytestmark = pytest.mark.xdist_group("ray")


@pytest.mark.slow
def test_all_bytes_arrive_and_ray_is_gone_afterwards() -> None:
    """Those that travel with the call, those that go through the store, and those that a second store fetches."""
    sizes = (1, 100, 100_000, 200_000, 10_000_000)
    with ray_calls() as carriers:
        for prepare in carriers.values():
            for size in sizes:
                exchange = prepare(bytes(size))
                assert [exchange(), exchange()] == [size, size]
    assert not ray.is_initialized()
