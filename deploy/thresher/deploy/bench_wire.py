"""What a frame costs: bytes for each element kept, and how fast they are made and read, beside plain codings."""

import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch

from thresher.protos.codec import decode, encode
from thresher.protos.errors import ConfigurationError
from thresher.protos.seeded import key_of, seeded_indices, uniforms
from thresher.protos.sparse import Levels, SparseGradient
from thresher.protos.varints import pack_varints, unpack_varints

Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]

DENSITIES: Final = (1e-4, 1e-3, 1e-2, 1e-1)
ELEMENTS: Final = 25_000_000
REPETITIONS: Final = 7

_BLOCK: Final = 4096  # values that share a scale
_RUN: Final = 64  # neighbours, where what is kept is clustered


@final
@dataclass(frozen=True, slots=True)
class Coding:
    """A way to write a gradient as bytes and to read it again.

    Args:
        name: in plain words.
        write: gradient → bytes.
        read: bytes, and the gradient whose numel and count a header would hold → indices and values.
        index_bytes: how many of the bytes are for the indices.
    """

    name: str
    write: Callable[[SparseGradient], bytes]
    read: Callable[[bytearray, SparseGradient], object]
    index_bytes: Callable[[bytes, SparseGradient], int]


def measure(
    elements: int = ELEMENTS, densities: Sequence[float] = DENSITIES, repetitions: int = REPETITIONS
) -> list[dict[str, float | int | str]]:
    """Write and read gradients of ``elements`` with random supports of each density, and with clustered ones.

    Speeds are those of one thread, the best of several ``repetitions``, in kept elements per second. The entropy is
    that of a support that is as likely as any other of its size; clustered ones may cost less.

    Returns:
        Rows of ``elements``, ``density``, ``coding`` (and whether the support is clustered), ``index_bits_per_element``
        (without the header), ``entropy_bits_per_element``, ``bytes_per_element`` (with it),
        ``encode_elements_per_second`` and ``decode_elements_per_second``.

    Raises:
        ConfigurationError: a density keeps no element, or all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for density in densities for row in _rows(elements, density, repetitions)]
    finally:
        torch.set_num_threads(threads)


def entropy_bits_per_element(elements: int, count: int) -> float:
    """log2 of the number of supports of ``count`` coordinates of ``elements``, divided by ``count``.

    Examples:
        >>> round(entropy_bits_per_element(4, 2), 4)  # six of them
        1.2925
    """
    ways = math.lgamma(elements + 1) - math.lgamma(count + 1) - math.lgamma(elements - count + 1)
    return ways / math.log(2) / count


def _rows(elements: int, density: float, repetitions: int) -> Iterator[dict[str, float | int | str]]:
    count = int(elements * density)
    if not 0 < count < elements:
        raise ConfigurationError(
            f"a density of {density} keeps {count} of {elements} elements: there is nothing to code"
        )
    scattered = torch.from_numpy(seeded_indices(elements, count, key_of(1)))
    starts = seeded_indices(elements // _RUN, -(-count // _RUN), key_of(2)) * _RUN
    clustered = torch.from_numpy((starts[:, None] + np.arange(_RUN)).ravel()[:count])
    for support, indices in (("", scattered), (", clustered", clustered)):
        plain = SparseGradient(indices, torch.from_numpy(uniforms(key_of(3), count)) - 0.5, elements)
        for gradient, coding in (*_ours(plain), *((plain, coding) for coding in _others())):
            frame = coding.write(gradient)
            writing = _seconds(partial(coding.write, gradient), repetitions)
            reading = _seconds(partial(coding.read, bytearray(frame), gradient), repetitions)
            yield {
                "elements": elements,
                "density": density,
                "coding": coding.name + support,
                "index_bits_per_element": 8 * coding.index_bytes(frame, gradient) / count,
                "entropy_bits_per_element": entropy_bits_per_element(elements, count),
                "bytes_per_element": len(frame) / count,
                "encode_elements_per_second": count / writing,
                "decode_elements_per_second": count / reading,
            }


def _ours(plain: SparseGradient) -> Iterator[tuple[SparseGradient, Coding]]:
    """The same support with values of each kind."""
    indices, values, numel = plain.indices, plain.values, plain.numel
    levels = _levels(values)
    gradients = {
        "f32": plain,
        "bf16": SparseGradient(indices, values.bfloat16().float(), numel),
        "f16": SparseGradient(indices, values.half().float(), numel),
        "int8 levels": SparseGradient(indices, _products(levels), numel, levels),
        "signs": SparseGradient(indices, torch.where(values < 0, -0.1, 0.1), numel),
    }
    for name, gradient in gradients.items():
        yield gradient, Coding(f"thresher {name}", encode, _read_frame, _index_bytes_of_frame)


def _read_frame(frame: bytearray, gradient: SparseGradient) -> SparseGradient:
    return decode(frame, numel=gradient.numel)


def _index_bytes_of_frame(frame: bytes, _: SparseGradient) -> int:
    return int.from_bytes(frame[32:40], "little")


def _levels(values: torch.Tensor) -> Levels:
    """127 levels to each side, scaled to the largest of each block."""
    blocks = torch.split(values, _BLOCK)
    scales = torch.stack([block.abs().max() / 127 for block in blocks])
    codes = torch.cat([(block / scale).round() for block, scale in zip(blocks, scales, strict=True)])
    ends = torch.tensor([len(block) for block in blocks]).cumsum(0)
    return Levels(codes.to(torch.int8), scales, ends)


def _products(levels: Levels) -> torch.Tensor:
    return levels.codes * levels.scales.repeat_interleave(torch.diff(levels.ends, prepend=levels.ends.new_zeros(1)))


def _others() -> Iterator[Coding]:
    """What one would do without this library, with the values as float32: no header, no checksum, nothing checked."""
    yield Coding("raw int32 + f32", _raw, _read_raw, _all_but_values)
    yield Coding("delta varint + f32", _deltas, _read_deltas, _all_but_values)
    yield Coding("bitmap + f32", _bitmap, _read_bitmap, _all_but_values)
    try:
        zstandard = importlib.import_module("zstandard")  # of this comparison alone
    except ImportError:
        return
    pack, unpack = zstandard.ZstdCompressor(level=3).compress, zstandard.ZstdDecompressor().decompress
    name = "zstd of raw int32 + f32"
    yield Coding(name, lambda gradient: pack(_raw(gradient)), lambda f, g: _read_raw(unpack(f), g), _all_but_values)


def _all_but_values(frame: bytes, gradient: SparseGradient) -> int:
    return len(frame) - 4 * gradient.count


def _raw(gradient: SparseGradient) -> bytes:
    return b"".join((gradient.values.numpy().data, gradient.indices.numpy().astype(np.int32).data))


def _read_raw(frame: bytearray | bytes, gradient: SparseGradient) -> Arrays:
    words = np.frombuffer(frame, dtype=np.int32)
    return words[gradient.count :].astype(np.int64), words[: gradient.count].view(np.float32)


def _deltas(gradient: SparseGradient) -> bytes:
    return b"".join((gradient.values.numpy().data, pack_varints(np.diff(gradient.indices.numpy(), prepend=0)).data))


def _read_deltas(frame: bytearray, gradient: SparseGradient) -> Arrays:
    block = np.frombuffer(frame, dtype=np.uint8)
    deltas, _ = unpack_varints(block[4 * gradient.count :], gradient.numel)
    return deltas.cumsum(), block[: 4 * gradient.count].view(np.float32)


def _bitmap(gradient: SparseGradient) -> bytes:
    kept = np.zeros(gradient.numel, dtype=np.bool_)
    kept[gradient.indices.numpy()] = True
    return b"".join((gradient.values.numpy().data, np.packbits(kept).data))


def _read_bitmap(frame: bytearray, gradient: SparseGradient) -> Arrays:
    block = np.frombuffer(frame, dtype=np.uint8)
    kept = np.unpackbits(block[4 * gradient.count :], count=gradient.numel)
    return np.flatnonzero(kept), block[: 4 * gradient.count].view(np.float32)


def _seconds(action: Callable[[], object], repetitions: int) -> float:
    """The shortest time that ``action`` took."""
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)
