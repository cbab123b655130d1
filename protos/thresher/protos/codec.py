"""Sparse gradients as bytes.

A frame is a header, a value block and an index block, little-endian; protos/README.md specifies it well enough for a
second implementation:

====== ===== ============ ===================================================================
offset bytes field        meaning
====== ===== ============ ===================================================================
0      4     magic        ``THSH``
4      1     version      2
5      1     index coding :class:`~thresher.protos.index_codings.IndexCoding`
6      1     value coding :class:`~thresher.protos.value_codings.ValueCoding`
7      1     parameter    of the index coding; RICE: number of low bits, otherwise 0
8      8     numel        length of the vector, at most 2**62
16     8     count        coordinates kept
24     8     value bytes  length of the value block
32     8     index bytes  length of the index block, at most ⌈numel / 8⌉
40     4     crc          CRC-32 (as in zlib) of all the other bytes: 0 … 39, then 44 … the end
44     …     the value block, then the index block
====== ===== ============ ===================================================================

The values come first so that those of F32 are aligned wherever the frame is, and need no copy.
Equal frames have equal content. The codings are chosen by length alone, so one value with the same levels and seeds has
one frame; a reader takes any valid one.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from thresher.protos.errors import FrameError
from thresher.protos.index_codings import IndexCoding, Support, decode_indices, encode_indices
from thresher.protos.sparse import MOST_ELEMENTS, SparseGradient
from thresher.protos.value_codings import ValueCoding, decode_values, encode_values

MAGIC: Final = b"THSH"
VERSION: Final = 2

_LAST_INDEX_CODING: Final = max(IndexCoding)
_LAST_VALUE_CODING: Final = max(ValueCoding)
_HEADER: Final = struct.Struct("<4sBBBBQQQQ")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size


@final
@dataclass(frozen=True, slots=True)
class _Header:
    """What a frame says of itself; the sizes fit its length."""

    index_coding: IndexCoding
    value_coding: ValueCoding
    parameter: int
    count: int
    value_bytes: int


def encode(sparse: SparseGradient) -> bytes:
    """The frame of ``sparse``. Lossless on bits: -0.0, infinities and the payloads of NaN come back as they were.

    Raises:
        ConfigurationError: the indices are out of order or out of range (see :meth:`SparseGradient.validate`; a
            gradient that keeps every coordinate is taken at its word), numel exceeds 2**62, or the levels or seeds
            stand for something else than the values and indices beside them.

    Examples:
        >>> import torch
        >>> frame = encode(SparseGradient(torch.tensor([2]), torch.tensor([0.1]), numel=5))
        >>> len(frame), frame[:4]
        (49, b'THSH')
        >>> decode(frame, numel=5).indices
        tensor([2])
    """
    indices = encode_indices(sparse)
    values = encode_values(sparse)
    blocks = (*values.parts, indices.data)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        indices.coding,
        values.coding,
        indices.parameter,
        sparse.numel,
        sparse.count,
        values.nbytes,
        indices.data.size,
    )
    crc = _CRC.pack(_checksum((header, *(block.data for block in blocks))))
    return b"".join((header, crc, *(block.data for block in blocks)))


def decode(frame: bytes | bytearray | memoryview, *, numel: int) -> SparseGradient:
    """The gradient in ``frame``, the inverse of :func:`encode`; what is no frame of that length is refused.

    Nothing is allocated before every length has been checked against the length of ``frame`` itself: memory is at most
    128 bytes per byte of the frame, and where indices are drawn from seeds 24 bytes per element of the vector besides.
    Time is linear in the length of the frame and ``numel``.
    From a writable buffer, values that travelled as float32 are a view: hand it over and don't write to it again. From
    a read-only one they are a copy. Levels and seeds that travelled come back as well.

    Args:
        frame: exactly one frame.
        numel: the length the vector must have.

    Raises:
        FrameError: ``frame`` is not the frame of any gradient of this length; the message says what differs.
    """
    view = memoryview(frame).cast("B")
    header = _check_header(view, numel)
    body = np.frombuffer(bytearray(view) if view.readonly else view, dtype=np.uint8)[HEADER_BYTES:]
    contents = decode_values(header.value_coding, body[: header.value_bytes], header.count)
    if header.index_coding is IndexCoding.DENSE:
        whole = SparseGradient.dense(contents.values)
        support = Support(whole.indices)
    else:
        index_block = body[header.value_bytes :]
        support = decode_indices(header.index_coding, header.parameter, index_block, header.count, numel)
    return SparseGradient(support.indices, contents.values, numel, contents.levels, support.seeds)


def frame_bytes_bound(numel: int) -> int:
    """Length in bytes that no frame of a vector of length ``numel`` exceeds: four per value, and one bit per element.

    Examples:
        >>> frame_bytes_bound(1000)
        4169
    """
    return HEADER_BYTES + 4 * numel + _index_bytes_bound(numel)


def _index_bytes_bound(numel: int) -> int:
    return (numel + 7) // 8


def _checksum(parts: Iterable[bytes | memoryview]) -> int:
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _check_header(view: memoryview, numel: int) -> _Header:
    """Everything a frame claims about itself, checked before any of it is believed."""
    if len(view) < HEADER_BYTES:
        raise FrameError(f"frame is truncated: found {len(view)} bytes, a header alone has {HEADER_BYTES}")
    magic, version, index_coding, value_coding, parameter, found_numel, count, value_bytes, index_bytes = (
        _HEADER.unpack_from(view)
    )
    _expect("magic", magic, MAGIC)
    _expect("version", version, VERSION)
    _expect("numel", found_numel, numel)
    _expect_at_most("numel", numel, MOST_ELEMENTS)
    _expect_at_most("count", count, numel)
    _expect_at_most("index coding", index_coding, _LAST_INDEX_CODING)
    _expect_at_most("value coding", value_coding, _LAST_VALUE_CODING)
    if (index_coding == IndexCoding.DENSE) != (count == numel):
        raise FrameError(f"frame has a wrong index coding: found {index_coding} for {count} of {numel} coordinates")
    _expect_at_most("length of the value block", value_bytes, 4 * count)
    _expect_at_most("length of the index block", index_bytes, _index_bytes_bound(numel))
    if index_coding == IndexCoding.DENSE:
        _expect("parameter", parameter, 0)
        _expect("length of the index block", index_bytes, 0)
    _expect("length", len(view), HEADER_BYTES + value_bytes + index_bytes)
    (crc,) = _CRC.unpack_from(view, _HEADER.size)
    _expect("crc", crc, _checksum((view[: _HEADER.size], view[HEADER_BYTES:])))
    return _Header(IndexCoding(index_coding), ValueCoding(value_coding), parameter, count, value_bytes)


def _expect(field: str, found: object, expected: object) -> None:
    if found != expected:
        raise FrameError(f"frame has a wrong {field}: found {found!r}, expected {expected!r}")


def _expect_at_most(field: str, found: int, most: int) -> None:
    if found > most:
        raise FrameError(f"frame has a wrong {field}: found {found}, expected at most {most}")
