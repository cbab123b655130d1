"""Where Prometheus finds the endpoints of a run: the document that its service discovery reads.

Formats: https://prometheus.io/docs/prometheus/latest/http_sd/ and <file_sd_config> of Prometheus' configuration.
"""

from collections.abc import Sequence
from typing import Any


def target_groups(run: str, shards: Sequence[str], workers: Sequence[str]) -> list[dict[str, Any]]:
    """Return the groups of endpoints of a run, with the labels that rules and dashboards tell runs and sides apart by.

    Args:
        run: Its name.
        shards: ``host:port`` of the endpoints of its shards.
        workers: ``host:port`` of those of its workers.

    Examples:
        >>> target_groups("digits", ["10.0.0.1:9100"], [])[0]
        {'targets': ['10.0.0.1:9100'], 'labels': {'job': 'thresher-shard', 'run': 'digits'}}
    """
    sides = {"thresher-shard": shards, "thresher-worker": workers}
    return [{"targets": list(targets), "labels": {"job": job, "run": run}} for job, targets in sides.items()]
