"""A communication hook for torch's DistributedDataParallel: workers exchange frames instead of dense gradients.

For each bucket every worker compresses the gradients in it, one parameter at a time, encodes one frame, and gathers the
frames of all. The mean is taken where all of them are, in rank order, by the function that shards use; so every worker
has the same bits, and they are those of a parameter server.

Two collectives per bucket: a header (the frame's length, whether something went wrong, and a checksum of what the
workers must agree on), then the frames, padded to the longest. The header is waited for. The frames travel while
backward goes on, until the hook is called for the next bucket; those of the last bucket are waited for. All collectives
are started by the hook itself, so their order is the same on all workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, final
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # which torch.distributed re-exports
from torch.nn.parallel import DistributedDataParallel

from thresher.compression.base import Round, check_state
from thresher.compression.catalogue import parse_feedback, takes_run_threshold
from thresher.compression.feedback import Feedback
from thresher.compression.hard_threshold import check_threshold
from thresher.ddp.transfer import HEADER_BYTES, Header, Transfer, gather_headers
from thresher.protos.codec import encode
from thresher.protos.errors import ConfigurationError, ThresherError, error_named
from thresher.protos.sparse import SparseGradient


def compress(state: "CompressionState", bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Replace the gradients of ``bucket`` by the mean of what the workers send of them.

    The hook for ``ddp_model.register_comm_hook(state, compress)``; torch calls it during ``backward()``.

    Returns:
        A future of the bucket's buffer, which holds the mean then.

    Raises:
        NonFiniteGradientError: a gradient of some worker holds NaN or infinity; names worker, step and parameter.
        ConfigurationError: the workers differ in method, threshold, step or parameters, or a gradient is a sparse
            tensor.
        ThresherError: whatever else went wrong on some worker. Whichever it is, all workers raise it, and none waits.
            The model cannot go on from there, nor can torch's reducer: start again from what was saved last.

    References:
        torch.nn.parallel.DistributedDataParallel.register_comm_hook; the mean of Algorithm 2 in arXiv:2108.00951.
    """
    return state.exchange(bucket)


@final
@dataclass(frozen=True, slots=True)
class CompressionStatistics:
    """What one worker has sent since its state was made. Steps are those in which gradients were exchanged.

    Attributes:
        rank: The worker's rank.
        steps: Steps that were finished.
        numel: Elements of the model.
        sent_elements: Elements sent.
        sent_bytes: Length of the frames sent.
        received_bytes: What the collectives brought from the other workers: frames padded to the longest, and headers.
        density: Sent elements over all in the last finished step, in [0, 1].
    """

    rank: int
    steps: int = 0
    numel: int = 0
    sent_elements: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    density: float = 0.0


@final
@dataclass(slots=True)
class _Memory:
    """One parameter and what was not sent of it. ``strides`` are those of its gradient in a bucket."""

    name: str
    index: int
    shape: torch.Size
    strides: tuple[int, ...]
    feedback: Feedback


@final
class CompressionState:
    """What the hook :func:`compress` keeps from step to step: a memory for each parameter, and the number of the step.

    The memory belongs to the parameter, not to the bucket, so neither ``bucket_cap_mb`` nor torch's rebuilding of the
    buckets after the first step changes any result. A method therefore acts on each parameter alone, with the number of
    the parameter among the trained ones as ``Round.tensor``: ``TopK(0.01)`` here is ``LayerWise(TopK(0.01))`` on a
    parameter server. Elementwise methods, such as a hard threshold, make no difference between the two. ``Layers``,
    which is about several parameters, needs a parameter server.

    Gradients of any floating type are compressed in float32, and the mean is cast back. A threshold is in the unit of
    what ``backward()`` yields: with a loss scaler that is the scaled loss, and neither threshold nor residual follow
    when the scale changes, so train in bfloat16 or float32 rather than with a scaler. Under ``no_sync()`` nothing is
    called, and the sum is compressed in the step that follows. Where a parameter has not been used, a worker sends
    nothing of it and keeps its memory, as torch's optimizers do with a parameter without a gradient.

    Args:
        model: The wrapped model; register with it right after.
        method: Such as ``HardThreshold(0.01)`` or ``ErrorFeedback(TopK(0.001))``; see
            :func:`thresher.compression.catalogue.parse_feedback`. Equal on all workers.
        threshold: λ for a ``HardThreshold()`` that has none of its own. It stays; one that is steered or calibrated
            needs a parameter server.

    Raises:
        ConfigurationError: no such method, one that cannot run in a hook, a missing threshold or one too many, or a
            model that is not a DistributedDataParallel.

    References:
        arXiv:2108.00951, Algorithm 2, with the average taken by every worker.

    Examples:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = DistributedDataParallel(torch.nn.Linear(4, 1, bias=False))
        >>> state = CompressionState(model, "HardThreshold(1.0)")
        >>> model.register_comm_hook(state, compress)
        >>> model(torch.tensor([0.75, 2.0, 0.5, 0.25])).backward()
        >>> model.module.weight.grad, state.residual("weight")
        (tensor([[0., 2., 0., 0.]]), tensor([0.7500, 0.0000, 0.5000, 0.2500]))
        >>> state.statistics().density
        0.25
        >>> dist.destroy_process_group()
    """

    def __init__(self, model: DistributedDataParallel, method: str, *, threshold: float | None = None) -> None:
        if not isinstance(model, DistributedDataParallel):
            raise ConfigurationError(
                f"a {type(model).__name__} has no communication hook; wrap it in DistributedDataParallel first"
            )
        trained = {
            name: parameter
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad and name not in model.parameters_to_ignore
        }
        self._group: dist.ProcessGroup | None = model.process_group
        self._rank, self._workers = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._parameters = tuple(trained.values())  # kept alive, so that no other object gets the id of one
        self._memories = {
            id(parameter): _Memory(name, index, parameter.shape, _strides(parameter), _made(method, name, parameter))
            for index, (name, parameter) in enumerate(trained.items())
        }
        self.method = next(iter(self._memories.values())).feedback.describe()
        self._threshold = _checked_threshold(method, threshold)
        self._text = method
        self._step = 0
        self._elements = 0  # sent so far in this step
        self._statistics = CompressionStatistics(self._rank, numel=sum(p.numel() for p in trained.values()))
        self._under_way: Transfer | None = None
        self._used: set[str] = set()
        for name, parameter in trained.items():
            _note_use(parameter, name, self._used)

    @property
    def step(self) -> int:
        """How many steps have exchanged gradients, over the whole run; random numbers and schedules follow it."""
        return self._step

    def residual(self, name: str) -> Tensor:
        """What this worker has not sent yet of a parameter, [numel] float32; the next step rewrites it.

        Raises:
            ConfigurationError: no trained parameter has this name.
        """
        for memory in self._memories.values():
            if memory.name == name:
                return memory.feedback.residual
        raise ConfigurationError(f"no trained parameter is called {name!r}")

    def statistics(self) -> CompressionStatistics:
        """What has been sent so far."""
        return self._statistics

    def exchange(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What :func:`compress` does."""
        agreed, frame, elements = "", b"", 0
        failure: Exception | None = None
        try:
            names = ", ".join(memory.name for memory, _ in self._located(bucket))
            agreed = f"{self.method}, threshold {self._threshold}, step {self._step}, parameters {names}"
            sent = self._select(bucket)
            frame, elements = encode(sent), sent.count
        except Exception as error:  # noqa: BLE001 - the other workers are waiting, and must hear of whatever it is
            failure = error
        if self._under_way is not None:
            self._under_way.finish()
            self._under_way = None
        buffer = bucket.buffer()
        header = Header(len(frame), failure is not None, crc32(agreed.encode()))
        headers = gather_headers(self._group, header, buffer.device)
        if any(header.failed for header in headers) or len({header.agreement for header in headers}) > 1:
            self._refuse(agreed, failure)
        lengths = [header.length for header in headers]
        self._count(elements, len(frame), max(lengths), last=bucket.is_last())
        gradients = [gradient for _, gradient in self._located(bucket)]
        transfer = Transfer(self._group, frame, lengths, gradients, buffer)
        if bucket.is_last():
            transfer.finish()
        else:
            self._under_way = transfer
        return transfer.future

    def state_dict(self) -> dict[str, Any]:
        """A copy of this worker's memory: tensors and plain values, by the names of the parameters.

        Every worker has its own; save all of them. ``torch.load(..., weights_only=True)`` reads them.
        """
        return {
            "method": self.method,
            "threshold": self._threshold,
            "rank": self._rank,
            "workers": self._workers,
            "step": self._step,
            "parameters": {memory.name: memory.feedback.state_dict() for memory in self._memories.values()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, and go on bit for bit as the one it was taken from.

        Raises:
            ConfigurationError: the state belongs to another method, threshold, worker, number of workers, or model
                (the difference is named), or is not such a state; nothing is changed.
        """
        check_state(self.method, state, {"method", "threshold", "rank", "workers", "step", "parameters"})
        for what in ("threshold", "rank", "workers"):
            here = getattr(self, f"_{what}")
            if state[what] != here:
                raise ConfigurationError(f"the state belongs to {what} {state[what]}, this is {what} {here}")
        found, expected = set(state["parameters"]), {memory.name for memory in self._memories.values()}
        if found != expected:
            missing, unknown = sorted(expected - found), sorted(found - expected)
            raise ConfigurationError(
                f"the state belongs to another model: it lacks {missing}, and has {unknown} instead"
            )
        loaded = {}
        for key, parameter in zip(self._memories, self._parameters, strict=True):
            name = self._memories[key].name
            loaded[key] = _made(self._text, name, parameter)
            try:
                loaded[key].load_state_dict(state["parameters"][name])
            except ConfigurationError as error:
                raise ConfigurationError(f"parameter {name}: {error}") from error
        for key, feedback in loaded.items():
            self._memories[key].feedback = feedback
        self._step = state["step"]

    def _located(self, bucket: GradBucket) -> list[tuple[_Memory, Tensor]]:
        """The memories of the parameters in ``bucket``, each with its gradient there, in the parameter's own shape."""
        if bucket.buffer().is_sparse:
            raise ConfigurationError("this hook exchanges no sparse tensors; make the embedding with sparse=False")
        unknown = [tuple(p.shape) for p in bucket.parameters() if id(p) not in self._memories]
        if unknown:
            raise ConfigurationError(f"the state was made for another model: it has no parameter of shape {unknown[0]}")
        memories = [self._memories[id(parameter)] for parameter in bucket.parameters()]
        # A bucket holds a gradient in the memory order of its parameter (channels last, say), and hands it out as if
        # it were contiguous.
        return [
            (memory, gradient.as_strided(memory.shape, memory.strides))
            for memory, gradient in zip(memories, bucket.gradients(), strict=True)
        ]

    def _select(self, bucket: GradBucket) -> SparseGradient:
        """What is sent of ``bucket``: one vector, its parameters one after the other."""
        pieces = []
        for memory, gradient in self._located(bucket):
            vector = gradient.reshape(-1).float()
            if memory.name not in self._used:
                pieces.append(SparseGradient.empty(vector.numel()))
                continue
            here = Round(self._step, memory.index, self._threshold, worker=self._rank)
            try:
                pieces.append(memory.feedback.compress(vector, here))
            except ThresherError as error:
                raise type(error)(f"parameter {memory.name}: {error}") from error
        return SparseGradient.concatenate(pieces)

    def _refuse(self, agreed: str, failure: Exception | None) -> NoReturn:
        """Have every worker raise the same, and say on which worker and why."""
        name = "" if failure is None else type(failure).__name__
        what = failure if isinstance(failure, ThresherError) else repr(failure)
        text = f"worker {self._rank}, step {self._step}, {what}"
        reports: list[Any] = [None] * self._workers
        dist.all_gather_object(reports, (name, text, agreed), group=self._group)
        for name, text, _ in reports:
            if name:
                raise error_named(name, text) from failure
        first = reports[0][2]
        rank, other = next((rank, other) for rank, (*_, other) in enumerate(reports) if other != first)
        raise ConfigurationError(f"the workers differ: worker 0 has {first}; worker {rank} has {other}")

    def _count(self, elements: int, sent: int, longest: int, *, last: bool) -> None:
        self._elements += elements
        before = self._statistics
        self._statistics = replace(
            before,
            sent_elements=before.sent_elements + elements,
            sent_bytes=before.sent_bytes + sent,
            received_bytes=before.received_bytes + (self._workers - 1) * (longest + HEADER_BYTES),
        )
        if last:
            density = self._elements / before.numel if before.numel else 0.0
            self._statistics = replace(self._statistics, steps=before.steps + 1, density=density)
            self._step += 1
            self._elements = 0
            self._used.clear()


def _made(method: str, name: str, parameter: Tensor) -> Feedback:
    feedback = parse_feedback(method, [parameter.shape], [name], device=parameter.device)
    if "hook" not in feedback.runs_in:
        raise ConfigurationError(
            f"{feedback.describe()} cannot run in a hook for DistributedDataParallel; "
            f"it runs in: {', '.join(sorted(feedback.runs_in))}"
        )
    return feedback


def _checked_threshold(method: str, threshold: float | None) -> float | None:
    if takes_run_threshold(method) and threshold is None:
        raise ConfigurationError(
            f"{method} has no threshold of its own: give it one, or CompressionState a threshold=; "
            "one that is calibrated or steered needs a parameter server"
        )
    if threshold is None:
        return None
    if not takes_run_threshold(method):
        raise ConfigurationError(f"{method} does not take the threshold {threshold}; leave it out")
    check_threshold(threshold)
    return float(threshold)


def _strides(parameter: Tensor) -> tuple[int, ...]:
    """How a bucket lays out the gradient: as the parameter if that has no gaps, else contiguously."""
    return torch.empty_like(parameter, device="meta").stride()


def _note_use(parameter: Tensor, name: str, used: set[str]) -> None:
    """Have ``used`` hold ``name`` after each backward that reaches the parameter, before any bucket with it is full."""
    parameter.register_post_accumulate_grad_hook(lambda _: used.add(name))  # type: ignore[no-untyped-call]
