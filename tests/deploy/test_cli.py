"""The command line, without the processes it starts; tests/integration/test_launch.py runs it whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thresher.deploy.cli import app

runner = CliRunner()


@pytest.mark.parametrize("command", [[], ["launch"], ["serve"]])
def test_help_says_what_there_is(command: list[str]) -> None:
    """Every command explains itself."""
    told = runner.invoke(app, [*command, "--help"])
    assert told.exit_code == 0
    assert "--help" in told.output


def test_an_unknown_option_is_bad_usage() -> None:
    """Exit code 2."""
    assert runner.invoke(app, ["launch", "--no-such-option", "x.py"]).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--density", "1.5"), "density must be in (0, 1]"),
        (("--density", "0"), "density must be in (0, 1]"),
        (("--threshold", "-1"), "threshold must be a finite number >= 0"),
        (("--threshold", "nan"), "threshold must be a finite number >= 0"),
        (("--compressor", "TopK"), "TopK: TopK.__init__() missing"),
        (("--compressor", "TopK(0.1)", "--density", "0.1"), "does not take the run's threshold"),
        (("--budget", "much", "--steps", "10"), "is no number of bytes"),
        (("--budget", "500MB"), "say how many steps"),
        (("--density", "0.1", "--period", "4"), "need placement 'update'"),
        (("--density", "0.1", "--threshold-factors", "1,2,3", "--workers", "2"), "3 threshold factors for 2 workers"),
        (("--density", "0.1", "--threshold-factors", "fast"), "threshold factors are numbers"),
        ((), "exactly one of threshold, density, budget and precision"),
        (("--density", "0.1", "--shards", "0"), "at least one shard"),
    ],
)
def test_a_launch_that_makes_no_sense_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    """Exit code 2, a message that says what is wrong, and no folder of a run."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('started')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    told = runner.invoke(app, ["launch", *options, str(script)])
    assert told.exit_code == 2
    assert message in " ".join(told.output.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [["--shard", "2", "--shards", "2"], ["--workers", "0"], ["--listen", "nowhere"], ["--round-timeout", "nan"]],
)
def test_a_shard_that_makes_no_sense_is_bad_usage(options: list[str]) -> None:
    """Exit code 2 before anything is served."""
    assert runner.invoke(app, ["serve", *options]).exit_code == 2


def test_a_shard_announces_itself_as_data_and_ends_with_its_standard_input(tmp_path: Path) -> None:
    """One JSON line on standard output says where it serves; end of input ends it well."""
    served = subprocess.run(
        [sys.executable, "-m", "thresher.deploy", "serve", "--metrics", "127.0.0.1:0", "--until-stdin-closes"],
        input=b"",
        capture_output=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert served.returncode == 0
    ready = json.loads(served.stdout)
    assert ready["shard"] == 0
    assert ready["address"].startswith("127.0.0.1:")
    assert ready["metrics"].startswith("127.0.0.1:")


def test_a_shard_ends_well_on_sigterm_while_its_standard_input_is_open() -> None:
    """SIGTERM drains and ends: exit code 0, and nothing fatal is said."""
    served = subprocess.Popen(
        [sys.executable, "-m", "thresher.deploy", "serve", "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert served.stdout is not None
    served.stdout.readline()  # it serves
    served.terminate()
    assert served.wait(timeout=30) == 0
    _, err = served.communicate()
    assert "Fatal" not in err
