"""The recommendation task on made-up ratings, and its split on the real ones."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.papers import data, recommendation

USERS, FILMS = 30, 250


def _made() -> data.Ratings:
    """30 films of each user."""
    numbers = np.random.default_rng(0)
    film = np.concatenate([numbers.permutation(FILMS)[:30] for _ in range(USERS)])
    return data.Ratings(np.repeat(np.arange(USERS), 30), film, numbers.permutation(len(film)).astype(float))


MADE = _made()


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[recommendation.Recommendation]:
    monkeypatch.setattr(recommendation, "ratings", lambda: MADE)
    recommendation.split.cache_clear()
    yield recommendation.Recommendation(0)
    recommendation.split.cache_clear()


def test_latest_film_of_each_user_is_left_out(task: recommendation.Recommendation) -> None:
    made, split = MADE, recommendation.split()
    for user in range(USERS):
        latest = made.item[made.user == user][made.time[made.user == user].argmax()]
        assert int(split.films[user, 0]) == latest
        assert latest not in split.item[split.user == user]
    assert len(split.user) == USERS * 29
    assert task.network.point.numel() == 2 * recommendation.FACTORS * (USERS + FILMS) + 528 + 136 + 25


def test_rivals_are_films_the_user_has_not_rated(task: recommendation.Recommendation) -> None:
    del task
    split = recommendation.split()
    assert split.films.shape == (USERS, 1 + recommendation.RIVALS)
    assert split.rated.gather(1, split.films[:, :1]).all()
    assert not split.rated.gather(1, split.films[:, 1:]).any()


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2), max_size=50))
def test_negatives_are_unrated(seed: int, users: list[int]) -> None:
    rated = torch.tensor([[True, False, True, True], [False] * 4, [True, True, True, False]])
    user = torch.tensor(users, dtype=torch.int64)
    film = recommendation.unrated(rated, user, torch.Generator().manual_seed(seed))
    assert not rated[user, film].any()
    assert (film[user == 0] == 1).all()


def test_gradient_depends_on_worker_point_and_round_alone(
    task: recommendation.Recommendation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommendation, "BATCH", 16)
    start = task.network.point.clone()
    first = task.gradient(0, start, 0).clone()
    others = [task.gradient(1, start, 0).clone(), task.gradient(0, start, 1).clone(), task.gradient(0, 2 * start, 0)]
    assert all(not torch.equal(first, other) for other in others)
    assert torch.equal(task.gradient(0, start, 0), first)


def test_seed_decides_start_order_and_negatives(
    task: recommendation.Recommendation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommendation, "BATCH", 16)
    start = task.network.point.clone()
    again, other = recommendation.Recommendation(0), recommendation.Recommendation(1)
    assert torch.equal(again.network.point, start)
    assert not torch.equal(other.network.point, start)
    assert torch.equal(again.gradient(2, start, 3), task.gradient(2, start, 3))
    assert not torch.equal(other.gradient(2, start, 3), task.gradient(2, start, 3))


def test_hit_is_a_place_among_the_first_ten() -> None:
    rivals = torch.arange(100.0).repeat(4, 1)
    found = torch.tensor([[90.5], [89.5], [1000.0], [-1.0]])  # behind 9, behind 10, first, last
    assert recommendation.hit_rate(torch.cat([found, rivals], dim=1)) == 50.0


@pytest.mark.parametrize("score", [0.0, torch.nan])
def test_scores_that_say_nothing_hit_nothing(score: float) -> None:
    assert recommendation.hit_rate(torch.full((3, 101), score)) == 0.0


def test_real_ratings_leave_one_film_of_each_user_out() -> None:
    try:
        data.ratings()
    except data.MissingDataError as missing:
        pytest.skip(str(missing))
    recommendation.split.cache_clear()
    split = recommendation.split()
    assert split.rated.shape == (943, 1682)
    assert len(split.user) == 100_000 - 943
    assert not split.rated.gather(1, split.films[:, 1:]).any()
