"""Random numbers that are a function of a key: a late or restarted worker draws what the others drew.

SplitMix64 used as a counter-based generator: draw number i of a key is mix(key + i·γ), whatever was drawn before. The
user's own generators are never touched. `seeded_indices` is also what the wire's seeded index coding means, so it must
not change: protos/README.md specifies it, and golden frames pin it.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from thresher.protos.kernels import kernel

_GAMMA: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_ROUNDS: Final = 6  # of the Feistel network
_LEAST_HALF: Final = 5  # bits: on fewer, the network would prefer some sets to others


def key_of(*words: int) -> int:
    """A 64-bit key from non-negative integers, such as (seed, step, tensor).

    Examples:
        >>> key_of(1, 2) != key_of(2, 1)
        True
    """
    key = 0
    for word in words:
        key = mix((key + _GAMMA + mix(word & _MASK)) & _MASK)
    return key


def mix(word: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood, doi:10.1145/2714064.2660195) of a 64-bit ``word``."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def uniforms(key: int, count: int) -> npt.NDArray[np.float32]:
    """``count`` draws from [0, 1), [count] float32 on the grid of 2⁻²⁴: draw i is the upper 24 bits of mix(key + i·γ).

    Examples:
        >>> draws = uniforms(key_of(7), 1000)
        >>> bool((draws >= 0).all() and (draws < 1).all()), round(float(draws.mean()), 1)
        (True, 0.5)
    """
    draws = np.empty(count, dtype=np.float32)
    _fill_uniforms(draws, np.uint64(key))
    return draws


def seeded_indices(numel: int, count: int, key: int) -> npt.NDArray[np.int64]:
    """``count`` distinct indices below ``numel``, [count] int64 ascending; each set of that size is equally likely.

    They are the images of 0 … count-1 under a permutation of [0, numel): a six-round Feistel network on the least even
    number of bits, ten or more, that holds numel, walked until the image is below numel. Memory and time grow with
    ``count`` alone: four steps each on average at most, and for a numel below 257 no more than 1024.

    Examples:
        >>> seeded_indices(10, 10, key=1).tolist() == list(range(10))
        True
        >>> len(set(seeded_indices(1000, 10, key=1).tolist()))
        10
    """
    words = np.arange(count, dtype=np.uint64)
    half = max(_LEAST_HALF, ((max(numel, 1) - 1).bit_length() + 1) // 2)
    keys = np.array([mix((key + (i + 1) * _GAMMA) & _MASK) for i in range(_ROUNDS)], dtype=np.uint64)
    _permute(words, np.uint64(numel), np.uint64(half), keys)
    chosen = words.view(np.int64)
    chosen.sort()
    return chosen


@kernel
def _fill_uniforms(draws: npt.NDArray[np.float32], key: np.uint64) -> None:
    gamma = np.uint64(0x9E3779B97F4A7C15)
    for i in range(draws.size):
        word = key + np.uint64(i) * gamma
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
        draws[i] = np.float32(word >> np.uint64(40)) * np.float32(2.0**-24)


@kernel
def _permute(words: npt.NDArray[np.uint64], numel: np.uint64, half: np.uint64, keys: npt.NDArray[np.uint64]) -> None:
    """Replace the words by their images, in any order: those that arrive move to the front, the others walk on."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    key_1, key_2, key_3, key_4, key_5, key_6 = keys[0], keys[1], keys[2], keys[3], keys[4], keys[5]
    arrived = 0
    while arrived < words.size:
        for i in range(arrived, words.size):  # without a branch, so that it runs on vectors
            left, right = words[i] >> half, words[i] & mask
            for key in (key_1, key_2, key_3, key_4, key_5, key_6):
                f = right ^ key
                f = (f ^ (f >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                f = (f ^ (f >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
                f ^= f >> np.uint64(31)
                left, right = right, left ^ (f & mask)
            words[i] = (left << half) | right
        for i in range(arrived, words.size):
            first, word = words[arrived], words[i]
            arrives = word < numel
            words[i] = first if arrives else word
            words[arrived] = word if arrives else first
            arrived += int(arrives)
