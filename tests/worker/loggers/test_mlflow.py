"""Rows in a store of MLflow, written and read back by MLflow itself."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from tests.worker.test_rows import ROW

from thresher.protos.errors import ConfigurationError
from thresher.worker.loggers.mlflow import MLflow


def test_every_number_of_a_row_is_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the active run, at the step and the time of the row."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the only store that needs no further package
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        log = MLflow()
        for step in (1, 2):
            log(replace(ROW, step=step, time=100.0 + step))
    found = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    assert found == ROW.scalars()
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "thresher/push_bytes")
    assert [(point.step, point.timestamp, point.value) for point in points] == [
        (1, 101_000, 100.0),
        (2, 102_000, 100.0),
    ]


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the import, before anything trains."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "thresher.worker.loggers.mlflow")
    with pytest.raises(ConfigurationError, match=r"package mlflow: pip install 'thresher\[mlflow\]'"):
        importlib.import_module("thresher.worker.loggers.mlflow")
