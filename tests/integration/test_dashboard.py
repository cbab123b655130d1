"""Grafana's dashboard on a real run: each query of each panel finds data on a real Prometheus."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tests.integration import launching
from tests.integration.scraping import Prometheus, program

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "thresher.json"
CONFIGURATION = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}}
rule_files: [limits.yml, rules.yml, alerts.yml]
scrape_configs:
  - job_name: thresher
    file_sd_configs:
      - files: ['{targets}']
        refresh_interval: 1s
"""

pytestmark = pytest.mark.skipif(not DASHBOARD.exists(), reason="the dashboard is in the repository")


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def queries() -> dict[str, str]:
    """Every query, by panel and legend, for all runs."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$run", ".*")
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    }


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[launching.Launched]:
    """A run of two shards and two workers that goes on for as long as somebody looks."""
    program("prometheus")
    script = launching.write_script(tmp_path, extra="time.sleep(0.02)", epochs=500)
    run = launching.start(tmp_path, "--shards", "2", "--workers", "2", "--density", "0.05", script=[str(script)])
    yield run
    launching.kill(run)
    run.finish()


@pytest.fixture
def prometheus(launched: launching.Launched, tmp_path: Path) -> Iterator[Prometheus]:
    """With the rules of deploy/prometheus."""
    for name in ("limits.yml", "rules.yml", "alerts.yml"):
        shutil.copy(ROOT / "deploy" / "prometheus" / name, tmp_path)
    server = Prometheus(tmp_path, CONFIGURATION.format(targets=launched.run / "targets.json"))
    yield server
    server.stop()


@pytest.mark.timeout(120)
def test_each_query_of_each_panel_finds_data(prometheus: Prometheus, launched: launching.Launched) -> None:
    missing = queries()
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:
        assert launched.process.poll() is None, launched.finish()
        missing = {name: query for name, query in missing.items() if not prometheus.ask(query)}
        time.sleep(0.25)
    assert missing == {}
    assert prometheus.ask('ALERTS{alertstate="firing"}') == []


def test_no_panel_lies_over_another_and_none_is_unexplained() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & own, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))


def test_grafana_is_told_where_the_dashboard_and_its_data_are() -> None:
    provisioning = DASHBOARD.parents[1] / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "thresher.yml").read_text(encoding="utf-8"))[
        "providers"
    ]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    mounted = {one.split(":")[1]: one.split(":")[0] for one in compose["services"]["grafana"]["volumes"]}
    assert (ROOT / mounted[provider["options"]["path"]]).resolve() == DASHBOARD.parent
