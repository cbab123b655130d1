"""benchmarks/compose_proof.py: what it finds wrong with a run, whom it kills, and that its panels can be drawn."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROOF = ROOT / "benchmarks" / "compose_proof.py"
PANELS = ROOT / "benchmarks" / "compose_panels.py"
WORKERS = ("thresher-proof-worker-1", "thresher-proof-worker-2", "thresher-proof-worker-3", "thresher-proof-worker-4")
STAYS = ("thresher-proof-shard-0-1", "thresher-proof-shard-1-1", "thresher-proof-prometheus-1")

pytestmark = pytest.mark.skipif(not PROOF.exists(), reason="the proof is in the repository")


@pytest.fixture(scope="module")
def proof() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("compose_proof", PROOF)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def good(proof: ModuleType) -> Any:
    return proof.Outcome(
        services=dict.fromkeys(STAYS, "running") | dict.fromkeys(WORKERS, "exited"),
        workers_exit_codes=dict.fromkeys(WORKERS, 0),
        shards_serving=2,
        killed={STAYS[1]: 60, WORKERS[1]: 150},
        accuracy=0.98,
        bytes_by_prometheus=1000,
        bytes_by_workers=1000,
        panels=20,
        panels_with_data=20,
    )


def test_a_run_as_it_should_be_has_no_shortcoming(proof: ModuleType, good: Any) -> None:
    assert proof.shortcomings(good) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"services": dict.fromkeys(STAYS[1:], "running")}, "not running at the end: thresher-proof-shard-0-1"),
        ({"services": dict.fromkeys(STAYS, "running") | {STAYS[2]: "exited"}}, "thresher-proof-prometheus-1"),
        ({"workers_exit_codes": {}}, "0 workers instead of 4"),
        ({"workers_exit_codes": dict.fromkeys(WORKERS, 0) | {WORKERS[3]: 1}}, "exit code 0"),
        ({"shards_serving": 1}, "1 of 2 shards serve"),
        ({"killed": {STAYS[1]: 60}}, "before a shard and a worker were killed"),
        ({"accuracy": 0.94}, "0.9400"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"bytes_by_prometheus": 1001}, "1001 bytes"),
        ({"bytes_by_prometheus": 0, "bytes_by_workers": 0}, "moved nothing"),
        ({"panels_with_data": 19}, "19 of 20"),
        ({"panels": 0, "panels_with_data": 0}, "0 of 0"),
    ],
)
def test_each_shortcoming_is_told(proof: ModuleType, good: Any, changed: dict[str, Any], says: str) -> None:
    (sentence,) = proof.shortcomings(dataclasses.replace(good, **changed))
    assert says in sentence


@pytest.mark.parametrize("pid", [1, 0, -1])
def test_what_is_no_process_of_a_container_is_not_killed(proof: ModuleType, pid: int) -> None:
    """0 is what an engine says of a container that has none; to kill it would end the caller's group."""
    with pytest.raises(SystemExit, match=f"process is {pid}"):
        proof.kill_contained(pid, "")


def test_only_a_process_of_the_container_is_killed(proof: ModuleType) -> None:
    """The kernel says in which one a process is; here it is in none, and the text stands for the container's id."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        own = Path(f"/proc/{process.pid}/cgroup").read_text(encoding="utf-8")
        with pytest.raises(SystemExit, match="is not in container 0123abcd"):
            proof.kill_contained(process.pid, "0123abcd")
        assert process.poll() is None
        proof.kill_contained(process.pid, own)
        assert process.wait(timeout=30) == -9
        with pytest.raises(SystemExit, match="is not in container"):  # it is gone
            proof.kill_contained(process.pid, own)


def test_a_step_without_a_row_is_told(proof: ModuleType, tmp_path: Path) -> None:
    rows = [{"step": step, "push_bytes": 10, "pull_bytes": 5} for step in (1, 2, 3)]
    path = tmp_path / "worker-0.iterations.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert proof.bytes_in_rows(tmp_path) == 45
    path.write_text("\n".join(map(json.dumps, rows[::2])), encoding="utf-8")
    with pytest.raises(SystemExit, match="one row for each step"):
        proof.bytes_in_rows(tmp_path)


def test_what_the_panels_showed_is_drawn(proof: ModuleType, tmp_path: Path) -> None:
    """Every panel of the dashboard, as they were and with lines that have no point, as before the first round."""
    points = [(0.0, 1.0), (2.0, 1.5), (4.0, 3.0)]
    panels = []
    for panel in proof.panels():
        lines: list[dict[str, Any]] = [{"name": legend, "points": points} for legend in proof.queries(panel)]
        lines[0]["points"] = []
        panels.append(proof.shown(panel, 0.0, 4.0, port=1) | {"lines": lines})
    found = tmp_path / "panels.json"
    found.write_text(json.dumps({"killed": {"shard-1": 2.0}, "panels": panels}), encoding="utf-8")
    subprocess.run([sys.executable, str(PANELS), str(found), str(tmp_path / "panels.png")], check=True, timeout=60)
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")
