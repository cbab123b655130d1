"""One checkpoint of a shard as one safetensors file, with a checksum over everything that is read back from it."""

import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thresher.protos.errors import ConfigurationError, FrameError
from thresher.server.records import sync_path

TABLE: Final = "table"
UNFINISHED: Final = "unfinished"

_FORMAT: Final = "thresher checkpoint 1"


@final
@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a shard knows at one moment.

    Attributes:
        generation: its number; the log file of that number holds what came after it.
        table: the shard's own bytes: its version, last steps, members.
        tensors: parameters and optimizer state by name; any name but ``table``.
    """

    generation: int
    table: bytes
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        """Refuse the one name that is taken.

        Raises:
            ConfigurationError: a tensor is named ``table``.
        """
        if TABLE in self.tensors:
            raise ConfigurationError(f"a checkpoint's tensor cannot be named {TABLE!r}: rename it")


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that ``path`` is either absent or whole, and on the disk, whenever the power goes.

    It is written into the folder ``unfinished`` beside, where safetensors may use a temporary file of any name, synced,
    and renamed. What an earlier try left in that folder is removed.

    Raises:
        OSError: it could not be written, for want of space say; nothing is left of it.
    """
    unfinished = path.parent / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    beside = unfinished / path.name
    table = torch.from_numpy(np.frombuffer(bytearray(checkpoint.table), dtype=np.uint8))
    tensors = {TABLE: table, **{name: tensor.detach().cpu() for name, tensor in checkpoint.tensors.items()}}
    try:
        save_file(tensors, beside, _metadata(checkpoint.generation, tensors))
        sync_path(beside)
        beside.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_path(path.parent)


def read_checkpoint(path: Path, generation: int) -> Checkpoint:
    """Read a checkpoint and check every bit of it. The tensors are private to the caller, on the CPU.

    Raises:
        FrameError: the file cannot be read, is no checkpoint of this generation, or its checksum is wrong.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise FrameError(f"it cannot be read: {error}") from error
    if TABLE not in tensors or metadata != _metadata(generation, tensors):
        raise FrameError(f"it is damaged, or no checkpoint of generation {generation}: its checksum is wrong")
    return Checkpoint(generation, tensors.pop(TABLE).numpy().tobytes(), tensors)


def _metadata(generation: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what the file says of itself: beside its kind, a CRC-32 over names, dtypes, shapes and bytes."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return {"format": _FORMAT, "generation": str(generation), "crc32": f"{crc:08x}"}
