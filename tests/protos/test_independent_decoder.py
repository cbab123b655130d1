"""The page specifies the frame: a decoder that follows it alone reads every frame, and refuses what is none."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.protos.golden_frames import FOLDER
from tests.protos.independent_decoder import RefusedError, read
from tests.protos.test_codec import sparse_gradients

from thresher.protos.codec import decode, encode
from thresher.protos.errors import FrameError
from thresher.protos.sparse import SparseGradient


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.frame")), ids=lambda path: path.stem)
def test_golden_frames_hold_what_is_written_beside_them(path: Path) -> None:
    """Read by the page, each file gives its content."""
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    numel, indices, values = read(path.read_bytes())
    assert (numel, indices) == (expected["numel"], expected["indices"])
    assert [f"{word:08x}" for word in values] == expected["values"]


@given(sparse_gradients())
def test_frames_are_read_by_the_page(gradient: SparseGradient) -> None:
    """Whatever the encoder writes, the page explains."""
    numel, indices, values = read(encode(gradient))
    assert (numel, indices) == (gradient.numel, gradient.indices.tolist())
    assert values == [word & 0xFFFFFFFF for word in gradient.values.view(torch.int32).tolist()]


@given(sparse_gradients(), st.data())
def test_both_readers_agree_on_damaged_frames(gradient: SparseGradient, data: st.DataObject) -> None:
    """With a bit flipped and the crc right again, either both refuse it or both read the same."""
    frame = bytearray(encode(gradient))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    frame[40:44] = zlib.crc32(frame[44:], zlib.crc32(frame[:40])).to_bytes(4, "little")
    try:
        numel, indices, values = read(bytes(frame))
    except (RefusedError, LookupError, OverflowError, ValueError, ArithmeticError):
        with pytest.raises(FrameError):
            decode(frame, numel=int.from_bytes(frame[8:16], "little"))
        return
    again = decode(frame, numel=numel)
    assert indices == again.indices.tolist()
    assert values == [word & 0xFFFFFFFF for word in again.values.view(torch.int32).tolist()]
