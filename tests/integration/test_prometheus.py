"""A real Prometheus scrapes a launched run; what it reports agrees with result.json."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration import launching

CONFIGURATION = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
  - job_name: thresher
    file_sd_configs:
      - files: ['{targets}']
        refresh_interval: 1s
"""


class Prometheus:
    """A server of the test's own, with its data in a folder of the test."""

    def __init__(self, program: str, folder: Path, targets: Path) -> None:
        """Start it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        configuration = folder / "prometheus.yml"
        configuration.write_text(CONFIGURATION.format(targets=targets), encoding="utf-8")
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={configuration}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression: str) -> float | None:
        """Return the value of an instant query, None while there is none."""
        address = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                found = json.load(answer)["data"]["result"]
        except OSError:
            return None  # it is still starting
        return float(found[0]["value"][1]) if found else None

    def sums(self, steps: str, expressions: dict[str, str]) -> dict[str, float | None] | None:
        """Return the values of some queries, if before and after them two endpoints show 40 steps; else None."""
        complete = f"count({steps} == 40)"
        if self.query(complete) != 2:
            return None
        found = {key: self.query(expression) for key, expression in expressions.items()}
        return found if self.query(complete) == 2 else None

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """Watch the targets that `latest` names."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian's package has it)")
    server = Prometheus(program, tmp_path, tmp_path / "runs" / "latest" / "targets.json")
    yield server
    server.stop()


@pytest.mark.timeout(240)
def test_prometheus_agrees_with_the_result(prometheus: Prometheus, tmp_path: Path) -> None:
    """Bytes, elements and rounds, as scraped from the shards and from the workers, are those of result.json."""
    # Slow steps and a wait at the end, for the workers' endpoints to be scraped after their last step.
    script = launching.write_script(tmp_path, extra="time.sleep(0.05)")
    script.write_text(script.read_text(encoding="utf-8") + "\ntime.sleep(8)\n", encoding="utf-8")
    options = ("--shards", "2", "--workers", "2", "--density", "0.05", "--linger", "30")
    launched = launching.start(tmp_path, *options, script=[str(script)])
    worker_sums = {
        "push_bytes": "sum(thresher_worker_push_bytes_total)",
        "pull_bytes": "sum(thresher_worker_pull_bytes_total)",
    }
    shard_sums = {
        "push_bytes": "sum(thresher_push_bytes_total)",
        "pull_bytes": "sum(thresher_pull_bytes_total)",
        "steps": "max(thresher_iterations_total)",
        "dense_bytes": "sum(thresher_dense_bytes_total)",
        "mean_density": "sum(thresher_pushed_elements_total) * 8 / sum(thresher_dense_bytes_total)",
    }
    try:
        at_workers: dict[str, float | None] = {}
        at_shards: dict[str, float | None] = {}
        deadline = time.monotonic() + 150
        while launched.process.poll() is None and time.monotonic() < deadline:
            # Endpoints go one after the other: what counts is what was seen while both of a kind were at the last step.
            at_workers = prometheus.sums("thresher_worker_steps_total", worker_sums) or at_workers
            at_shards = prometheus.sums("thresher_iterations_total", shard_sums) or at_shards
            time.sleep(0.25)
        code, _, err = launched.finish()
        assert code == 0, err
        one = launching.result(launched)["sparse"]
        assert at_shards == pytest.approx({key: one[key] for key in shard_sums})
        assert at_workers == {key: one[key] for key in worker_sums}
    finally:
        launching.kill(launched)
