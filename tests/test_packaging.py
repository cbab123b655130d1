"""The distribution holds the namespace and nothing else, typed throughout."""

import importlib
import tomllib
from importlib import metadata, resources
from pathlib import Path, PurePosixPath

import pytest

PACKAGES = (
    "thresher.v1",
    "thresher.protos",
    "thresher.compression",
    "thresher.simulation",
    "thresher.ddp",
    "thresher.worker",
    "thresher.server",
    "thresher.deploy",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_importable_and_says_that_it_is_typed(package: str) -> None:
    assert importlib.import_module(package).__doc__
    assert resources.files(package).joinpath("py.typed").is_file()


def test_no_other_package_is_in_the_namespace() -> None:
    roots = [Path(root) for root in importlib.import_module("thresher").__path__]
    found = {f"thresher.{source.parent.relative_to(root)}" for root in roots for source in root.glob("*/*.py")}
    assert found == set(PACKAGES)


def test_thresher_is_a_namespace_that_no_init_file_closes() -> None:
    assert importlib.import_module("thresher").__file__ is None, "an __init__.py in one root hides the other roots"


def test_nothing_is_installed_beside_the_namespace() -> None:
    installed = [PurePosixPath(path) for path in metadata.files("thresher") or ()]
    assert installed
    assert not [path for path in installed if path.suffix in {".py", ".pyi", ".so"} and path.parts[0] != "thresher"]


def test_the_wire_definition_is_installed_with_its_stubs() -> None:
    names = {entry.name for entry in resources.files("thresher.v1").iterdir()}
    definitions = {Path(name).stem for name in names if name.endswith(".proto")}
    assert definitions
    assert {f"{stem}_pb2{suffix}" for stem in definitions for suffix in (".py", ".pyi")} <= names


def test_version_is_the_one_declared() -> None:
    declared = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    assert metadata.version("thresher") == declared["project"]["version"]


def test_console_script_exists() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="thresher")
    assert callable(script.load())
