"""A reader of frames with nothing but Python's standard library: what protos/README.md says, and no more.

It shares no code with the library, so what both read in the same way is what the page says.
"""

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise

MASK = 2**64 - 1


class RefusedError(ValueError):
    """The bytes are no frame."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def read(frame: bytes) -> tuple[int, list[int], list[int]]:
    """The numel, the indices, and the values as bits of binary32."""
    require(len(frame) >= 44, "header")
    magic, version, index_coding, value_coding, parameter = struct.unpack_from("<4sBBBB", frame)
    numel, count, value_bytes, index_bytes, crc = struct.unpack_from("<QQQQI", frame, 8)
    require(magic == b"THSH" and version == 2, "magic and version")
    require(crc == zlib.crc32(frame[44:], zlib.crc32(frame[:40])), "crc")
    require(len(frame) == 44 + value_bytes + index_bytes, "length")
    require(count <= numel <= 2**62, "count and numel")
    require(value_bytes <= 4 * count and index_bytes <= (numel + 7) // 8, "lengths of the blocks")
    require((index_coding == 0) == (count == numel), "dense or not")
    require(index_coding == 1 or parameter == 0, "parameter")
    value_block, index_block = frame[44 : 44 + value_bytes], frame[44 + value_bytes :]
    values = {0: binary32, 1: brain16, 2: binary16, 3: signs, 4: levels}[value_coding](value_block, count)
    if index_coding == 0:
        require(not index_block, "dense block")
        indices = list(range(numel))
    elif index_coding == 1:
        indices = rice(index_block, parameter, count, numel)
    else:
        indices = {2: runs, 3: seeded}[index_coding](index_block, numel)
    require(len(indices) == len(values) == count, "count")
    require(all(a < b for a, b in pairwise(indices)), "order")
    require(not indices or 0 <= indices[0] <= indices[-1] < numel, "range")
    return numel, indices, values


def binary32(block: bytes, count: int) -> list[int]:
    require(len(block) == 4 * count, "binary32")
    return list(struct.unpack(f"<{count}I", block))


def brain16(block: bytes, count: int) -> list[int]:
    require(len(block) == 2 * count, "bfloat16")
    return [word << 16 for word in struct.unpack(f"<{count}H", block)]


def binary16(block: bytes, count: int) -> list[int]:
    require(len(block) == 2 * count, "binary16")
    return [widened(half) for half in struct.unpack(f"<{count}H", block)]


def widened(half: int) -> int:
    sign, exponent, mantissa = half >> 15, half >> 10 & 31, half & 1023
    if exponent == 31:
        return sign << 31 | 255 << 23 | mantissa << 13
    number = mantissa * 2.0**-24 if exponent == 0 else (1024 + mantissa) * 2.0 ** (exponent - 25)
    return int.from_bytes(struct.pack("<f", number), "little") | sign << 31


def varint(block: bytes, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        require(at < len(block), "cut varint")
        byte = block[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            require(byte > 0 or shift == 7, "long varint")
            return number, at


def lengths_of(block: bytes, count: int) -> tuple[list[int], int]:
    lengths: list[int] = []
    at = 0
    while sum(lengths) < count:
        length, at = varint(block, at)
        require(length > 0, "empty block")
        lengths.append(length)
    require(sum(lengths) == count, "sum of the blocks")
    return lengths, at


def bits_of(block: bytes) -> Iterator[int]:
    return (byte >> i & 1 for byte in block for i in range(8))


def signs(block: bytes, count: int) -> list[int]:
    lengths, at = lengths_of(block, count)
    pairs = [struct.unpack_from("<II", block, at + 8 * i) for i in range(len(lengths))]
    require(all(one < 2**31 <= other for one, other in pairs), "sides")
    tail = block[at + 8 * len(lengths) :]
    require(len(tail) == (count + 7) // 8, "sign bits")
    bits = list(bits_of(tail))
    require(not any(bits[count:]), "padding")
    which = [pair for length, pair in zip(lengths, pairs, strict=True) for _ in range(length)]
    return [pair[bit] for pair, bit in zip(which, bits, strict=False)]


def levels(block: bytes, count: int) -> list[int]:
    lengths, at = lengths_of(block, count)
    scales = struct.unpack_from(f"<{len(lengths)}f", block, at)
    codes = struct.unpack(f"<{count}b", block[at + 4 * len(lengths) :])
    each = [scale for length, scale in zip(lengths, scales, strict=True) for _ in range(length)]
    # The product of a binary32 and eight bits is exact in Python's binary64, so packing it rounds once.
    products = (struct.pack("<f", scale * code) for scale, code in zip(each, codes, strict=True))
    return [struct.unpack("<I", product)[0] for product in products]


def rice(block: bytes, low: int, count: int, numel: int) -> list[int]:
    widest = (numel - 1).bit_length() if numel else 0
    require(low <= widest, "parameter of rice")
    bits = bits_of(block)
    try:
        lows = [sum(next(bits) << i for i in range(low)) for _ in range(count)]
        highs = [0] * count if low == widest else [zeros(bits) for _ in range(count)]
    except StopIteration:
        raise RefusedError("cut rice") from None
    rest = list(bits)
    require(len(rest) < 8 and not any(rest), "padding")
    indices, following = [], 0
    for high, lower in zip(highs, lows, strict=True):
        indices.append(following + (high << low) + lower)
        following = indices[-1] + 1
    return indices


def zeros(bits: Iterator[int]) -> int:
    found = 0
    while next(bits) == 0:
        found += 1
    return found


def runs(block: bytes, numel: int) -> list[int]:
    indices: list[int] = []
    at, index = 0, 0
    while at < len(block):
        gap, at = varint(block, at)
        length, at = varint(block, at)
        require(length > 0 and (gap > 0 or not indices), "runs that touch")
        require(index + gap + length <= numel, "run out of range")
        indices += range(index + gap, index + gap + length)
        index += gap + length
    return indices


def mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def seeded(block: bytes, numel: int) -> list[int]:
    records = list(struct.iter_unpack("<qQQQ", block))
    require(sum(count for _, _, count, _ in records) <= numel, "draws")
    indices: list[int] = []
    for offset, length, count, key in records:
        require(abs(offset) <= 2**62 and 1 <= count <= length <= 2**62, "record")
        drawn = sorted(permuted(word, length, key) for word in range(count))
        indices += [index + offset for index in drawn if 0 <= index + offset < numel]
    return indices


def permuted(word: int, length: int, key: int) -> int:
    half = max(5, ((length - 1).bit_length() + 1) // 2)
    while True:
        left, right = word >> half, word & 2**half - 1
        for number in range(1, 7):
            round_key = mix(key + number * 0x9E3779B97F4A7C15 & MASK)
            left, right = right, left ^ mix(right ^ round_key) & 2**half - 1
        word = left << half | right
        if word < length:
            return word
