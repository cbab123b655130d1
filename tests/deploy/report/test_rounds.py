"""The rows of shards, folded into those of the model."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.deploy.report.written import shard_row, write_lines

from thresher.deploy.report.rounds import WHOLE, Columns, fold, read_shards
from thresher.deploy.results import merge_iterations
from thresher.protos.errors import ConfigurationError

in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
FOLDED = ("version", "time", "push_bytes", "pull_bytes", "pushed_elements", "update_elements", "residual_squared",
          "threshold", "push_density", "update_density", "pushable")  # fmt: skip


def files_of(folder: Path, *versions: range) -> list[Path]:
    return [
        write_lines(folder / f"shard-{shard}.iterations.jsonl", (shard_row(shard, version) for version in some))
        for shard, some in enumerate(versions)
    ]


def same(left: Columns, right: Columns) -> bool:
    return all(np.allclose(left[name], right[name], equal_nan=True) for name in FOLDED)


@in_one_folder
@given(st.integers(1, 4), st.integers(1, 20))
def test_the_fold_is_that_of_the_merged_file(tmp_path: Path, shards: int, rounds: int) -> None:
    """In lockstep it does not matter which of the two a report reads."""
    files = files_of(tmp_path, *[range(1, rounds + 1)] * shards)
    merge_iterations(files, tmp_path / "iterations.jsonl", lockstep=True)
    notices: list[str] = []
    merged = read_shards([tmp_path / "iterations.jsonl"], notices)
    assert merged.keys() == {WHOLE}
    assert same(fold(read_shards(files, notices), notices), fold(merged, notices))
    assert notices == []


def test_a_merged_file_outside_of_lockstep_tells_shards_apart(tmp_path: Path) -> None:
    """Its rows say of which shard they are."""
    files = files_of(tmp_path, range(1, 5), range(1, 5))
    merge_iterations(files, tmp_path / "iterations.jsonl", lockstep=False)
    apart, together = read_shards(files, []), read_shards([tmp_path / "iterations.jsonl"], [])
    assert apart.keys() == together.keys()
    assert same(fold(apart, []), fold(together, []))


@in_one_folder
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5))
def test_only_rounds_that_all_shards_have_are_folded(tmp_path: Path, first: int, second: int, gone: int) -> None:
    """A shard that is behind, or has lost its first rows, shortens them; it is said."""
    notices: list[str] = []
    shards = read_shards(files_of(tmp_path, range(1, first + 1), range(1 + gone, gone + second + 1)), notices)
    rounds = fold(shards, notices)
    common = set(range(1, first + 1)) & set(range(1 + gone, gone + second + 1))
    assert rounds["version"].tolist() == sorted(common)
    assert (notices == []) == (first == second and gone == 0)
    assert all("left out of what is drawn over iterations" in notice for notice in notices)


def test_the_longest_wait_of_a_push_counts(tmp_path: Path) -> None:
    """Shards close together: a worker waited as long as at the shard where it waited longest."""
    rounds = fold(read_shards(files_of(tmp_path, range(1, 4), range(1, 4)), []), [])
    assert rounds["wait 0"].tolist() == [0.002] * 3
    assert rounds["wait 1"].tolist() == [0.002] * 3


def test_rows_without_waits_have_none(tmp_path: Path) -> None:
    """As other versions wrote them."""
    row = shard_row(0, 1)
    del row["barrier_seconds"]
    rounds = fold(read_shards([write_lines(tmp_path / "shard-0.iterations.jsonl", [row])], []), [])
    assert not [name for name in rounds if name.startswith("wait")]


def test_a_round_for_a_mean_only_could_push_nothing(tmp_path: Path) -> None:
    """It is no part of densities."""
    rows = [shard_row(0, 1), shard_row(0, 2, only_mean=True)]
    rounds = fold(read_shards([write_lines(tmp_path / "shard-0.iterations.jsonl", rows)], []), [])
    assert rounds["pushable"].tolist() == [64.0, 0.0]


def test_waits_that_belong_to_nobody_are_no_row(tmp_path: Path) -> None:
    """As many as contributors, or the line is named."""
    path = write_lines(tmp_path / "shard-0.iterations.jsonl", [shard_row(0, 1, barrier_seconds=[0.1])])
    with pytest.raises(ConfigurationError, match="line 1 is no row"):
        read_shards([path], [])


def test_rows_of_two_runs_are_refused(tmp_path: Path) -> None:
    """Versions grow from line to line."""
    path = write_lines(tmp_path / "shard-0.iterations.jsonl", [shard_row(0, 1), shard_row(0, 2), shard_row(0, 1)])
    with pytest.raises(ConfigurationError, match="more than one run"):
        read_shards([path], [])


def test_two_files_of_one_shard_are_refused(tmp_path: Path) -> None:
    """A copy beside the original."""
    paths = [write_lines(tmp_path / f"shard-{name}.iterations.jsonl", [shard_row(0, 1)]) for name in ("0", "copy")]
    with pytest.raises(ConfigurationError, match="rows of shard 0, as another file"):
        read_shards(paths, [])
