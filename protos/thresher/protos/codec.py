"""Sparse gradients as bytes.

A frame is a header, an index block and a value block, little-endian:

====== ===== ============ ===================================================================
offset bytes field        meaning
====== ===== ============ ===================================================================
0      4     magic        ``THSH``
4      1     version      1
5      1     index coding :class:`IndexCoding`
6      1     value coding :class:`ValueCoding`
7      1     reserved     0
8      8     numel        length of the vector
16     8     count        coordinates kept
24     8     index bytes  length of the index block
32     8     value bytes  length of the value block
40     4     crc          CRC-32 (as in zlib) of all the other bytes: 0 … 39, then 44 … the end
44     …     the index block, then the value block
====== ===== ============ ===================================================================

A value has exactly one frame: the index coding follows from ``count`` and ``numel``, and a frame with any other one is
refused. So equal digests mean equal content.
"""

import struct
import zlib
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thresher.protos.errors import FrameError
from thresher.protos.sparse import SparseGradient

MAGIC: Final = b"THSH"
VERSION: Final = 1

_HEADER: Final = struct.Struct("<4sBBBBQQQQ")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size


class IndexCoding(IntEnum):
    """How the index block says which coordinates are kept."""

    DENSE = 0  # all of them; the block is empty
    RAW32 = 1  # uint32 each, ascending; for numel <= 2**32
    RAW64 = 2  # uint64 each, ascending; for larger vectors


class ValueCoding(IntEnum):
    """How the value block holds the values, in the order of their indices."""

    F32 = 0  # IEEE 754 binary32, bits untouched


_INDEX_BYTES: Final = {IndexCoding.DENSE: 0, IndexCoding.RAW32: 4, IndexCoding.RAW64: 8}
_VALUE_BYTES: Final = {ValueCoding.F32: 4}


def encode(sparse: SparseGradient) -> bytes:
    """The frame of ``sparse``. Lossless on bits: -0.0, infinities and the payloads of NaN come back as they were.

    Raises:
        ConfigurationError: the indices are out of order or out of range (see :meth:`SparseGradient.validate`; a
            gradient that keeps every coordinate is taken at its word).

    Examples:
        >>> frame = encode(SparseGradient(torch.tensor([2]), torch.tensor([1.0]), numel=5))
        >>> len(frame), frame[:4]
        (52, b'THSH')
        >>> decode(frame, numel=5).indices
        tensor([2])
    """
    coding = _index_coding(sparse.count, sparse.numel)
    index_block = _index_block(sparse, coding)
    value_block = sparse.values.numpy(force=True).astype("<f4", order="C", copy=False).data
    header = _HEADER.pack(
        MAGIC, VERSION, coding, ValueCoding.F32, 0, sparse.numel, sparse.count, index_block.nbytes, value_block.nbytes
    )
    crc = _CRC.pack(_checksum(header, index_block, value_block))
    return b"".join((header, crc, index_block, value_block))


def decode(frame: bytes | bytearray | memoryview, *, numel: int) -> SparseGradient:
    """The gradient in ``frame``, the inverse of :func:`encode`; any other byte string is refused.

    Nothing is allocated before every length has been checked against the length of ``frame`` itself.
    From a writable buffer the values are a view: hand it over and don't write to it again. From a read-only one they
    are a copy.

    Args:
        frame: exactly one frame.
        numel: the length the vector must have.

    Raises:
        FrameError: ``frame`` is not the frame of any gradient of this length; the message says what differs.
    """
    view = memoryview(frame).cast("B")
    count, coding = _check_header(view, numel)
    values_begin = HEADER_BYTES + count * _INDEX_BYTES[coding]
    values = _values(view[values_begin:])
    if coding is IndexCoding.DENSE:
        return SparseGradient.dense(values)
    return SparseGradient(_indices(view[HEADER_BYTES:values_begin], coding, numel), values, numel)


def frame_bytes_bound(numel: int) -> int:
    """Length in bytes of the largest frame of a vector of length ``numel``.

    Examples:
        >>> frame_bytes_bound(1000)  # all but one coordinate, each with its index
        8036
    """
    value_bytes = _VALUE_BYTES[ValueCoding.F32]
    dense_bytes = numel * value_bytes
    all_but_one = max(numel - 1, 0)
    return HEADER_BYTES + max(dense_bytes, all_but_one * (_INDEX_BYTES[_index_coding(0, numel)] + value_bytes))


def _index_coding(count: int, numel: int) -> IndexCoding:
    if count == numel:
        return IndexCoding.DENSE
    return IndexCoding.RAW32 if numel <= 2**32 else IndexCoding.RAW64


def _index_block(sparse: SparseGradient, coding: IndexCoding) -> memoryview:
    if coding is IndexCoding.DENSE:
        return memoryview(b"")
    sparse.validate()
    return sparse.indices.numpy(force=True).astype(f"<u{_INDEX_BYTES[coding]}").data


def _checksum(header: bytes | memoryview, *blocks: memoryview) -> int:
    crc = zlib.crc32(header)
    for block in blocks:
        crc = zlib.crc32(block, crc)
    return crc


def _check_header(view: memoryview, numel: int) -> tuple[int, IndexCoding]:
    """Everything a frame claims about itself, checked before any of it is believed; returns count and index coding."""
    if len(view) < HEADER_BYTES:
        raise FrameError(f"frame is truncated: found {len(view)} bytes, a header alone has {HEADER_BYTES}")
    magic, version, index_coding, value_coding, reserved, found_numel, count, index_bytes, value_bytes = (
        _HEADER.unpack_from(view)
    )
    _expect("magic", magic, MAGIC)
    _expect("version", version, VERSION)
    _expect("reserved byte", reserved, 0)
    _expect("numel", found_numel, numel)
    if count > numel:
        raise FrameError(f"frame has a wrong count: found {count}, expected at most numel, {numel}")
    coding = _index_coding(count, numel)
    _expect("index coding", index_coding, int(coding))
    _expect("value coding", value_coding, int(ValueCoding.F32))
    _expect("length of the index block", index_bytes, count * _INDEX_BYTES[coding])
    _expect("length of the value block", value_bytes, count * _VALUE_BYTES[ValueCoding.F32])
    _expect("length", len(view), HEADER_BYTES + index_bytes + value_bytes)
    (crc,) = _CRC.unpack_from(view, _HEADER.size)
    _expect("crc", crc, _checksum(view[: _HEADER.size], view[HEADER_BYTES:]))
    return count, coding


def _expect(field: str, found: object, expected: object) -> None:
    if found != expected:
        raise FrameError(f"frame has a wrong {field}: found {found!r}, expected {expected!r}")


def _indices(block: memoryview, coding: IndexCoding, numel: int) -> Tensor:
    indices: npt.NDArray[Any] = np.frombuffer(block, dtype=f"<u{_INDEX_BYTES[coding]}")
    rising = indices[1:] > indices[:-1]
    if not rising.all():
        first = int(rising.argmin())
        raise FrameError(f"indices are not strictly increasing: {indices[first]}, then {indices[first + 1]}")
    if indices.size and indices[-1] >= numel:
        raise FrameError(f"index is out of range: found {indices[-1]}, expected less than numel, {numel}")
    return torch.from_numpy(indices.astype(np.int64))


def _values(block: memoryview) -> Tensor:
    values = np.frombuffer(block, dtype="<f4").astype(np.float32, copy=block.readonly)
    return torch.from_numpy(values)
