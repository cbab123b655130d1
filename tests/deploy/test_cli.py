"""The command line, without the processes it starts; tests/integration/test_launch.py runs it whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from thresher.deploy.cli import app

runner = CliRunner()

KEPT_NOTHING = json.dumps(
    {
        "command": [__file__],
        "shards": 1,
        "workers": 1,
        "method": {"threshold": 0.0},
        "consistency": {},
        "threshold_factors": [],
        "durability": "none",
    }
)


@pytest.mark.parametrize("command", [[], ["launch"], ["serve"], ["replay"], ["certs"], ["ray"]])
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
        (("--density", "0.1", "nowhere.py"), "there is no script 'nowhere.py'"),
        (("--density", "0.1", "--mode", "chaos"), "is not one of"),
        (("--density", "0.1", "--mode", "async", "--quorum", "2"), "a quorum belongs to mode sync"),
        (("--density", "0.1", "--staleness", "2"), "staleness belongs to mode ssp"),
        (("--density", "0.1", "--grace", "2"), "a grace needs a quorum"),
        (("--density", "0.1", "--shadow-threshold", "0.1"), "needs downlink 'shadow'"),
        (("--density", "0.1", "--durability", "much"), "is not one of"),
        (("--density", "0.1", "--restarts", "-1"), "must not be negative"),
        (("--resume", "nowhere"), "leave out the script beside --resume"),
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
    [
        ["--shard", "2", "--shards", "2"],
        ["--workers", "0"],
        ["--listen", "nowhere"],
        ["--round-timeout", "nan"],
        ["--durability", "disk"],
        ["--durability", "process"],
        ["--durability", "none", "--state-dir", "state"],
        ["--checkpoint-every", "-1"],
        ["--state-dir", "state", "--checkpoints", "0"],
    ],
)
def test_a_shard_that_makes_no_sense_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Exit code 2 before anything is served."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no folder of a run"), (KEPT_NOTHING, "nothing is left to go on with")]
)
def test_what_cannot_be_resumed_is_bad_usage(tmp_path: Path, text: str | None, message: str) -> None:
    """No run's folder, or one that kept nothing: exit code 2, and nothing is started."""
    if text is not None:
        (tmp_path / "launch.json").write_text(text, encoding="utf-8")
    told = runner.invoke(app, ["launch", "--resume", str(tmp_path)])
    assert told.exit_code == 2
    assert message in " ".join(told.output.split())


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    """A name that is taken, or that of the link to the newest run: exit code 2, and what is there stays as it was."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.json").touch()
    for name, message in (("mine", "exists already"), ("latest", "cannot be called 'latest'")):
        told = runner.invoke(app, ["launch", "--density", "0.1", "--runs", str(tmp_path), "--name", name, __file__])
        assert (told.exit_code, message in " ".join(told.output.split())) == (2, True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "result.json"]
