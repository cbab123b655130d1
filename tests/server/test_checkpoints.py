"""One checkpoint file: it comes back bit by bit, whatever bit is wrong is found, and a failed write leaves nothing."""

import resource
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from thresher.protos.errors import ConfigurationError, FrameError
from thresher.server.checkpoints import UNFINISHED, Checkpoint, read_checkpoint, write_checkpoint

SMALL = Checkpoint(3, b"rows", {"w": torch.tensor([1.5, -0.0]), "step": torch.tensor(4)})


def bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


names = st.text(max_size=8).filter(lambda name: name not in {"table", "__metadata__"})  # the latter is safetensors' own


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).reshape(shape)
    size = count * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)  # any bits, also those of NaN


@given(st.binary(max_size=50), st.dictionaries(names, tensors(), max_size=4))
def test_a_checkpoint_comes_back_bit_by_bit(table: bytes, state: dict[str, Tensor]) -> None:
    """Law: read(write(x)) = x for any table and tensors of any name, dtype, shape and content."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint")
        write_checkpoint(path, Checkpoint(3, table, state))
        found = read_checkpoint(path, 3)
        assert [file.name for file in path.parent.iterdir()] == ["checkpoint"]
    assert (found.generation, found.table, found.tensors.keys()) == (3, table, state.keys())
    for name, tensor in found.tensors.items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
        assert bits(tensor) == bits(state[name])


def test_a_flipped_bit_is_found_in_every_byte(tmp_path: Path) -> None:
    """Law: whichever byte of the file is wrong, header included, the checkpoint is refused."""
    path = tmp_path / "checkpoint"
    write_checkpoint(path, SMALL)
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place * 5 % 8
        path.write_bytes(flipped)
        with pytest.raises(FrameError):
            read_checkpoint(path, SMALL.generation)


def test_a_file_of_any_other_length_is_found(tmp_path: Path) -> None:
    """Law: a checkpoint cut anywhere, or with more behind it, is refused."""
    path = tmp_path / "checkpoint"
    write_checkpoint(path, SMALL)
    data = path.read_bytes()
    for other in (*(data[:size] for size in range(len(data))), data + b"\0"):
        path.write_bytes(other)
        with pytest.raises(FrameError, match="cannot be read"):
            read_checkpoint(path, SMALL.generation)


def test_what_is_no_checkpoint_of_this_generation_is_refused(tmp_path: Path) -> None:
    """Absent, another one's, or somebody else's tensors: each is told."""
    path = tmp_path / "checkpoint"
    with pytest.raises(FrameError, match="cannot be read"):
        read_checkpoint(path, 3)
    with pytest.raises(FrameError, match="cannot be read"):
        read_checkpoint(tmp_path, 3)
    write_checkpoint(path, SMALL)
    with pytest.raises(FrameError, match="no checkpoint of generation 4"):
        read_checkpoint(path, 4)
    for foreign in ({"w": torch.zeros(1)}, {"table": torch.zeros(1, dtype=torch.uint8)}):
        save_file(foreign, path)
        with pytest.raises(FrameError, match="no checkpoint of generation 3"):
            read_checkpoint(path, 3)


def test_the_name_of_the_table_is_taken() -> None:
    """A tensor of that name would hide the table."""
    with pytest.raises(ConfigurationError, match=r"'table'.*rename"):
        Checkpoint(1, b"", {"table": torch.zeros(1)})


def test_what_was_read_belongs_to_the_reader(tmp_path: Path) -> None:
    """Training on with the tensors changes nothing on the disk."""
    path = tmp_path / "checkpoint"
    write_checkpoint(path, SMALL)
    read_checkpoint(path, SMALL.generation).tensors["w"].add_(1)
    assert torch.equal(read_checkpoint(path, SMALL.generation).tensors["w"], SMALL.tensors["w"])


def test_tensors_may_be_views_of_one_copy(tmp_path: Path) -> None:
    """A caller copies its state in one piece, and hands over the parts; also such that require a gradient."""
    whole = torch.arange(6.0, requires_grad=True)
    path = tmp_path / "checkpoint"
    write_checkpoint(path, Checkpoint(1, b"", {"a": whole[:2], "b": whole[2:]}))
    assert torch.equal(read_checkpoint(path, 1).tensors["b"], torch.arange(2.0, 6.0))


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    """A file that the system refuses to let grow stands in for a full disk; leftovers of a kill go at the next try."""
    path = tmp_path / "checkpoint"
    write_checkpoint(path, SMALL)
    leftover = tmp_path / UNFINISHED / ".tmp123"
    leftover.parent.mkdir()
    leftover.write_bytes(b"from a life before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(path, Checkpoint(SMALL.generation, b"", {"w": torch.zeros(100_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    assert read_checkpoint(path, SMALL.generation).table == SMALL.table
