"""Bytes that are almost frames, against the decoder: it refuses them with a FrameError or reads a valid gradient.

    python tests/protos/fuzz_frames.py --inputs 1000000 --seed 0

Inputs are golden frames and frames of random gradients, mutated by bits, bytes, lengths and splices, and noise behind
a plausible header; the crc is made right again, so that they get past it. What decodes must be valid, and its own frame
must decode to the same. No input may take longer than some seconds, nor memory that its length does not explain.
"""

import argparse
import random
import re
import signal
import struct
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

from thresher.protos.codec import HEADER_BYTES, VERSION, decode, encode
from thresher.protos.errors import FrameError
from thresher.protos.index_codings import IndexCoding
from thresher.protos.seeded import seeded_indices, uniforms
from thresher.protos.sparse import SparseGradient

GOLDEN = Path(__file__).parent / "golden"
SECONDS = 10  # a hang, on any machine
BYTES_PER_BYTE, BYTES_PER_DRAW, SPARE_BYTES = 128, 24, 100_000
MEASURED_EVERY = 50
MOST_DRAWS = 1_000_000
RANDOM_FRAMES = 40
FIELDS = {5: 1, 6: 1, 7: 1, 8: 8, 16: 8, 24: 8, 32: 8}  # offset and width of what follows the version
NUMBERS = (0, 1, 2, 7, 8, 63, 64, 127, 128, 255, 2**16, 2**32 - 1, 2**32, 2**60, 2**62, 2**63, 2**64 - 1)


def sealed(frame: bytearray) -> bytearray:
    """The same with the crc that its bytes have."""
    frame[40:44] = zlib.crc32(frame[44:], zlib.crc32(frame[:40])).to_bytes(4, "little")
    return frame


def random_gradient(rng: random.Random) -> SparseGradient:
    """Some coordinates of a vector of up to some thousands, and values of any of the shorter kinds, or of none."""
    numel, key = rng.randint(1, 3000), rng.getrandbits(64)
    count = rng.randint(0, numel // rng.choice((1, 2, 10, 100)))
    values = torch.from_numpy(uniforms(key, count)) - 0.5
    kind = rng.randrange(4)
    if kind < 2:
        values = values.to((torch.bfloat16, torch.float16)[kind]).float()
    elif kind == 2:
        values = 0.1 * values.sign()
    return SparseGradient(torch.from_numpy(seeded_indices(numel, count, key)), values, numel)


def noise(rng: random.Random) -> bytearray:
    """A header with small numbers and plausible codings, then random bytes of the lengths it says, or almost."""
    numel = rng.randrange(200)
    count = rng.randint(0, numel)
    value_bytes, index_bytes = rng.randint(0, 4 * count), rng.randint(0, (numel + 7) // 8)
    fields = (rng.randrange(5), rng.randrange(6), rng.choice((0, 0, 1, 3, 7)), numel, count, value_bytes, index_bytes)
    body = rng.randbytes(max(0, value_bytes + index_bytes + rng.choice((0, 0, 0, 0, 1, -1))))
    return bytearray(struct.pack("<4sBBBBQQQQ", b"THSH", VERSION, *fields) + bytes(4) + body)


def mutated(frame: bytes, rng: random.Random, corpus: list[bytes]) -> bytearray:
    """One to four changes, some of which keep the lengths in the header right."""
    changed = bytearray(frame)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(HEADER_BYTES if rng.random() < 0.2 else 0, len(changed) + 1)
        match rng.randrange(8):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(changed):
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                offset = rng.choice(list(FIELDS))
                width = FIELDS[offset]
                number = int.from_bytes(changed[offset : offset + width], "little") + rng.choice((-8, -1, 1, 8))
                number = rng.choice((number, number, rng.choice(NUMBERS))) % 256**width
                changed[offset : offset + width] = number.to_bytes(width, "little")
            case 4:
                del changed[at : at + rng.randint(1, 9)]
            case 5:
                changed[at:at] = rng.randbytes(rng.randint(1, 9))
            case 6:
                other = rng.choice(corpus)
                begin = rng.randrange(len(other))
                changed[at:] = other[begin:]
            case _:
                resized(changed, rng)
        changed += bytes(max(0, HEADER_BYTES - len(changed)))
    return changed


def resized(frame: bytearray, rng: random.Random) -> None:
    """Insert or remove bytes at the end of a block, and have its length in the header agree."""
    value_bytes, index_bytes = struct.unpack_from("<QQ", frame, 24)
    if HEADER_BYTES + value_bytes + index_bytes != len(frame):
        return
    change = rng.randint(-9, 9)
    if rng.random() < 0.5:
        end, size, offset = HEADER_BYTES + value_bytes, value_bytes, 24
    else:
        end, size, offset = len(frame), index_bytes, 32
    change = max(change, -size)
    if change >= 0:
        frame[end:end] = rng.choice((bytes(change), rng.randbytes(change)))
    else:
        del frame[end + change : end]
    struct.pack_into("<Q", frame, offset, size + change)


def expected_numel(frame: bytearray) -> int:
    """The reader's numel: the frame's own, but no more than a test can afford where it may ask for that many draws."""
    numel = int.from_bytes(frame[8:16], "little")
    return min(numel, MOST_DRAWS) if frame[5] == IndexCoding.SEEDED else numel


def check(frame: bytearray) -> str:
    """Decode ``frame`` and say what became of it; raises whatever it must not raise."""
    numel = expected_numel(frame)
    try:
        gradient = decode(frame, numel=numel)
    except FrameError as error:
        return re.sub(r"\d+", "#", str(error).partition(":")[0])
    gradient.validate()
    assert decode(encode(gradient), numel=numel).equals(gradient), "another gradient after another round"
    return "decoded"


def check_memory(frame: bytearray) -> None:
    """Decode ``frame`` once more, and see that its length explains the memory it took."""
    numel = expected_numel(frame)
    tracemalloc.start()
    try:
        decode(frame, numel=numel)
    except FrameError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    drawn = BYTES_PER_DRAW * numel if frame[5] == IndexCoding.SEEDED else 0
    assert peak <= BYTES_PER_BYTE * len(frame) + drawn + SPARE_BYTES, f"{peak} bytes of memory for {len(frame)}"


def took_too_long(number: int, stack: FrameType | None) -> None:
    raise TimeoutError(f"an input takes longer than {SECONDS} s")


def fuzz(inputs: int, seed: int) -> Counter[str]:
    """Try that many inputs, the same for the same seed; returns how often they came to what.

    Raises:
        Exception: the first that is no FrameError; the input, in hex, is a note on it.
    """
    rng = random.Random(seed)
    corpus = [path.read_bytes() for path in sorted(GOLDEN.glob("*.frame"))]
    for golden in corpus:  # compiles what is needed, outside any limit
        check(bytearray(golden))
    corpus += [encode(random_gradient(rng)) for _ in range(RANDOM_FRAMES)]
    outcomes: Counter[str] = Counter()
    previous = signal.signal(signal.SIGALRM, took_too_long)
    try:
        for number in range(inputs):
            frame = sealed(noise(rng) if rng.random() < 0.1 else mutated(rng.choice(corpus), rng, corpus))
            signal.alarm(SECONDS)
            try:
                outcomes[check(frame)] += 1
                if number % MEASURED_EVERY == 0:
                    check_memory(frame)
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}: {frame.hex()}")
                raise
            signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz the decoder of frames.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    for outcome, times in fuzz(arguments.inputs, arguments.seed).most_common():
        sys.stdout.write(f"{times:9d} {outcome}\n")
    sys.stdout.write(f"{arguments.inputs} inputs in {time.perf_counter() - begin:.0f} s\n")
