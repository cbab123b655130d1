"""What `thresher advise` predicts, held against what steps then take between hosts behind shaped links."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAB = Path(os.environ.get("THRESHER_LAB", Path(__file__).parents[3] / "shared" / "lab")) / "netlab.sh"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "advise_links.py"
WITHIN = 0.25

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.skipif(
        not SCRIPT.exists() or not LAB.exists() or os.geteuid() != 0,
        reason="needs netlab.sh (THRESHER_LAB names its folder) and root, for network namespaces, and benchmarks/",
    ),
]


@pytest.mark.timeout(900)
def test_predictions_are_within_a_quarter_of_what_is_measured(tmp_path: Path) -> None:
    """At 100 Mbit/s and 1 Gbit/s, with everything sent and with one element in a hundred."""
    output = tmp_path / "result.json"
    probe = subprocess.run(["ip", "netns", "add", "advise-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr}")
    subprocess.run(["ip", "netns", "del", "advise-probe"], check=True)
    subprocess.run([sys.executable, str(SCRIPT), "--steps", "30", "--output", str(output)], check=True)
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert [row["rate"] for row in rows] == ["100mbit"] * 3 + ["1gbit"] * 3
    assert {(row["rate"], row["setting"]): row["error"] for row in rows if abs(row["error"]) > WITHIN} == {}
