"""Prometheus: what a scrape says is what the frozen statistics say, in names and labels that stay."""

import math
from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from thresher.server.events import IterationRow
from thresher.server.metrics import ShardMetrics
from thresher.server.statistics import MemberStatistics, ShardStatistics

ROW = IterationRow(
    shard=1, numel=1000, version=3, members=2, contributors=(0, 1), skipped=False, only_mean=False,
    push_bytes=900, pull_bytes=800, pushed_elements=30, push_density=0.015, update_elements=20,
    update_density=0.02, residual_squared=6.25,
    threshold=0.5, learning_rate=0.1, round_seconds=0.02, staleness=3,
)  # fmt: skip
MEMBERS = (
    MemberStatistics(0, "exchanging", 3, 1000, 700, 45, 3000, 0.015, "a:1", "", wait_seconds=0.5, waits=3),
    MemberStatistics(1, "left", 2, 800, 600, 30, 2000, 0.015, "b:2", "", wait_seconds=0.25, waits=2, counts=False),
)
NOW = ShardStatistics(
    shard=1, shards=2, state="training", failure="", version=3, numel=1000, model_numel=2000, members=MEMBERS,
    verdicts={"applied": 5, "duplicate": 1, "returned": 0, "rejected": 2}, residual_squared_total=20.0,
    lost_squared_total=0.25, log_bytes=512,
    threshold=0.25, last_row=ROW,
)  # fmt: skip


def scrape(metrics: ShardMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample, by name and labels, as Prometheus would read it."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


SHARD = (("shard", "1"),)


def test_a_scrape_agrees_with_the_statistics() -> None:
    """Every counter and every last value, with the shard as its label."""
    found = scrape(ShardMetrics(lambda: NOW))
    for member in MEMBERS:
        labels = (("shard", "1"), ("worker", str(member.rank)))
        assert found["thresher_push_bytes_total", labels] == member.push_bytes
        assert found["thresher_pull_bytes_total", labels] == member.pull_bytes
        assert found["thresher_pushed_elements_total", labels] == member.pushed_elements
        assert found["thresher_wait_seconds_sum", labels] == member.wait_seconds
        assert found["thresher_wait_seconds_count", labels] == member.waits
    for verdict, count in NOW.verdicts.items():
        assert found["thresher_push_results_total", (("result", verdict), ("shard", "1"))] == count
    expected = {
        "iterations_total": 3,
        "total_error_total": 20.0,
        "dense_bytes_total": 2 * 4 * 1000 * 5,
        "members": 1,
        "lost_members": 0,
        "log_bytes": 512,
        "compression_ratio": 2 * 4 * 1000 * 5 / 3100,
        "threshold": 0.25,
        "push_density": 0.015,
        "update_density": 0.02,
        "residual_norm": 2.5,
        "staleness": 3,
    }
    assert {name: found[f"thresher_{name}", SHARD] for name in expected} == expected


def test_a_lost_member_is_one_that_rounds_still_wait_for() -> None:
    """Who was lost for longer than its lease belongs to the run no more, and is neither."""
    lost = replace(MEMBERS[0], state="lost")
    found = scrape(ShardMetrics(lambda: replace(NOW, members=(*MEMBERS, lost, replace(lost, counts=False)))))
    assert (found["thresher_members", SHARD], found["thresher_lost_members", SHARD]) == (2, 1)


def test_when_the_last_round_was_closed_is_not_known_after_a_restart() -> None:
    """The journal has the round and not the time: until the next one there is no such metric, rather than 1970."""
    metrics = ShardMetrics(lambda: NOW)
    assert ("thresher_last_iteration_timestamp_seconds", SHARD) not in scrape(metrics)
    metrics.observe(ROW)
    assert scrape(metrics)["thresher_last_iteration_timestamp_seconds", SHARD] > 0


def test_workers_can_be_summed_instead_of_labelled() -> None:
    """For many workers the label is left out; the totals stay."""
    found = scrape(ShardMetrics(lambda: NOW, per_worker=False))
    assert found["thresher_push_bytes_total", SHARD] == 1800
    assert found["thresher_pull_bytes_total", SHARD] == 1300
    assert found["thresher_pushed_elements_total", SHARD] == 75
    assert (found["thresher_wait_seconds_sum", SHARD], found["thresher_wait_seconds_count", SHARD]) == (0.75, 5)
    assert not [labels for _, labels in found if "worker" in dict(labels)]


def test_a_histogram_counts_each_round_once() -> None:
    """Sums and counts are those of the rows that were observed."""
    metrics = ShardMetrics(lambda: NOW)
    metrics.observe(ROW)
    metrics.observe(replace(ROW, update_density=0.5, round_seconds=2.0, staleness=0))
    found = scrape(metrics)
    for name, total in (
        ("push_density_distribution", 0.03), ("update_density_distribution", 0.52), ("round_seconds", 2.02),
        ("staleness_distribution", 3),
    ):  # fmt: skip
        assert found[f"thresher_{name}_count", SHARD] == 2
        assert math.isclose(found[f"thresher_{name}_sum", SHARD], total)
    assert found["thresher_update_density_distribution_bucket", (("le", "0.03"), ("shard", "1"))] == 1
    assert found["thresher_last_iteration_timestamp_seconds", SHARD] > 0


def test_a_round_for_a_mean_only_is_no_part_of_the_densities() -> None:
    """Nothing was compressed in it; but it was a round, and took its time."""
    metrics = ShardMetrics(lambda: NOW)
    metrics.observe(ROW)
    metrics.observe(
        replace(ROW, only_mean=True, push_density=0.0, update_density=0.0, residual_squared=0.0, pushed_elements=0)
    )
    found = scrape(metrics)
    counts = {"push_density_distribution": 1, "update_density_distribution": 1, "round_seconds": 2}
    assert {name: found[f"thresher_{name}_count", SHARD] for name in counts} == counts


def test_before_the_first_round_there_are_no_last_values() -> None:
    """A density of zero would be a lie; a counter of zero is not."""
    fresh = replace(NOW, version=0, last_row=None, threshold=None, members=())
    found = scrape(ShardMetrics(lambda: fresh))
    assert found["thresher_iterations_total", SHARD] == 0
    names = {name for name, _ in found}
    absent = {
        "push_density",
        "update_density",
        "residual_norm",
        "staleness",
        "threshold",
        "last_iteration_timestamp_seconds",
    }
    assert not {f"thresher_{name}" for name in absent} & names


def test_a_journal_has_a_size_where_there_is_one() -> None:
    """It is read at the scrape; a shard that keeps nothing on the disk does not claim zero bytes."""
    sizes = iter([10, 20])
    metrics = ShardMetrics(lambda: NOW, lambda: next(sizes))
    assert [scrape(metrics)["thresher_journal_bytes", SHARD] for _ in range(2)] == [10, 20]
    assert ("thresher_journal_bytes", SHARD) not in scrape(ShardMetrics(lambda: NOW))


def test_each_shard_has_a_registry_of_its_own() -> None:
    """Two shards in one process do not meet in the global registry."""
    one, other = ShardMetrics(lambda: NOW), ShardMetrics(lambda: replace(NOW, shard=0, version=9))
    assert scrape(one)["thresher_iterations_total", SHARD] == 3
    assert scrape(other)["thresher_iterations_total", (("shard", "0"),)] == 9


@pytest.mark.parametrize(
    ("members", "ratio"), [((), 1.0), (MEMBERS[:1], 24000 / 1700), ((replace(MEMBERS[0], pushable_elements=0),), 0.0)]
)
def test_the_compression_ratio_is_dense_bytes_over_bytes_moved(
    members: tuple[MemberStatistics, ...], ratio: float
) -> None:
    """Both directions together; 1 before anything has moved."""
    scraped = scrape(ShardMetrics(lambda: replace(NOW, members=members)))
    assert scraped["thresher_compression_ratio", SHARD] == ratio
