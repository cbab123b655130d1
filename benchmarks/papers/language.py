"""Language modelling: an LSTM of one layer on the State of the Union addresses."""

import math
from collections import Counter
from functools import cache
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from benchmarks.papers.data import addresses
from benchmarks.papers.recipe import Form
from benchmarks.papers.task import WORKERS, Flat, Plan, Task

WORDS: Final = 2000  # that the network knows, the commonest ones; all others are one
WIDTH: Final = 128
BATCH: Final = 8  # places in the text at which a worker reads at a time
WINDOW: Final = 30  # words that it reads there in a round
CLIP: Final = 0.4  # largest norm of a worker's gradient
VALIDATED: Final = (10, 1000)  # places in the validation text, and words read there


@final
class Language(Task):
    """Perplexity on 10,000 words of the validation text.

    Each worker has its own stretch of the text, eight stretches in all, and reads it at eight places. The state of the
    LSTM is zero at the begin of each window, so that a gradient depends on nothing but its worker, point and round.
    """

    quality_name = "perplexity"
    higher_is_better = False

    def __init__(self, seed: int) -> None:
        train, valid = numbered()
        generator = torch.Generator().manual_seed(seed)
        begin = int(torch.randint(len(train), (), generator=generator))
        self._columns = columns(train.roll(-begin), WORKERS * BATCH)
        places, length = VALIDATED
        self._valid = columns(valid, places)[: length + 1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = Flat(_Words())

    def plan(self, form: Form) -> Plan:
        """Paper 1, Table 2, but for the length and the rate, which fits this network and batch."""
        return Plan(rounds=120 if form == "short" else 240, rate=20.0)

    def gradient(self, worker: int, point: Tensor, step: int) -> Tensor:
        """Of the worker's next window at each of its places, clipped as paper 1 does: before it is compressed."""
        begin = step * WINDOW % (len(self._columns) - WINDOW)
        text = self._columns[begin : begin + WINDOW + 1, worker * BATCH : (worker + 1) * BATCH]
        gradient = self.network.gradient(point, lambda network: _loss(network, text))
        norm = float(gradient.norm())
        return gradient.mul_(CLIP / norm) if norm > CLIP else gradient

    def quality(self, point: Tensor) -> float:
        """Perplexity; infinite if it is beyond what a float can hold."""
        with torch.no_grad():
            loss = float(_loss(self.network.at(point), self._valid))
        return math.exp(loss) if loss < math.log(torch.finfo(torch.float32).max) else math.inf


@cache
def numbered() -> tuple[Tensor, Tensor]:
    """The words to train on and to validate on, [number] int64 each: 0 … 1,999 by how common, 2,000 for all others."""
    text = addresses()
    number = {word: rank for rank, (word, _) in enumerate(Counter(text.train).most_common(WORDS))}
    train, valid = (torch.tensor([number.get(word, WORDS) for word in part]) for part in (text.train, text.valid))
    return train, valid


def columns(words: Tensor, places: int) -> Tensor:
    """The text cut into equal stretches, [words of a stretch, places]: a row holds the next word of each."""
    length = len(words) // places
    return words[: length * places].view(places, length).T.contiguous()


def _loss(network: nn.Module, text: Tensor) -> Tensor:
    """The mean loss of each word of ``text``, [words, places], by those above it; the first row is only read."""
    loss: Tensor = cross_entropy(network(text[:-1]), text[1:].flatten())
    return loss


@final
class _Words(nn.Module):
    """Embedding, LSTM, and the same embedding to tell the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS + 1, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(WORDS + 1))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, text: Tensor) -> Tensor:
        """[words, places] → [words · places, WORDS + 1], the logit of each next word."""
        hidden, _ = self.lstm(self.embedding(text))
        return linear(hidden.flatten(0, 1), self.embedding.weight, self.bias)
