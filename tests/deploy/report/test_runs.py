"""A run's folder, whatever state it is in."""

import json
from pathlib import Path

import pytest
from tests.deploy.report.written import BEGIN, shard_row, write_lines, write_run

from thresher.deploy.report.rounds import WHOLE
from thresher.deploy.report.runs import read_runs
from thresher.deploy.results import merge_iterations
from thresher.protos.errors import ConfigurationError


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    """Its result is what it wrote, and there is nothing to be noted."""
    (run,) = read_runs([write_run(tmp_path / "one")])
    assert (run.name, run.notices) == ("one", ())
    assert (run.number("accuracy"), run.number("steps")) == (0.9, 40.0)
    assert run.rounds["version"].tolist() == list(range(1, 41))
    assert run.shards.keys() == run.workers.keys() == {0, 1}
    assert run.moved[-1] == sum(
        columns[way].sum() for columns in run.shards.values() for way in ("push_bytes", "pull_bytes")
    )


def test_a_run_that_is_going_on_says_until_where(tmp_path: Path) -> None:
    """What there is is counted; it is said how old it is, and how to go on."""
    folder = write_run(tmp_path / "one", iterations=30)
    (folder / "result.json").unlink()
    (run,) = read_runs([folder], now=BEGIN + 35.1)
    (notice,) = run.notices
    assert "up to iteration 30, closed 2023-11-14 22:13:50 UTC (5 s before this report)" in notice
    assert f"thresher launch --resume {folder}" in notice
    assert run.number("steps") == 30.0
    assert run.number("push_bytes") == run.rounds["push_bytes"].sum()
    pushable = 2 * 30 * 64
    assert run.number("mean_density") == pytest.approx(run.rounds["pushed_elements"].sum() / pushable)
    assert run.number("compression_ratio") == pytest.approx(8 * pushable / run.moved[-1])
    assert run.number("accuracy") == 0.9, "the last that was printed"


def test_a_killed_run_has_torn_lines(tmp_path: Path) -> None:
    """They are left out, and so are rounds that another shard has not closed."""
    folder = write_run(tmp_path / "one")
    (folder / "result.json").unlink()
    path = folder / "shard-1.iterations.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (run,) = read_runs([folder])
    assert run.rounds["version"][-1] == 39
    assert run.notices[1] == "The last line of shard-1.iterations.jsonl is not whole, and is left out."
    assert "shard 0 1 … 40, shard 1 1 … 39" in run.notices[2]


def test_a_run_without_the_files_of_its_shards(tmp_path: Path) -> None:
    """The merged one is enough."""
    folder = write_run(tmp_path / "one")
    files = sorted(folder.glob("shard-*"))
    merge_iterations(files, folder / "iterations.jsonl", lockstep=True)
    (before,) = read_runs([folder])
    for path in files:
        path.unlink()
    (after,) = read_runs([folder])
    assert after.shards.keys() == {WHOLE}
    assert (after.moved == before.moved).all()


def test_folders_of_shards_are_read_too(tmp_path: Path) -> None:
    """Where each shard was started by itself, with a folder of its own."""
    for shard in range(2):
        (tmp_path / f"shard-{shard}").mkdir()
        rows = (shard_row(shard, version) for version in (1, 2, 3))
        write_lines(tmp_path / f"shard-{shard}" / "iterations.jsonl", rows)
    (run,) = read_runs([tmp_path])
    assert run.shards.keys() == {0, 1}
    assert "It has no result.json, which thresher launch writes" in run.notices[0]


def test_a_baseline_is_a_run_beside_its_own(tmp_path: Path) -> None:
    """Where it has begun, it is shown; its result is in the file of both."""
    folder = write_run(tmp_path / "one")
    write_run(folder / "dense")
    (folder / "dense" / "result.json").unlink()
    results = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**results, "dense": {"accuracy": 0.8}}))
    sparse, dense = read_runs([folder])
    assert (sparse.name, dense.name) == ("one", "one/dense")
    assert (sparse.number("accuracy"), dense.number("accuracy"), dense.number("loss")) == (0.9, 0.8, None)
    for path in (folder / "dense").glob("shard-*"):
        path.write_text("")
    assert [run.name for run in read_runs([folder])] == ["one"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """By as much of the path as it takes."""
    folders = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]


def test_a_run_is_named_once(tmp_path: Path) -> None:
    """Also where a link leads to it."""
    folder = write_run(tmp_path / "one")
    (tmp_path / "latest").symlink_to("one")
    assert [run.name for run in read_runs([tmp_path / "latest"])] == ["one"]
    with pytest.raises(ConfigurationError, match=r"is named twice.*name each run once"):
        read_runs([folder, tmp_path / "latest"])


def test_no_folder_is_no_run(tmp_path: Path) -> None:
    """Nor is a file."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ConfigurationError, match=f"there is no folder {path}: name one"):
            read_runs([path])


def test_a_folder_without_rows_is_no_run(tmp_path: Path) -> None:
    """Where they would come from is said."""
    with pytest.raises(ConfigurationError, match=r"is no folder of a run.*--iterations FOLDER/shard-N"):
        read_runs([tmp_path])


def test_a_run_without_iterations_is_too_early(tmp_path: Path) -> None:
    """What to do is said."""
    folder = write_run(tmp_path / "one", iterations=0)
    with pytest.raises(ConfigurationError, match=r"has no iterations yet.*wait until the first round"):
        read_runs([folder])


def test_shards_without_a_common_round_are_not_of_one_run(tmp_path: Path) -> None:
    """Nothing could be drawn."""
    for shard, version in ((0, 1), (1, 7)):
        write_lines(tmp_path / f"shard-{shard}.iterations.jsonl", [shard_row(shard, version)])
    with pytest.raises(ConfigurationError, match="no iteration in common"):
        read_runs([tmp_path])


def test_fields_of_another_version_do_not_matter(tmp_path: Path) -> None:
    """Unknown ones are passed over, numbers that a result has not are not shown."""
    folder = write_run(tmp_path / "one")
    rows = [shard_row(1, version, from_the_future={"x": [1]}) for version in range(1, 41)]
    write_lines(folder / "shard-1.iterations.jsonl", rows)
    (folder / "result.json").write_text(json.dumps({"sparse": {"news": 1, "loss": "low"}}))
    (folder / "launch.json").write_text(json.dumps({"method": "new", "consistency": 7}))
    (run,) = read_runs([folder])
    assert (run.notices, run.number("accuracy"), run.number("loss")) == ((), None, None)


@pytest.mark.parametrize("name", ["launch.json", "result.json"])
@pytest.mark.parametrize(("text", "why"), [("{", "cannot be read"), ("[]", "holds no JSON object")])
def test_a_damaged_document_is_named(tmp_path: Path, name: str, text: str, why: str) -> None:
    """And what to do about it."""
    folder = write_run(tmp_path / "one")
    (folder / name).write_text(text)
    with pytest.raises(ConfigurationError, match=f"{name} {why}.*; restore it, or move it away"):
        read_runs([folder])
