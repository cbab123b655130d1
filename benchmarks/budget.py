"""A budget for the whole run, beside the best constant threshold, Top-k and other ways to steer.

    python benchmarks/budget.py --data FOLDER [--cases digits era …] [--output budget.json]

Four workers in one process, error feedback in gradient units (arXiv:2108.00951, Algorithm 2), plain torch models whose
gradients differ in size and shape: a convolutional network on scikit-learn's digits, an LSTM that predicts characters,
and an embedding model most of whose gradient is exactly zero; the latter two on the addresses in FOLDER/sotu.txt.xz.
Within a case every run sees the same batches and starts from the same weights. Finished runs are kept in the JSON file
and not repeated; the tables of everything in it are printed as Markdown.
"""

import argparse
import json
import lzma
import math
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypedDict

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from thresher.compression.base import Compressor, Round
from thresher.compression.budget import Budget
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.hard_threshold import HardThreshold
from thresher.compression.thresholds import Calibration, quantile_threshold
from thresher.compression.top_k import TopK
from thresher.protos.mean import mean_of
from thresher.protos.sparse import SparseGradient

WORKERS = 4
SETTLED_FROM = 500  # the round from which a run of unknown length has to be on budget


# --- what is trained ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A model with its data; ``score`` is accuracy, or cross-entropy per character where the model predicts those."""

    model: nn.Module
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    score: Callable[[nn.Module], float]
    optimizer: torch.optim.Optimizer


class Characters(nn.Module):
    """Predicts each character from those before it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.lstm = nn.LSTM(32, 128, batch_first=True)
        self.output = nn.Linear(128, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores, [batch · length, vocabulary], of [batch, length] codes."""
        hidden, _ = self.lstm(self.embedding(characters))
        scores: Tensor = self.output(hidden).flatten(0, 1)
        return scores


def accuracy(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: float((model(inputs).argmax(1) == labels).float().mean())


def sampled(inputs: Tensor, labels: Tensor, size: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (size,), generator=generator)
        return inputs[chosen], labels[chosen]

    return batch


def digits(_: Path) -> Problem:
    """The network of examples/digits.py."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return Problem(model, sampled(inputs[train], targets[train], 32), accuracy(inputs[test], targets[test]), optimizer)


def addresses(folder: Path) -> Iterator[tuple[int, str]]:
    """The addresses in the order of years, each with its number."""
    with lzma.open(folder / "sotu.txt.xz", "rt", encoding="utf-8", newline="\n") as file:
        return enumerate(document.split("\n", 1)[1] for document in file.read().split("\f"))


def lstm(folder: Path) -> Problem:
    """The next character, from the last 32."""
    texts = list(addresses(folder))
    train = "".join(text for number, text in texts if number % 20 not in {9, 19})
    valid = "".join(text for number, text in texts if number % 20 == 9)[:40_000]
    codes = {character: code for code, character in enumerate(sorted(set(train)))}
    stream = torch.tensor([codes[character] for character in train])
    pages = torch.tensor([codes.get(character, 0) for character in valid]).view(-1, 50)
    model = Characters(len(codes))

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        begin = torch.randint(len(stream) - 33, (8, 1), generator=generator)
        window = stream[begin + torch.arange(33)]
        return window[:, :-1], window[:, 1:].flatten()

    def score(model: nn.Module) -> float:
        return float(cross_entropy(model(pages[:, :-1]), pages[:, 1:].flatten()))

    return Problem(model, batch, score, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))


def era(folder: Path) -> Problem:
    """In which eighth of the addresses were these 64 words said? Embeddings of 16,384 words: few occur in a batch."""
    texts = [(number, re.findall(r"[a-z']+", text.lower())) for number, text in addresses(folder)]
    train = [(number, words) for number, words in texts if number % 20 not in {9, 19}]
    counted = Counter(word for _, words in train for word in words)
    codes = {word: code for code, (word, _) in enumerate(counted.most_common(16_383), start=1)}

    def passages(chosen: list[tuple[int, list[str]]]) -> tuple[Tensor, Tensor]:
        cut = [
            ([codes.get(word, 0) for word in words[begin : begin + 64]], number * 8 // len(texts))
            for number, words in chosen
            for begin in range(0, len(words) - 63, 64)
        ]
        return torch.tensor([words for words, _ in cut]), torch.tensor([label for _, label in cut])

    model = nn.Sequential(nn.EmbeddingBag(16_384, 16), nn.Linear(16, 8))
    test = passages([(number, words) for number, words in texts if number % 20 == 9])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return Problem(model, sampled(*passages(train), 32), accuracy(*test), optimizer)


@dataclass(frozen=True)
class Case:
    """A problem, trained for ``steps`` to a mean density of ``density``; ``drop``: the rate falls to a tenth then."""

    problem: Callable[[Path], Problem]
    density: float
    steps: int
    drop: int | None = None


CASES = {
    "digits": Case(digits, 0.01, 600),
    "digits, drop": Case(digits, 0.01, 700, drop=400),
    "lstm": Case(lstm, 0.005, 600),
    "era": Case(era, 0.001, 600),
    "era, long": Case(era, 0.001, 2000),
}


# --- how it is steered --------------------------------------------------------------------------------------


# Chooses the next threshold after a round; the arguments are those of `Budget.observe`.
Steering = Callable[[Callable[[], Tensor], float, float | None], float | None]


def unsteered(_corrected: Callable[[], Tensor], _sent: float, _settled: float | None) -> None:
    """For a compressor that has all it needs."""


def calibrated(density: float) -> Steering:
    """The calibration on 50 rounds."""
    calibration = Calibration(density, 50)

    def steering(corrected: Callable[[], Tensor], _sent: float, _settled: float | None) -> float | None:
        return calibration.threshold if calibration.finished else calibration.observe(corrected())

    return steering


def multiplicative(density: float) -> Steering:
    """MiCRO's controller (arXiv:2310.00967): up half a percent after a round that sent too much, else down.

    It starts at the quantile of the first gradient as all the others do, and not at its authors' 1/(2√k), which would
    be off by the unit of the gradient.
    """
    threshold: float | None = None

    def steering(corrected: Callable[[], Tensor], sent: float, _settled: float | None) -> float:
        nonlocal threshold
        ratio = sent / density
        factor = 1.005 if ratio > 1.1 else 0.995 if ratio < 1 / 1.1 else 1.00125
        threshold = factor * (threshold or quantile_threshold(corrected(), density))
        return threshold

    return steering


# --- one run ------------------------------------------------------------------------------------------------


class Run(TypedDict):
    """What one run came to. Densities are in units of the wanted one."""

    reached: float  # mean density of the run
    astray: float  # largest deviation of the running mean at any round from SETTLED_FROM on
    changes: int  # of the threshold after the first 50 rounds
    spread: float  # largest over smallest threshold after the first 50 rounds
    looks: int  # rounds in which the whole vector was looked at
    total_error: float  # Σ ‖e‖², mean over the workers
    loss: float  # mean over the last 50 rounds
    score: float
    threshold: float  # the last


class Cluster:
    """The workers of one run, in one process."""

    def __init__(self, case: Case, data: Path, compressor: Compressor) -> None:
        torch.manual_seed(0)
        self._case = case
        self._problem = case.problem(data)
        self._parameters = list(self._problem.model.parameters())
        self.numel = sum(parameter.numel() for parameter in self._parameters)
        self._generators = [torch.Generator().manual_seed(1 + rank) for rank in range(WORKERS)]
        self._feedbacks = [ErrorFeedback(compressor, self.numel) for _ in range(WORKERS)]

    def step(self, step: int, threshold: float | None) -> tuple[list[SparseGradient], float]:
        """One round; returns the pushes, and the mean loss over the workers."""
        if step == self._case.drop:
            for group in self._problem.optimizer.param_groups:
                group["lr"] /= 10
        pushes, total = [], 0.0
        for generator, feedback in zip(self._generators, self._feedbacks, strict=True):
            gradient, loss = self._gradient(generator)
            if threshold is None and feedback.compressor == HardThreshold():
                # Until there is one for all, each worker begins with the quantile of its own gradient.
                own: float | None = quantile_threshold(gradient, self._case.density)
            else:
                own = threshold
            pushes.append(feedback.compress(gradient, Round(step=step, threshold=own)))
            total += loss
        parts = mean_of(pushes, WORKERS).densify().split_with_sizes([p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        self._problem.optimizer.step()
        return pushes, total / WORKERS

    def _gradient(self, generator: torch.Generator) -> tuple[Tensor, float]:
        self._problem.optimizer.zero_grad(set_to_none=False)
        inputs, labels = self._problem.batch(generator)
        loss = cross_entropy(self._problem.model(inputs), labels)
        gradients = torch.autograd.grad(loss, self._parameters)
        return torch.cat([gradient.reshape(-1) for gradient in gradients]), loss.item()

    def corrected(self, push: SparseGradient) -> Tensor:
        """Rank 0's gradient + residual, as they were before ``push`` was chosen from them."""
        return self._feedbacks[0].residual.index_add(0, push.indices, push.values)

    def error(self) -> float:
        """‖e‖², mean over the workers."""
        return sum(float(feedback.residual.square().sum()) for feedback in self._feedbacks) / WORKERS

    @torch.no_grad()
    def score(self) -> float:
        """What the model has come to."""
        return self._problem.score(self._problem.model)


def train(case: Case, data: Path, compressor: Compressor, steering: Steering = unsteered) -> Run:
    """Train once."""
    cluster = Cluster(case, data, compressor)
    threshold: float | None = None
    settled: float | None = None
    looks, total_error = 0, 0.0
    losses, densities, thresholds = [], [], []
    for step in range(case.steps):
        pushes, loss = cluster.step(step, threshold)
        total_error += cluster.error()
        losses.append(loss)
        densities.append(sum(push.density for push in pushes) / WORKERS)

        def corrected(push: SparseGradient = pushes[0]) -> Tensor:
            nonlocal looks
            looks += 1
            return cluster.corrected(push)

        threshold = steering(corrected, pushes[0].density, settled)
        thresholds.append(threshold or math.nan)
        settled = densities[-1]
    means = [total / (case.density * rounds) for rounds, total in enumerate(accumulate(densities), start=1)]
    late = thresholds[50:]
    return Run(
        reached=means[-1],
        astray=max(abs(mean - 1) for mean in means[SETTLED_FROM - 1 :]),
        changes=sum(one != next_one for one, next_one in pairwise(late)) if threshold else 0,
        spread=max(late) / min(late),
        looks=looks,
        total_error=total_error,
        loss=sum(losses[-50:]) / 50,
        score=cluster.score(),
        threshold=thresholds[-1],
    )


def best_constant(case: Case, data: Path, threshold: float) -> Run:
    """The constant threshold that sends the wanted volume within 1 %, by secants on log λ, beginning at a guess."""
    tried: list[tuple[float, float]] = []
    slope = -1.0  # of log volume by log λ: a steady gradient's
    while True:
        run = train(case, data, HardThreshold(threshold))
        tried.append((math.log(threshold), math.log(run["reached"])))
        if abs(run["reached"] - 1) < 0.01:
            return Run(**{**run, "threshold": threshold, "spread": 1.0})
        if len(tried) > 1:
            (x0, y0), (x1, y1) = tried[-2:]
            slope = min(-0.2, (y1 - y0) / (x1 - x0)) if x0 != x1 else slope
        threshold = math.exp(tried[-1][0] - tried[-1][1] / slope)


# --- all of them --------------------------------------------------------------------------------------------


def runs_of(case: Case, data: Path) -> Iterator[tuple[str, Callable[[dict[str, Run]], Run]]]:
    """Every way to steer, by name; the search begins where an earlier run of the case ended."""

    def steered(steering: Steering) -> Callable[[dict[str, Run]], Run]:
        return lambda _: train(case, data, HardThreshold(), steering)

    yield "budget", steered(Budget(case.density).observe)
    yield "budget, length known", steered(Budget(case.density, case.steps).observe)
    yield "best constant", lambda done: best_constant(case, data, done["budget"]["threshold"])
    yield "Top-k", lambda _: train(case, data, TopK(case.density))
    yield "MiCRO", steered(multiplicative(case.density))
    yield "calibration, 50 rounds", steered(calibrated(case.density))


def table_of(name: str, runs: dict[str, Run]) -> str:
    """The runs of one case as Markdown."""
    case = CASES[name]
    drop = f", learning rate ÷ 10 after {case.drop}" if case.drop else ""
    head = f"### {name}: {100 * case.density:g} % over {case.steps} rounds{drop}"
    columns = (
        f"| | reached | astray from {SETTLED_FROM} on | λ changed | λ max/min | looks | total error | loss | score |"
    )
    rows = [
        f"| {way} | {run['reached']:.3f} | {100 * run['astray']:.1f} % | "
        f"{'–' if math.isnan(run['spread']) else run['changes']} | "
        f"{'–' if math.isnan(run['spread']) else format(run['spread'], '.3g')} | {run['looks']} | "
        f"{run['total_error'] / runs['best constant']['total_error']:.2f} | {run['loss']:.3g} | {run['score']:.4g} |"
        for way, run in runs.items()
    ]
    return "\n".join([head, "", columns, "|---|" + "---:|" * 8, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sotu.txt.xz")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("budget.json"))
    options = parser.parse_args()
    results: dict[str, dict[str, Run]] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.cases:
        done = results.setdefault(name, {})
        for way, run in runs_of(CASES[name], options.data):
            if way not in done:
                done[way] = run(done)
                options.output.write_text(json.dumps(results, indent=2))
    print("\n".join(table_of(name, results[name]) for name in options.cases))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} thread(s), CPU")


if __name__ == "__main__":
    main()
