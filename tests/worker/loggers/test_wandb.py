"""Rows in an offline run of Weights & Biases, read back from the file that it would sync."""

import importlib
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from tests.worker.test_rows import ROW

from thresher.worker.loggers.wandb import WeightsAndBiases

messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # has no types
HEADER, BLOCK = 7, 1 << 15
FULL, LAST = 1, 4


def records_of(path: Path) -> Iterator[bytes]:
    """Records of a file as W&B writes it: LevelDB's log format behind a header of seven bytes."""
    data, begin, parts = path.read_bytes(), HEADER, bytearray()
    while begin + HEADER <= len(data):
        if BLOCK - begin % BLOCK < HEADER:  # the rest of a block is zeros
            begin += BLOCK - begin % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, begin)
        begin += HEADER
        parts += data[begin : begin + length]
        begin += length
        if kind in (FULL, LAST):
            yield bytes(parts)
            parts.clear()


def history_of(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dict for each call."""
    found = []
    for data in records_of(path):
        record = messages.Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def test_every_number_of_a_row_is_logged_beside_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own step stays the user's, who logs in between; nothing leaves this machine."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)) as run:
        log = WeightsAndBiases(run)
        for step in (10, 20):
            run.log({"loss": 1.0})
            log(replace(ROW, step=step))
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = [row for row in history_of(path) if "thresher/step" in row]
    assert [row["thresher/step"] for row in rows] == [10, 20]
    for row in rows:
        assert {name: value for name, value in row.items() if name in ROW.scalars()} == ROW.scalars()
