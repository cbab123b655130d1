"""Keyed random numbers: pinned, fair, and the same whoever draws them."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.protos.seeded import key_of, mix, seeded_indices, uniforms

MASK = (1 << 64) - 1
keys = st.integers(0, MASK)


def permuted(word: int, numel: int, key: int) -> int:
    """The image of ``word`` as the specification has it, in plain integers."""
    half = max(5, (max(numel - 1, 0).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = word >> half, word & mask
        for number in range(1, 7):
            left, right = right, left ^ (mix(right ^ mix((key + number * 0x9E3779B97F4A7C15) & MASK)) & mask)
        word = left << half | right
        if word < numel:
            return word


@given(st.data())
def test_indices_are_the_images_of_the_first_numbers(data: st.DataObject) -> None:
    """The compiled loop is the specification's permutation, at any size."""
    numel = data.draw(st.integers(1, 3000) | st.sampled_from([2**20, 2**20 + 1, 2**32 + 1, 2**62]))
    count, key = data.draw(st.integers(0, min(numel, 50))), data.draw(keys)
    expected = sorted(permuted(word, numel, key) for word in range(count))
    assert seeded_indices(numel, count, key).tolist() == expected


@given(st.integers(0, 3000), st.integers(0, 2000), keys)
def test_indices_are_distinct_ascending_and_in_range(numel: int, count: int, key: int) -> None:
    """A support, whatever the key."""
    indices = seeded_indices(numel, min(count, numel), key)
    assert indices.dtype == np.int64
    assert indices.size == min(count, numel)
    assert (np.diff(indices) > 0).all()
    assert not indices.size or (indices[0] >= 0 and indices[-1] < numel)


@given(st.integers(1, 500), keys)
def test_fewer_indices_are_a_part_of_more(numel: int, key: int) -> None:
    """The sets of one key are nested, up to everything."""
    sets = [set(seeded_indices(numel, count, key).tolist()) for count in (0, numel // 2, numel)]
    assert sets[0] <= sets[1] <= sets[2] == set(range(numel))


def test_every_pair_is_equally_likely() -> None:
    """Of 6 choose 2 sets each comes up as often as chance has it: χ² of 14 degrees of freedom, p > 1e-6."""
    draws = 15_000
    found = Counter(tuple(seeded_indices(6, 2, key_of(9, i)).tolist()) for i in range(draws))
    pairs = list(itertools.combinations(range(6), 2))
    assert sum((found[pair] - draws / 15) ** 2 / (draws / 15) for pair in pairs) < 53.0


def test_every_coordinate_is_equally_likely() -> None:
    """Over many keys each of 1000 coordinates is chosen as often: χ² of 999 degrees of freedom, p > 1e-6."""
    draws = 2000
    counts = np.zeros(1000)
    for i in range(draws):
        counts[seeded_indices(1000, 100, key_of(4, i))] += 1
    expected, variance = draws * 0.1, draws * 0.1 * 0.9
    assert (((counts - expected) ** 2) / variance).sum() < 1222.0


@pytest.mark.parametrize(
    ("numel", "count", "key", "expected"),
    [
        (10, 4, 1, [2, 3, 6, 7]),
        (1000, 5, 2, [353, 514, 541, 550, 945]),
        (2**33, 3, 0xDEADBEEF, [1090007100, 4094393324, 5477808167]),
    ],
)
def test_indices_never_change(numel: int, count: int, key: int, expected: list[int]) -> None:
    """They are part of the wire format."""
    assert seeded_indices(numel, count, key).tolist() == expected


@given(keys, st.integers(0, 50))
def test_uniforms_are_the_upper_bits(key: int, count: int) -> None:
    """Draw i is the upper 24 bits of the generator's output i."""
    expected = [(mix((key + i * 0x9E3779B97F4A7C15) & MASK) >> 40) / 2**24 for i in range(count)]
    assert uniforms(key, count).tolist() == expected


def test_uniforms_are_uniform() -> None:
    """Their hundredths are equally full: χ² of 99 degrees of freedom, p > 1e-6."""
    counts = np.histogram(uniforms(key_of(3), 100_000), bins=100, range=(0, 1))[0]
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 177.0


def test_mix_is_the_published_generator() -> None:
    """SplitMix64 from the state 1234567: the first outputs in wide use as its test vector."""
    states = [(1234567 + i * 0x9E3779B97F4A7C15) & MASK for i in range(1, 4)]
    assert [mix(state) for state in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(keys, max_size=4), st.lists(keys, max_size=4))
def test_different_words_give_different_keys(one: list[int], other: list[int]) -> None:
    """Order and length count."""
    assert (key_of(*one) == key_of(*other)) == (one == other)


def test_other_generators_are_not_touched() -> None:
    """The user's random numbers are the user's."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 the global generator is what must not move
    before = (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index] # noqa: NPY002
    uniforms(1, 10)
    seeded_indices(100, 10, 1)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[index] # noqa: NPY002
