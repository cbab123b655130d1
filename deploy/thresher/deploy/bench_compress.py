"""What compression costs on this machine: one pass over memory and exact Top-k, beside plain torch."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, Final

import torch
from torch import Tensor

from thresher.compression import ErrorFeedback, HardThreshold, TopK
from thresher.compression.base import kept
from thresher.compression.one_pass import correct

_GRADIENTS: Final = 3  # buffers in rotation, so that none is in a cache because it was just used
_WARM_UP: Final = 1 << 22  # elements, of which several threads take a part each

_ADD: Final = "torch.add in place"
_ADD_INTO: Final = "torch.add into a second buffer"
_IN_PLACE: Final = "fused in place"
_INTO: Final = "fused into a second buffer"
_FEEDBACK: Final = "error feedback (with finite check)"
_EAGER: Final = "eager torch threshold"
_TORCH_TOP_K: Final = "torch.topk"
_TOP_K: Final = "exact top-k"


@dataclass(slots=True)
class Case:
    """What the methods work on.

    Args:
        gradient: [numel] float32, standard normal numbers.
        feedback: error feedback whose threshold as many of them reach as ``density`` says; its residual is everybody's.
        other: [numel] float32, the second buffer.
        density: in (0, 1].
        threshold: that of ``feedback``.
    """

    gradient: Tensor
    feedback: ErrorFeedback
    other: Tensor
    density: float
    threshold: float

    @classmethod
    def of(cls, elements: int, density: float) -> "Case":
        """A case with a gradient of its own, and a residual of zeros."""
        threshold = float(torch.tensor(NormalDist().inv_cdf(1.0 - density / 2.0)))
        feedback = ErrorFeedback(HardThreshold(threshold), elements)
        feedback.residual.fill_(0.0)  # written to, or the operating system has not handed it out yet
        return cls(_normal(elements, seed=0), feedback, torch.zeros(elements), density, threshold)


def measure(
    elements: Sequence[int], densities: Sequence[float], threads: Sequence[int], repetitions: int = 7
) -> list[dict[str, Any]]:
    """Time and memory of each method for each combination; takes five vectors of ``elements`` float32 numbers.

    Methods take turns in each repetition, so that what else the machine does hits all alike. Each gradient is another
    one than that of the repetition before, and each residual starts at zero. Results are compared with plain torch's
    before anything is timed.

    Args:
        elements: lengths of the vectors.
        densities: kept fractions, in (0, 1].
        threads: numbers of threads, for torch and for the kernels.
        repetitions: of which the median is taken.

    Returns:
        For each combination and method: elements, density, threads, method; seconds; bandwidth_ratio_to_add, the
        seconds of torch.add (in place, or into a second buffer for a method that does not write in place) over those of
        the method; and peak_extra_bytes, the resident memory at its peak beyond gradient, residual and second buffer,
        measured in a process of its own, None where the operating system does not tell.

    Raises:
        AssertionError: a method's result is wrong.
    """
    rows = []
    for count in elements:
        for density in densities:
            for number in threads:
                seconds = _seconds(count, density, number, repetitions)
                rows += [
                    {
                        "elements": count,
                        "density": density,
                        "threads": number,
                        "method": method,
                        "seconds": seconds[method],
                        "bandwidth_ratio_to_add": seconds[_matching_add(method)] / seconds[method],
                        "peak_extra_bytes": _peak_extra_bytes(count, density, number, method),
                    }
                    for method in METHODS
                ]
    return rows


def _add(case: Case) -> None:
    torch.add(case.gradient, case.feedback.residual, out=case.feedback.residual)


def _add_into(case: Case) -> None:
    torch.add(case.gradient, case.feedback.residual, out=case.other)


def _fused(case: Case) -> tuple[Tensor, Tensor]:
    return correct(case.gradient, case.feedback.residual, case.threshold, out=case.feedback.residual)


def _fused_into(case: Case) -> tuple[Tensor, Tensor]:
    return correct(case.gradient, case.feedback.residual, case.threshold, out=case.other)


def _error_feedback(case: Case) -> tuple[Tensor, Tensor]:
    sent = case.feedback.compress(case.gradient)
    return sent.indices, sent.values


def _eager(case: Case) -> tuple[Tensor, Tensor]:
    corrected = case.feedback.residual.add_(case.gradient)
    indices = corrected.abs().ge(case.threshold).nonzero().squeeze(1)
    values = corrected[indices]
    corrected[indices] = 0.0
    return indices, values


def _torch_top_k(case: Case) -> tuple[Tensor, Tensor]:
    indices = case.gradient.abs().topk(kept(case.density, case.gradient.numel()), sorted=False).indices
    return indices, case.gradient[indices]


def _top_k(case: Case) -> tuple[Tensor, Tensor]:
    sent = TopK(case.density).compress(case.gradient)
    return sent.indices, sent.values


METHODS: Final[dict[str, Callable[[Case], tuple[Tensor, Tensor] | None]]] = {
    _ADD: _add,
    _ADD_INTO: _add_into,
    _IN_PLACE: _fused,
    _INTO: _fused_into,
    _FEEDBACK: _error_feedback,
    _EAGER: _eager,
    _TORCH_TOP_K: _torch_top_k,
    _TOP_K: _top_k,
}


def _matching_add(method: str) -> str:
    return _ADD if method in {_ADD, _IN_PLACE, _FEEDBACK, _EAGER} else _ADD_INTO


# After an operation of its own torch keeps its threads spinning for some milliseconds; what is measured next would
# share a core with one of them, unless it is torch's own.
_REST_SECONDS: Final = 0.02


def _seconds(elements: int, density: float, threads: int, repetitions: int) -> dict[str, float]:
    with _threads(threads):
        case = Case.of(elements, density)
        gradients = [case.gradient, *(_normal(elements, seed) for seed in range(1, _GRADIENTS))]
        _check(case)
        taken: dict[str, list[float]] = {method: [] for method in METHODS}
        for repetition in range(repetitions):
            case.gradient = gradients[repetition % _GRADIENTS]
            for method, call in METHODS.items():
                case.feedback.residual.zero_()
                time.sleep(_REST_SECONDS)
                begin = time.perf_counter()
                call(case)
                taken[method].append(time.perf_counter() - begin)
    return {method: median(times) for method, times in taken.items()}


def _check(case: Case) -> None:
    """Compare what the methods take with what plain torch takes; it also compiles them."""
    residual = case.feedback.residual
    expected = _eager(case)
    left = residual.clone()
    for call, rest in ((_fused, residual), (_fused_into, case.other), (_error_feedback, residual)):
        residual.zero_()
        found = call(case)
        if not all(map(torch.equal, (*found, rest), (*expected, left))):
            raise AssertionError(f"{call.__name__} differs from plain torch")
    largest, expected_largest = (call(case)[1].abs().sort().values for call in (_top_k, _torch_top_k))
    if not torch.equal(largest, expected_largest):
        raise AssertionError("exact top-k differs from torch.topk")


def _peak_extra_bytes(elements: int, density: float, threads: int, method: str) -> int | None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_extra_bytes_here, elements, density, threads, method).result()


def peak_extra_bytes_here(elements: int, density: float, threads: int, method: str) -> int | None:
    """The peak of this process's resident memory during one call, above what it was before.

    Returns:
        Bytes; None where the operating system does not tell.
    """
    with _threads(threads), suppress(OSError):
        METHODS[method](Case.of(min(elements, _WARM_UP), density))
        case = Case.of(elements, density)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = _status("VmRSS")
        METHODS[method](case)
        return max(0, _status("VmHWM") - before)
    return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _normal(elements: int, seed: int) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
