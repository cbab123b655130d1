"""Prometheus' own tool reads deploy/prometheus and runs its unit tests; and no alert is without one."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from tests.integration.scraping import program

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
NAME = re.compile(r"\bthresher_[a-z_]+\b")
SUFFIX = re.compile(r"_(sum|count|bucket)$")

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the configuration of Prometheus is in the repository")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    files = read(FOLDER / "prometheus.yml")["rule_files"]
    return [rule for file in files for group in read(FOLDER / file)["groups"] for rule in group["rules"]]


def unit_tests() -> list[dict[str, Any]]:
    return [test for path in sorted((FOLDER / "tests").glob("*.yml")) for test in read(path)["tests"]]


def promtool(*arguments: str) -> str:
    ran = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_configuration_and_all_rules_are_read() -> None:
    said = promtool("check", "config", str(FOLDER / "prometheus.yml"))
    assert sum(map(int, re.findall(r"(\d+) rules found", said))) == len(rules())


@pytest.mark.parametrize("path", sorted((FOLDER / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_rules_and_alerts_do_what_their_unit_tests_say(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(path))


def test_each_alert_is_shown_to_fire_and_to_be_silent() -> None:
    cases = [case for test in unit_tests() for case in test.get("alert_rule_test", [])]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_each_recorded_rule_is_computed_in_a_unit_test() -> None:
    asked = " ".join(case["expr"] for test in unit_tests() for case in test.get("promql_expr_test", []))
    recorded = {rule["record"] for rule in rules() if "record" in rule and rule["record"].startswith("run")}
    assert {name for name in recorded if name not in asked} == set()


def test_rules_speak_of_metrics_that_are_documented() -> None:
    documented = set(NAME.findall((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")))
    expressions = [re.sub(r"\brun(_shard)?:[\w:]+", "", rule["expr"]) for rule in rules()]
    used = {SUFFIX.sub("", name) for expression in expressions for name in NAME.findall(expression)}
    assert used - documented == set()


def test_each_alert_says_what_it_means_and_how_bad_that_is() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert {"summary", "description"} == rule["annotations"].keys()
