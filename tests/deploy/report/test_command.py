"""The command, over what a launch really leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tests.deploy.report.written import shard_row, write_lines
from typer.testing import CliRunner

from thresher.deploy.report.command import report
from thresher.deploy.report.runs import read_runs

app = typer.Typer()
app.command()(report)
runner = CliRunner()

SCRIPT = """
import json, torch
from thresher.worker import connect
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.Linear(10, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
session = connect().wrap(model, optimizer)
for step in range(25):
    optimizer.zero_grad()
    loss = model(torch.ones(4, 20)).square().mean()
    loss.backward()
    optimizer.step()
    print(json.dumps({"loss": loss.item()}))
print(json.dumps({"accuracy": 1.0}))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "thresher.deploy", "launch", "--shards", "2", "--workers", "1", "--density", "0.1"]
    subprocess.run(
        [*command, "--runs", str(folder), "--name", "run", str(folder / "script.py")], check=True, timeout=100
    )
    return folder / "run"


def test_a_launched_run_is_reported(launched: Path, tmp_path: Path) -> None:
    """All of it, and what the shards counted is what is drawn."""
    page = tmp_path / "report.html"
    told = runner.invoke(app, [str(launched), "--output", str(page), "--json"])
    assert told.exit_code == 0, told.output
    said = json.loads(told.stdout)
    assert said["output"] == str(page)
    assert said["runs"] == [{"name": "run", "notices": []}]
    assert said["left_out"] == []
    assert {one["name"] for one in said["figures"]} == {
        *("loss", "accuracy", "bytes", "density", "threshold", "residual", "total-error", "time", "shards", "layers")
    }
    (run,) = read_runs([launched])
    result = json.loads((launched / "result.json").read_text())["sparse"]
    assert sum(shard["push_bytes"].sum() for shard in run.shards.values()) == result["push_bytes"]
    assert sum(shard["pull_bytes"].sum() for shard in run.shards.values()) == result["pull_bytes"]
    assert f"<td>{result['compression_ratio']:.1f}</td>" in page.read_text(encoding="utf-8")


def test_a_run_is_told_in_one_line(tmp_path: Path) -> None:
    """Where the page is, on standard output; what must be known, on the other."""
    run = tmp_path / "one"
    run.mkdir()
    write_lines(run / "shard-0.iterations.jsonl", [shard_row(0, 1)])
    told = runner.invoke(app, [str(run), "--output", str(tmp_path / "report.html")])
    assert (told.exit_code, told.stdout) == (0, f"{tmp_path / 'report.html'}\n")
    assert told.stderr.startswith("one: It has no result.json")


def test_bad_input_is_bad_usage(tmp_path: Path) -> None:
    """Exit code 2, one line, and no page."""
    told = runner.invoke(app, [str(tmp_path / "nowhere"), "--output", str(tmp_path / "report.html")])
    assert told.exit_code == 2
    assert re.fullmatch(
        r"thresher: there is no folder .*nowhere: name one that thresher launch has made\n", told.stderr
    )
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_what_draws_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Where the extra is not installed, its name is said."""
    for module in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"thresher.deploy.report.{module}", raising=False)
        monkeypatch.delattr(f"thresher.deploy.report.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    told = runner.invoke(app, [str(tmp_path)])
    assert told.exit_code == 2
    assert f"takes the package {package}: pip install 'thresher[report]'" in told.stderr
