"""Ray is asked for in so many words where it is missing, or another one; everything else works without it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thresher.deploy.ray_cluster.requirement import check_ray
from thresher.protos.errors import ConfigurationError

INSTALL = "pip install 'thresher[ray]'"

Pretend = Callable[[str], None]


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Have another Ray installed: its metadata comes first."""

    def install(version: str) -> None:
        metadata = tmp_path / f"ray-{version}.dist-info"
        metadata.mkdir()
        metadata.joinpath("METADATA").write_text(f"Name: ray\nVersion: {version}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


@pytest.mark.parametrize("version", ["2.55.0", "2.60.0", "2.100.1", "2.55.0rc1"])
def test_a_ray_that_is_known_is_taken(pretend: Pretend, version: str) -> None:
    pretend(version)
    check_ray()


@pytest.mark.parametrize("version", ["2.54.9", "1.99.0", "3.0.0", "3.0.0.dev0", "10.2", "unknown"])
def test_another_ray_is_refused(pretend: Pretend, version: str) -> None:
    """The message says which one is there, which ones are taken, and what to type."""
    pretend(version)
    with pytest.raises(ConfigurationError) as told:
        check_ray()
    assert f"Ray {version} is installed" in str(told.value)
    assert ">= 2.55 and < 3," in str(told.value)
    assert INSTALL in str(told.value)


HIDDEN = """
import sys
from importlib import metadata

find = metadata.distribution

def distribution(name):
    if name == "ray":
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.distribution = distribution
sys.modules["ray"] = None
"""


def without_ray(code: str) -> "subprocess.CompletedProcess[str]":
    """Run ``code`` in a process in which Ray is not to be found."""
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize(
    "use", ["from thresher.deploy.ray_cluster import up", "import thresher.deploy.ray_cluster.directory"]
)
def test_without_ray_the_install_line_is_told(use: str) -> None:
    ended = without_ray(use)
    assert ended.returncode == 1
    assert INSTALL in ended.stderr.splitlines()[-1]
    assert "ConfigurationError" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["ray", "--help"], 0), (["ray", "status", "x"], 2), (["ray", "up", "x"], 2)],
)
def test_without_ray_the_other_commands_work(arguments: list[str], code: int) -> None:
    ended = without_ray(f"sys.argv = ['thresher', *{arguments}]\nfrom thresher.deploy.cli import main\nmain()")
    assert ended.returncode == code, ended.stderr
    assert (INSTALL in ended.stderr) == (code == 2)
