"""Where a run is found."""

import json
from pathlib import Path

import pytest

from thresher.deploy.launch_config import LaunchConfig
from thresher.deploy.results import RunResult, write_results
from thresher.deploy.watching_places import Access, find
from thresher.protos.errors import ConfigurationError, ConnectionTimeoutError
from thresher.worker import Method

RESULT = RunResult(None, None, 12, [12, 12], 1000, 2000, 300_000, 0.01, 100.0, 3.5)


def made(folder: Path, *, baseline: bool = False, shards: int = 2) -> Path:
    """The folder of a launch that has just begun."""
    script = folder / "script.py"
    script.touch()
    run = folder / "runs" / "one"
    run.mkdir(parents=True)
    config = LaunchConfig((str(script),), shards, 1, Method(density=0.01), baseline=baseline)
    config.write(run / "launch.json")
    return run


def says(run: Path, shard: int, address: str) -> None:
    run.mkdir(exist_ok=True)
    with (run / f"shard-{shard}.log").open("a", encoding="utf-8") as log:
        log.write(f"some log\n{json.dumps({'shard': shard, 'address': address})}\n")


def test_a_list_of_addresses_is_itself() -> None:
    place = find("127.0.0.1:5000, 127.0.0.1:5001", Access())
    assert [where() for where in place.shards] == ["127.0.0.1:5000", "127.0.0.1:5001"]
    assert place.outcome is None
    assert find("ray://digits/0,ray://digits/1", Access()).shards[1]() == "ray://digits/1"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "neither a folder here nor host:port"),
        ("127.0.0.1:many", "is not an address"),
        (",", "names no shard"),
        ("10.0.0.7:5000", "would not be encrypted"),
        ("ray://", "no name of a run"),
        ("ray://a/b/c", "neither host:port nor a name"),
        ("unknown://run", "nothing that is installed knows addresses of unknown://"),
        ("ray://one,ray://two", "names a run, and no shard of it"),
    ],
)
def test_what_is_no_place_is_told_so(where: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find(where, Access())


def test_plain_text_over_a_network_must_be_asked_for() -> None:
    assert find("10.0.0.7:5000", Access(insecure=True)).insecure


def test_without_a_name_it_is_the_latest_run_here_or_else_the_environment_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="nothing to look at"):
        find(None, Access(), {})
    environment = {"THRESHER_SHARDS": "127.0.0.1:5000"}
    assert find(None, Access(), environment).name == "127.0.0.1:5000"
    made(tmp_path)
    (tmp_path / "runs" / "latest").symlink_to("one")
    assert find(None, Access(), environment).name == "runs/latest"


def test_a_folder_s_shards_are_where_they_said_last(tmp_path: Path) -> None:
    """Before they have said so, each is asked for in vain; a launch that is resumed has other ports."""
    run = made(tmp_path)
    first, second = find(str(run), Access()).shards
    with pytest.raises(ConnectionTimeoutError, match=r"shard 0 has not said yet where it serves; see .*shard-0\.log"):
        first()
    says(run, 0, "127.0.0.1:5000")
    says(run, 1, "127.0.0.1:5001")
    assert (first(), second()) == ("127.0.0.1:5000", "127.0.0.1:5001")
    says(run, 0, "127.0.0.1:6000")
    assert first() == "127.0.0.1:6000"


def test_a_folder_leads_to_the_baseline_when_that_is_next_and_ends_with_it(tmp_path: Path) -> None:
    run = made(tmp_path, baseline=True, shards=1)
    place = find(str(run), Access())
    assert place.outcome is not None
    says(run, 0, "127.0.0.1:5000")
    says(run / "dense", 0, "127.0.0.1:6000")
    assert (place.shards[0](), place.outcome()) == ("127.0.0.1:5000", "")
    write_results(run / "result.json", {"sparse": RESULT})
    assert (place.shards[0](), place.outcome()) == ("127.0.0.1:6000", "")
    write_results(run / "result.json", {"sparse": RESULT, "dense": RESULT})
    assert place.outcome() == "; ".join(
        f"{name}: 12 iterations in 3.5 s, 1 kB up, 2 kB down, compression ratio 100.0" for name in ("sparse", "dense")
    )


def test_a_folder_that_is_none_of_a_run_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is no folder of a run: it has no launch\.json"):
        find(str(tmp_path), Access())
    run = made(tmp_path)
    (run / "launch.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        find(str(run), Access())


def test_what_the_caller_names_goes_before_what_the_run_says(tmp_path: Path) -> None:
    """Of a named run the directory knows paths; a token of one's own takes the place of the workers'."""
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    for path in (theirs, own):
        path.touch(mode=0o600)
        path.write_text("x" * 40, encoding="ascii")
    known = {"THRESHER_TOKEN_FILE": str(theirs)}
    assert Access().credentials(known).token_file == theirs
    assert Access(token_file=own).credentials(known).token_file == own
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Access(token_file=tmp_path / "missing").credentials({})
