"""Selection by threshold in one pass over memory.

A vector as large as a model does not fit into a processor's cache, so that time goes with the bytes that are moved:
what is added, compared, copied out and cleared here in one pass, torch does in six. On CPU that is a compiled loop,
shared out among as many threads as torch uses; elsewhere, and for vectors that are not contiguous, it is plain torch,
which the loop is tested against. How a vector is shared out does not show in the result.

Coordinates are compared as integers: without their signs, float32 numbers are in the order of their bit patterns, with
infinity above all numbers and NaN above infinity. So NaN is selected, and seen.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thresher.protos.kernels import kernel, prefetch

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# (first coordinate, one past the last, where indices go, where values go) → (how many it found, where it ran out of
# room, or one past the last)
Scan = Callable[[int, int, Integers, Floats], tuple[int, int]]

_LEAST_PART: Final = 1 << 20  # coordinates that are worth handing to a thread
_PARTS_A_THREAD: Final = 6
_SAMPLED_LINES: Final = 256  # of each part
_LINE: Final = 16  # coordinates in 64 bytes, which is what memory hands out
_BLOCK: Final = 128  # coordinates the loops judge before they look which ones were found
_AHEAD: Final = 1024  # coordinates, as far as memory is asked before they are needed
_MAGNITUDE: Final = np.int32(0x7FFFFFFF)


def correct(gradient: Tensor, residual: Tensor, threshold: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Take what reaches the threshold out of gradient + residual, and leave the rest in ``out``.

    Args:
        gradient: [numel] float32; it is only read.
        residual: [numel] float32; it is only read, unless it is ``out``.
        threshold: a float32, ≥ 0. A coordinate is taken if it is not below: NaN is.
        out: [numel] float32, where gradient + residual goes, with 0 where it was taken: ``residual`` itself, or memory
            that overlaps none of the two.

    Returns:
        What was taken: indices, [k] int64 ascending, and values, [k] float32. Besides them, at most a few percent of
        their own size is allocated.

    References:
        Baseline: Sahu et al., arXiv:2108.00951, Algorithm 2 with the hard threshold, in one loop.
    """
    if not all(vector.device.type == "cpu" and vector.is_contiguous() for vector in (gradient, residual, out)):
        return _correct_plainly(gradient, residual, threshold, out)
    added, before, after = (vector.detach().numpy() for vector in (gradient, residual, out))
    least = _bits(threshold)
    if residual.data_ptr() == out.data_ptr():

        def scan(begin: int, end: int, indices: Integers, values: Floats) -> tuple[int, int]:
            part = slice(begin, end)
            return _correct_in_place(added[part], after[part], begin, least, _marks(), indices, values)
    else:

        def scan(begin: int, end: int, indices: Integers, values: Floats) -> tuple[int, int]:
            part = slice(begin, end)
            return _correct_into(added[part], before[part], after[part], begin, least, _marks(), indices, values)

    def sample(lines: int) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):  # the scan will see it
            summed: Floats = sampled(gradient.detach(), lines).numpy() + sampled(residual.detach(), lines).numpy()
        return summed

    return _collect(gradient.numel(), scan, sample, threshold)


def reaching(vector: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The coordinates of ``vector``, [numel] float32, that are not below ``threshold`` in magnitude.

    Returns:
        Indices, [k] int64 ascending, and values, [k] float32.
    """
    if vector.device.type != "cpu" or not vector.is_contiguous():
        return _reaching_plainly(vector, threshold)
    read, least = vector.detach().numpy(), _bits(threshold)

    def scan(begin: int, end: int, indices: Integers, values: Floats) -> tuple[int, int]:
        return _reach(read[begin:end], begin, least, _marks(), indices, values)

    return _collect(vector.numel(), scan, lambda lines: sampled(vector.detach(), lines).numpy(), threshold)


def sampled(vector: Tensor, lines: int) -> Tensor:
    """A view of ``lines`` times 16 coordinates, evenly spread over ``vector``; all of it if it has not many more."""
    stride = vector.numel() // lines
    if stride <= _LINE:
        return vector.reshape(1, -1)
    stride -= 1 - stride % 2  # odd, so that rows of a matrix are not met at the same columns each time
    return vector[: lines * stride].view(lines, stride)[:, :_LINE]


def _correct_plainly(gradient: Tensor, residual: Tensor, threshold: float, out: Tensor) -> tuple[Tensor, Tensor]:
    torch.add(gradient, residual, out=out)
    indices, values = _reaching_plainly(out, threshold)
    out.index_fill_(0, indices, 0.0)
    return indices, values


def _reaching_plainly(vector: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    # Not "at least" but "not below": the same for numbers, and NaN is kept and seen.
    indices = vector.abs().lt(threshold).logical_not_().nonzero().squeeze(1)
    return indices, vector[indices]


def _bits(threshold: float) -> np.int32:
    return np.float32(threshold).view(np.int32)


def _marks() -> Bytes:
    return np.zeros(_BLOCK, dtype=np.uint8)


def _rooms(sample: Floats, threshold: float, spans: Sequence[tuple[int, int]]) -> list[int]:
    """For how many coordinates of each span to make room, going by a sample of all; seldom too few, never all too many.

    Args:
        sample: [lines, 16], as many lines of each span, or all there is, [1, numel].
        threshold: what they have to reach.
        spans: [begin, end) of each.
    """
    # In numpy: an operation of torch's on so many would wake the threads that are to be left to the scan.
    seen = sample.size // len(spans)
    found = (np.abs(sample) >= threshold).reshape(len(spans), seen).sum(axis=1).tolist()
    return [
        min(end - begin, math.ceil((end - begin) * (one + 3.0 * math.sqrt(one) + 4.0) / max(1, seen)) + _BLOCK)
        for one, (begin, end) in zip(found, spans, strict=True)
    ]


def _collect(numel: int, scan: Scan, sample: Callable[[int], Floats], threshold: float) -> tuple[Tensor, Tensor]:
    """Run ``scan`` over all of ``[0, numel)``, in parts at the same time, and put what they find in a row.

    All parts write into the same two tensors, each from a place of its own, and their finds are then moved together.
    Memory that was made room for and not written to was never handed out by the operating system.
    """
    threads = min(torch.get_num_threads(), numel // _LEAST_PART)
    # More parts than threads: after an operation of its own torch keeps the other cores spinning for a while, so the
    # first thread may have done most of them before another one gets a core to itself.
    parts = 1 if threads <= 1 else min(_PARTS_A_THREAD * threads, numel // _LEAST_PART)
    spans = list(pairwise(numel * part // parts for part in range(parts + 1)))
    rooms = _rooms(sample(_SAMPLED_LINES * parts * (4 if parts == 1 else 1)), threshold, spans)
    places = list(accumulate(rooms, initial=0))
    indices, values = torch.empty(places[-1], dtype=torch.int64), torch.empty(places[-1], dtype=torch.float32)

    def scan_part(part: int) -> tuple[int, int]:
        place = slice(places[part], places[part + 1])
        return scan(*spans[part], indices[place].numpy(), values[place].numpy())

    finds = _at_once(scan_part, parts, threads)
    if all(stopped == end for (_, stopped), (_, end) in zip(finds, spans, strict=True)):
        return _packed(indices, values, [found for found, _ in finds], places)
    pieces = []
    for place, (found, stopped), (_, end) in zip(places[:-1], finds, spans, strict=True):
        pieces.append((indices[place : place + found], values[place : place + found]))
        pieces.append(_scan_rest(scan, stopped, end))
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])


def _at_once(scan_part: Callable[[int], tuple[int, int]], parts: int, threads: int) -> list[tuple[int, int]]:
    if parts == 1:
        return [scan_part(0)]
    waiting, finds = iter(range(parts)), [(0, 0)] * parts

    def work() -> None:
        for part in waiting:  # each comes to one thread only: the interpreter's lock is held to take the next
            finds[part] = scan_part(part)

    # Threads for this one call: they cost a tenth of a millisecond, and there are none that a fork could lose.
    with ThreadPoolExecutor(threads - 1) as others:
        helping = [others.submit(work) for _ in range(threads - 1)]
        work()
    for one in helping:
        one.result()
    return finds


def _packed(indices: Tensor, values: Tensor, found: list[int], places: list[int]) -> tuple[Tensor, Tensor]:
    total = found[0]
    for count, place in zip(found[1:], places[1:], strict=False):
        _move(indices.numpy(), values.numpy(), total, place, count)
        total += count
    if 2 * total < indices.numel():  # a view would keep the memory alive that turned out not to be needed
        return indices[:total].clone(), values[:total].clone()
    return indices[:total], values[:total]


def _scan_rest(scan: Scan, begin: int, end: int) -> tuple[Tensor, Tensor]:
    indices, values = torch.empty(end - begin, dtype=torch.int64), torch.empty(end - begin, dtype=torch.float32)
    found, _ = scan(begin, end, indices.numpy(), values.numpy())
    return indices[:found], values[:found]


# The loops go by blocks that stay in the nearest cache: first all coordinates are judged, which compilers turn into
# vector instructions, then the judgements are looked through eight at a time, of which most are zero. A block is begun
# only if there is room for all of it, so that a scan that stops has finished everything before that place and touched
# nothing behind it. Indices are unsigned where numba would otherwise ask of each whether it counts from the end.
# That the width of all blocks but the last is a constant, and that memory is asked ahead, is worth a third of the time.


@kernel
def _correct_in_place(
    gradient: Floats, residual: Floats, first: int, least: np.int32, marks: Bytes, indices: Integers, values: Floats
) -> tuple[int, int]:
    found, whole, words = 0, gradient.size - gradient.size % _BLOCK, marks.view(np.int64)
    for block in range(0, whole, _BLOCK):
        if found + _BLOCK > indices.size:
            return found, first + block
        for lane in range(0, _BLOCK, _LINE):
            prefetch(gradient, np.uint64(block + _AHEAD + lane))
            prefetch(residual, np.uint64(block + _AHEAD + lane))
        _add(gradient, residual, residual, block, _BLOCK, least, marks)
        found = _take_out(residual, block, _BLOCK, first, words, indices, values, found)
    rest = gradient.size - whole
    if found + rest > indices.size:
        return found, first + whole
    _add(gradient, residual, residual, whole, rest, least, marks)
    return _take_out(residual, whole, rest, first, words, indices, values, found), first + gradient.size


@kernel
def _correct_into(
    gradient: Floats,
    residual: Floats,
    out: Floats,
    first: int,
    least: np.int32,
    marks: Bytes,
    indices: Integers,
    values: Floats,
) -> tuple[int, int]:
    found, whole, words = 0, gradient.size - gradient.size % _BLOCK, marks.view(np.int64)
    for block in range(0, whole, _BLOCK):
        if found + _BLOCK > indices.size:
            return found, first + block
        for lane in range(0, _BLOCK, _LINE):
            prefetch(gradient, np.uint64(block + _AHEAD + lane))
            prefetch(residual, np.uint64(block + _AHEAD + lane))
            prefetch(out, np.uint64(block + _AHEAD + lane))  # what is written to is read before
        _add(gradient, residual, out, block, _BLOCK, least, marks)
        found = _take_out(out, block, _BLOCK, first, words, indices, values, found)
    rest = gradient.size - whole
    if found + rest > indices.size:
        return found, first + whole
    _add(gradient, residual, out, whole, rest, least, marks)
    return _take_out(out, whole, rest, first, words, indices, values, found), first + gradient.size


@kernel
def _reach(
    vector: Floats, first: int, least: np.int32, marks: Bytes, indices: Integers, values: Floats
) -> tuple[int, int]:
    found, whole, words = 0, vector.size - vector.size % _BLOCK, marks.view(np.int64)
    for block in range(0, whole, _BLOCK):
        if found + _BLOCK > indices.size:
            return found, first + block
        for lane in range(0, _BLOCK, _LINE):
            prefetch(vector, np.uint64(block + _AHEAD + lane))
        _judge(vector, block, _BLOCK, least, marks)
        found = _take(vector, block, _BLOCK, first, words, indices, values, found)
    rest = vector.size - whole
    if found + rest > indices.size:
        return found, first + whole
    _judge(vector, whole, rest, least, marks)
    return _take(vector, whole, rest, first, words, indices, values, found), first + vector.size


@kernel
def _add(
    gradient: Floats, residual: Floats, out: Floats, block: int, width: int, least: np.int32, marks: Bytes
) -> None:
    """The sums of a block go into ``out``, and which of them reach the threshold into ``marks``."""
    for lane in range(width):
        at = np.uint64(block + lane)
        corrected = gradient[at] + residual[at]
        out[at] = corrected
        marks[np.uint64(lane)] = np.float32(corrected).view(np.int32) & _MAGNITUDE >= least


@kernel
def _judge(vector: Floats, block: int, width: int, least: np.int32, marks: Bytes) -> None:
    """Which coordinates of a block reach the threshold goes into ``marks``."""
    for lane in range(width):
        value = vector[np.uint64(block + lane)]
        marks[np.uint64(lane)] = np.float32(value).view(np.int32) & _MAGNITUDE >= least


@kernel
def _take(
    vector: Floats,
    block: int,
    width: int,
    first: int,
    words: Integers,
    indices: Integers,
    values: Floats,
    found: int,
) -> int:
    """Copy the marked coordinates of a block to ``found`` and on; returns how many are found then."""
    for word in range((width + 7) >> 3):
        waiting = words[np.uint64(word)]
        while waiting != 0:
            # 2^n as a double has the exponent n + 1023, and each coordinate has eight of the bits.
            bit = (np.float64(waiting & -waiting).view(np.int64) >> 52) - 1023
            lane = (word << 3) + (bit >> 3)
            if lane >= width:  # marks that an earlier block left behind the end of the last one
                break
            indices[np.uint64(found)] = first + block + lane
            values[np.uint64(found)] = vector[np.uint64(block + lane)]
            found += 1
            waiting &= waiting - 1
    return found


@kernel
def _take_out(
    vector: Floats,
    block: int,
    width: int,
    first: int,
    words: Integers,
    indices: Integers,
    values: Floats,
    found: int,
) -> int:
    """As ``_take``, and put 0 in the place of what is taken, while it is at hand."""
    for word in range((width + 7) >> 3):
        waiting = words[np.uint64(word)]
        while waiting != 0:
            bit = (np.float64(waiting & -waiting).view(np.int64) >> 52) - 1023
            lane = (word << 3) + (bit >> 3)
            if lane >= width:
                break
            indices[np.uint64(found)] = first + block + lane
            values[np.uint64(found)] = vector[np.uint64(block + lane)]
            vector[np.uint64(block + lane)] = 0.0
            found += 1
            waiting &= waiting - 1
    return found


@kernel
def _move(indices: Integers, values: Floats, to: int, place: int, count: int) -> None:
    """Move ``count`` entries from ``place`` down to ``to``; the two ranges may overlap."""
    for i in range(count):
        indices[np.uint64(to + i)] = indices[np.uint64(place + i)]
        values[np.uint64(to + i)] = values[np.uint64(place + i)]
