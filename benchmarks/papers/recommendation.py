"""Recommendation: neural collaborative filtering on MovieLens-100K."""

from functools import cache
from typing import Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.papers.data import ratings
from benchmarks.papers.recipe import Form
from benchmarks.papers.task import WORKERS, Flat, Plan, Task

FACTORS: Final = 16
BATCH: Final = 512  # ratings of one worker in a round
NEGATIVES: Final = 4  # films a user has not rated, for each rating
RIVALS: Final = 100  # films a user has not rated, beside the one that is to be found again
HITS: Final = 10  # how high it has to be placed


@final
class Recommendation(Task):
    """Hit rate @10 in %: each user's latest film against 100 that the user has not rated, the same for all seeds."""

    quality_name = "hit rate @10 in %"
    higher_is_better = True

    def __init__(self, seed: int) -> None:
        self._split = split()
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self._split.user), generator=generator)
        users, items = self._split.rated.shape
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = Flat(_Filtering(users, items))

    def plan(self, form: Form) -> Plan:
        """Paper 1, Table 3, but for the length, the batch and the rate that fits it."""
        return Plan(rounds=150 if form == "short" else 300, rate=3e-2, adam=(0.25, 0.5), drops=())

    def gradient(self, worker: int, point: Tensor, step: int) -> Tensor:
        """Of the worker's next ratings, and of negatives drawn for this worker and round."""
        begin = (step * WORKERS + worker) * BATCH % (len(self._order) - BATCH)
        chosen = self._order[begin : begin + BATCH]
        generator = torch.Generator().manual_seed((self._seed << 40) + step * WORKERS + worker)
        user = self._split.user[chosen].repeat(1 + NEGATIVES)
        item = torch.cat([self._split.item[chosen], unrated(self._split.rated, user[BATCH:], generator)])
        liked = torch.zeros(len(user))
        liked[:BATCH] = 1
        return self.network.gradient(
            point, lambda network: binary_cross_entropy_with_logits(network(user, item), liked)
        )

    def quality(self, point: Tensor) -> float:
        """Hit rate @10 in %."""
        network = self.network.at(point)
        films = self._split.films
        user = torch.arange(len(films)).unsqueeze(1).expand_as(films)
        with torch.no_grad():
            return hit_rate(network(user.flatten(), films.flatten()).view_as(films))


def hit_rate(scores: Tensor) -> float:
    """How often, in %, the first of each row's [users, 1 + RIVALS] scores is among its 10 highest; a tie is lost."""
    beaten = (scores[:, :1] > scores[:, 1:]).sum(1)
    return 100.0 * float((beaten > RIVALS - HITS).float().mean())


class Split(NamedTuple):
    """What is trained on and what is tested.

    Attributes:
        user: of each rating to train on, [ratings] int64.
        item: the film of each of them, [ratings] int64.
        rated: whether a user has rated a film, [users, films] bool, the latest one included.
        films: of each user, the latest film and then those it is compared with, [users, 1 + RIVALS] int64.
    """

    user: Tensor
    item: Tensor
    rated: Tensor
    films: Tensor


@cache
def split() -> Split:
    """The ratings without each user's latest, of which the last in the file's order is taken if several are as late."""
    table = ratings()
    order = np.lexsort((table.time, table.user))
    last = np.append(np.diff(table.user[order]) > 0, True)
    user, item = (torch.from_numpy(column[order]) for column in (table.user, table.item))
    rated = torch.zeros(int(user.max()) + 1, int(item.max()) + 1, dtype=torch.bool)
    rated[user, item] = True
    generator = torch.Generator().manual_seed(0)
    rivals = unrated(rated, torch.arange(len(rated)).repeat_interleave(RIVALS), generator).view(-1, RIVALS)
    latest = torch.from_numpy(last)
    return Split(user[~latest], item[~latest], rated, torch.cat([item[latest].unsqueeze(1), rivals], dim=1))


def unrated(rated: Tensor, user: Tensor, generator: torch.Generator) -> Tensor:
    """A film for each of ``user``, [number] int64, evenly drawn from those that the user has not rated."""
    film = torch.randint(rated.shape[1], user.shape, generator=generator)
    while len(again := rated[user, film].nonzero().flatten()):
        film[again] = torch.randint(rated.shape[1], again.shape, generator=generator)
    return film


@final
class _Filtering(nn.Module):
    """The product of a user's and a film's factors, beside a network of three layers on other factors of the two."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.product_user, self.network_user = (nn.Embedding(users, FACTORS) for _ in range(2))
        self.product_item, self.network_item = (nn.Embedding(items, FACTORS) for _ in range(2))
        self.network = nn.Sequential(
            nn.Linear(2 * FACTORS, FACTORS),
            nn.ReLU(),
            nn.Linear(FACTORS, FACTORS // 2),
            nn.ReLU(),
        )
        self.last = nn.Linear(FACTORS + FACTORS // 2, 1)
        for table in (self.product_user, self.network_user, self.product_item, self.network_item):
            nn.init.normal_(table.weight, std=0.01)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """User and film of each pair, [pairs] → [pairs], the logit that the user rates it."""
        product = self.product_user(user) * self.product_item(item)
        deep = self.network(torch.cat([self.network_user(user), self.network_item(item)], dim=1))
        logit: Tensor = self.last(torch.cat([product, deep], dim=1)).squeeze(1)
        return logit
