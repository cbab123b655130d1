"""Service discovery for Prometheus: the form that it reads, and the labels that the rules go by."""

import json

from hypothesis import given
from hypothesis import strategies as st

from thresher.deploy.discovery import target_groups

addresses = st.lists(st.integers(1, 65535).map("10.0.0.1:{}".format), max_size=4)


@given(st.text(), addresses, addresses)
def test_every_endpoint_is_in_the_group_of_its_side(run: str, shards: list[str], workers: list[str]) -> None:
    """As it was given, with the job and the run as text; also read back from JSON."""
    found = json.loads(json.dumps(target_groups(run, shards, workers)))
    assert found == [
        {"targets": shards, "labels": {"job": "thresher-shard", "run": run}},
        {"targets": workers, "labels": {"job": "thresher-worker", "run": run}},
    ]
