"""What workers wrote and printed."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.deploy.report.written import printed_row, worker_row, write_lines

from thresher.deploy.report.steps import read_layer_sizes, read_printed, read_workers
from thresher.protos.errors import ConfigurationError


def test_workers_are_told_apart_by_their_rank(tmp_path: Path) -> None:
    """Whatever their files are called."""
    files = [write_lines(tmp_path / f"{rank}.jsonl", (worker_row(rank, step) for step in (1, 2))) for rank in (1, 0)]
    workers = read_workers(files, [])
    assert workers.keys() == {0, 1}
    assert workers[1].columns["version"].tolist() == [1.0, 2.0]
    assert workers[1].columns["compute_seconds"].tolist() == [0.02, 0.02]


def test_layers_are_of_the_rows_that_have_them(tmp_path: Path) -> None:
    """One that comes later was not said before."""
    rows = [worker_row(0, 1, layers={"a": 3}), worker_row(0, 2, layers=None), worker_row(0, 3, layers={"a": 1, "b": 2})]
    worker = read_workers([write_lines(tmp_path / "worker-0.iterations.jsonl", rows)], [])[0]
    assert worker.layer_versions.tolist() == [1.0, 3.0]
    assert worker.layers["a"].tolist() == [3.0, 1.0]
    assert np.array_equal(worker.layers["b"], [np.nan, 2.0], equal_nan=True)


def test_a_worker_without_a_step_is_not_there(tmp_path: Path) -> None:
    """Its file is empty, or its first line is torn, which is said."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "torn.jsonl").write_text('{"rank": 1, "st')
    notices: list[str] = []
    assert read_workers([tmp_path / "empty.jsonl", tmp_path / "torn.jsonl"], notices) == {}
    assert notices == ["The last line of torn.jsonl is not whole, and is left out."]


def test_the_row_of_another_version_is_named(tmp_path: Path) -> None:
    """Without a field that is needed."""
    row = worker_row(0, 1)
    del row["exchange_seconds"]
    with pytest.raises(ConfigurationError, match=r"line 1 is no row .* 'exchange_seconds' is missing"):
        read_workers([write_lines(tmp_path / "worker-0.iterations.jsonl", [row])], [])


def test_only_numbers_are_taken_from_what_is_printed(tmp_path: Path) -> None:
    """A script prints what it likes."""
    rows = [printed_row(1, loss="high"), printed_row(2), {"time": 5.0}, printed_row(3, loss=True, accuracy=0.5)]
    printed = read_printed(write_lines(tmp_path / "printed.jsonl", rows), [])
    assert printed["loss"].value.tolist() == [1.0]
    assert printed["accuracy"].value.tolist() == [0.5]


def test_the_loss_of_an_evaluation_is_no_point_of_the_training_curve(tmp_path: Path) -> None:
    """It is printed beside an accuracy; where no other is, it is the loss."""
    evaluation = printed_row(3, loss=9.0, accuracy=0.5)
    both = read_printed(write_lines(tmp_path / "both.jsonl", [printed_row(1), printed_row(2), evaluation]), [])
    assert both["loss"].value.tolist() == [2.0, 1.0]
    alone = read_printed(write_lines(tmp_path / "alone.jsonl", [evaluation]), [])
    assert alone["loss"].value.tolist() == [9.0]


def test_what_is_printed_has_a_time(tmp_path: Path) -> None:
    """Else it could not be placed."""
    with pytest.raises(ConfigurationError, match=r"printed\.jsonl, line 1 .* 'time' is missing"):
        read_printed(write_lines(tmp_path / "printed.jsonl", [{"loss": 1.0}]), [])


def test_nothing_printed_is_nothing(tmp_path: Path) -> None:
    """No file."""
    assert read_printed(tmp_path / "printed.jsonl", []) == {}


def test_layer_sizes_are_those_of_the_model(tmp_path: Path) -> None:
    """A tensor without dimensions has one element."""
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((3, 4), np.float32), "s": np.zeros((), np.float32)}, path)
    assert read_layer_sizes(path) == {"w": 12, "s": 1}


def test_a_model_that_is_not_whole_has_no_sizes(tmp_path: Path) -> None:
    """Nor one that is not there."""
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    assert read_layer_sizes(tmp_path / "model.safetensors") == {}
    assert read_layer_sizes(tmp_path / "nowhere.safetensors") == {}
