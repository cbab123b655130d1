"""The step: gather → compress → push → wait → replay → copy back. `Session._exchange` tells it on one screen."""

import atexit
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thresher.compression import Feedback
from thresher.protos.errors import (
    ConfigurationError,
    DataLossError,
    NonFiniteGradientError,
    ProtocolError,
    ThresherError,
)
from thresher.protos.faults import reached
from thresher.protos.optimizers import OptimizerSpec, hyperparameters_of, spec_of
from thresher.protos.snapshots import pack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.transport import check_address
from thresher.protos.update import Presence
from thresher.v1 import aggregation_pb2 as pb
from thresher.worker.batches import keyed_seed, seed_everything, share
from thresher.worker.joining import join
from thresher.worker.memory import Memory
from thresher.worker.metrics import WorkerMetrics
from thresher.worker.outer import outer_spec
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import GradientPlaced, Placement, UpdatePlaced
from thresher.worker.progress import Progress
from thresher.worker.rounds import Rounds
from thresher.worker.selection import Selection
from thresher.worker.settings import Settings, settings_from
from thresher.worker.statistics import WorkerStatistics
from thresher.worker.step_hooks import StepHooks

_logger = logging.getLogger(__name__)

_NO_OPTIMIZER: Final = OptimizerSpec("Subtract", ({},))

EvaluationPoint = Literal["synced", "virtual"]


def connect(addresses: str | None = None, *, settings: Settings | None = None) -> "Session":
    """Join the run that this process was started for. The next call is `Session.wrap`.

    Args:
        addresses: ``host:port,host:port,…`` of the shards; by default from the environment (``thresher launch`` sets
            it), as everything else.
        settings: Everything explicitly, instead of the environment.

    Raises:
        ConfigurationError: when no shard is named, or a setting is out of range.
    """
    return Session(settings if settings is not None else settings_from(addresses=addresses))


@final
class Session:
    """One worker's part in a run.

    After `wrap` the user's loop is as it was: ``optimizer.step()`` exchanges gradients with the shards before it
    returns, and afterwards all workers have the same parameters. The session leaves the run when the process ends, when
    `close` is called or at the end of a ``with`` block; an exception on the way out is told to the other workers.

    Use it from one thread.
    """

    def __init__(self, settings: Settings) -> None:
        """Prepare; nothing is sent before `wrap`."""
        encrypted = settings.credentials.tls is not None
        for address in settings.addresses:
            check_address(address, insecure=settings.insecure, encrypted=encrypted)
        self._settings = settings
        self._rounds = Rounds(settings.rank, (), settings.consistency, _NO_OPTIMIZER, dict)
        self._memory: Memory | None = None
        self._progress = Progress()
        self._repeat: dict[str, Any] | None = None  # what was kept of the step that is made again
        self._leaving = False
        self._metrics: WorkerMetrics | None = None
        self._selection: Selection | None = None
        self._statistics = WorkerStatistics(settings.rank)
        self._closed = False

    @property
    def rank(self) -> int:
        """This worker's position, 0 … workers - 1."""
        return self._settings.rank

    @property
    def workers(self) -> int:
        """Number of workers the run started with."""
        return self._settings.workers

    @property
    def step(self) -> int:
        """Number of optimizer steps this worker has made."""
        return self._progress.step

    @property
    def residual(self) -> Tensor:
        """What this worker has not sent yet, [numel] float32, a view that changes with every step.

        Raises:
            ProtocolError: before `wrap`.
        """
        return self._selecting.residual

    @property
    def _selecting(self) -> Selection:
        if self._selection is None:
            raise ProtocolError("this session has no model yet; wrap an optimizer first")
        return self._selection

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Self:
        """Join the shards with this model, and have ``optimizer.step()`` exchange gradients; returns the session.

        Rank 0's parameters, optimizer state and buffers become everybody's. The optimizer stays the user's own object:
        schedulers, parameter groups, ``zero_grad()`` and ``state_dict()`` work as before. Its arithmetic runs at the
        shards (gradient-placed) or here (update-placed).

        Args:
            model: Any module.
            optimizer: An optimizer of `thresher.protos.optimizers.SUPPORTED` over parameters of ``model``.

        Raises:
            OptimizerError: for another optimizer.
            LayoutError: when nothing is to be trained, or other workers have registered another model.
            RegistrationError: when the rank is taken, or other workers use another optimizer or method.
            ConnectionTimeoutError: when a shard does not come up in time.
        """
        if self._closed:
            raise ProtocolError("this session is closed; connect anew")
        if self._rounds.shards:
            raise ProtocolError("this session has wrapped an optimizer already; use one session for one model")
        spec = spec_of(optimizer)
        self._optimizer = optimizer
        self._model = ModelParameters(model, optimizer)
        self._selection = Selection(self._settings, self._model.layout, spec.groups)
        self._placement = self._placement_of(spec, self._selection.feedback)
        if self._settings.metrics_listen is not None:
            self._metrics = WorkerMetrics(self.statistics, self._settings.metrics_listen)
        try:
            self._join(spec)
        except BaseException:
            self._end()
            raise
        atexit.register(self._at_exit)
        self._hear_termination()
        self._restart()
        self._count(None, compress_seconds=0.0, wait_seconds=0.0)
        StepHooks(optimizer, self._model, self._exchange, self._publish_state)
        return self

    def _join(self, spec: OptimizerSpec) -> None:
        """Begin from where the shards are, and from where this worker was, if it took part before."""
        settings = self._settings
        kept = self._remembered()
        address = self._metrics.address if self._metrics is not None else ""
        shards = join(settings, self._model, spec, self._placement, address, resumed=kept is not None)
        optimizer = self._placement.shard_optimizer
        self._rounds = Rounds(self.rank, shards, settings.consistency, optimizer, self._model.untrained)
        if kept is None:
            self._rounds.begin()
            self._selecting.threshold = self._selecting.threshold or shards[0].threshold
            return
        if kept["run"] != shards[0].client.history.run:
            raise DataLossError(
                f"worker {self.rank} remembers run {kept['run']:x} in {settings.state_dir}, the shards are in run "
                f"{shards[0].client.history.run:x}; give it the folder of this run, or an empty one"
            )
        self._progress.load(kept["progress"])
        self._selecting.load_state_dict(kept["selection"])
        self._placement.load_state_dict(kept["placement"])
        self._rounds.resume(kept["number"], kept["pending"])
        self._repeat = kept
        _logger.info("worker %d goes on with step %d", self.rank, self.step)

    def _remembered(self) -> dict[str, Any] | None:
        settings = self._settings
        if settings.state_dir is None:
            return None
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        path = settings.state_dir / f"worker-{self.rank}.state"
        identity = f"worker {self.rank}: {self._model.layout.fingerprint}, {settings.method.describe()}"
        who = f"worker {self.rank}"
        self._memory = Memory(path, identity, between=lambda: reached(who, "flip"))
        for notice in self._memory.notices:
            _logger.warning("%s", notice)
        return self._memory.load()

    def _placement_of(self, spec: OptimizerSpec, feedback: Feedback) -> Placement:
        method, layout = self._settings.method, self._model.layout
        if method.placement == "gradient":
            return GradientPlaced(spec, getattr(feedback, "momentum", 0.0))
        (whole,) = layout.slices(1)
        outer = outer_spec(method.outer, len(spec.groups))
        return UpdatePlaced(spec, outer, whole, self._model.state(whole), feedback.detached)

    def batches(self, loader: "DataLoader[Any]") -> Iterator[Any]:
        """Yield one pass over this worker's share of a loader's data; randomness is keyed by (seed, rank, step).

        All workers deal out the same shuffled order, so that a pass sees every sample once and every worker makes the
        same number of steps. The global generators of torch, numpy and random are seeded anew for each batch, before
        it is fetched and before it is yielded, so that what a step draws depends neither on the steps before nor on how
        its data were loaded. Among several batches of one step each has a key of its own.
        """
        if not self._progress.begin_pass():
            return
        seed, progress = self._settings.seed, self._progress
        shared = share(
            loader, seed=seed, step=progress.pass_step, rank=self.rank, workers=self.workers, skip=progress.taken
        )
        while True:
            seed_everything(keyed_seed("data", seed, self.rank, progress.step, progress.batch))
            try:
                batch = next(shared)
            except StopIteration:
                return
            seed_everything(keyed_seed("step", seed, self.rank, progress.step, progress.batch))
            progress.begin_batch()
            yield batch

    def passes(self, count: int) -> Iterator[int]:
        """Yield 0 … ``count`` - 1, as ``range(count)`` does; a worker that was killed begins at the pass it was in."""
        return self._progress.passes(count)

    def keep(self, **objects: object) -> None:
        """Keep these with the rest of this worker's state: a scheduler, an average, anything with a ``state_dict()``.

        Where this worker goes on after a kill, they are given back what was kept: at once, and once more when the first
        batch is yielded, so that nothing counts twice.

        Raises:
            ConfigurationError: when one has no state that could be kept.
        """
        self._progress.keep(objects)

    def mean(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return the members' mean of some numbers, such as losses; all must ask for the same, in the same order.

        Raises:
            ProtocolError: before `wrap`, or when the members ask for different ones.
            RoundFailedError: when some have not asked by the deadline; the shard's log names them.
        """
        self._selecting  # noqa: B018 - it refuses before `wrap`
        repeated = self._progress.repeated()
        if repeated is not None:
            return repeated
        agreed = self._rounds.shards[0].client.agree(self._progress.agreements, values)
        self._progress.agreed(agreed)
        return agreed

    def stop(self, wish: bool = False) -> bool:  # noqa: FBT001, FBT002 - reads as a question
        """Return True on all workers as soon as one of them wishes to stop: early stopping; all must ask alike."""
        return self.mean({"stop": float(wish)})["stop"] > 0

    def statistics(self) -> WorkerStatistics:
        """Return this worker's counters; from any thread."""
        return self._statistics

    def close(self) -> None:
        """Leave the run: the other workers go on without this one. Safe to repeat.

        Raises:
            ThresherError: when a shard could not be told.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        if self._rounds.shards:
            self._model.assign(self._rounds.pieces)  # all workers end with the same parameters
        try:
            for index, shard in enumerate(self._rounds.shards):
                bring_buffers = self.rank == 0 and index == 0
                buffers = pack_state({}, self._model.untrained(buffers_only=True)) if bring_buffers else b""
                kept = self.residual[shard.slice.begin : shard.slice.end]
                whole = not self._progress.resumed
                shard.client.leave(pb.Leave(abandoned_squared=float(torch.dot(kept, kept)), counted=whole), buffers)
            if self._memory is not None:
                self._memory.clear()
        finally:
            self._end()

    def abort(self, reason: str) -> None:
        """Give up: the run fails, and the other workers read ``reason``. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        for shard in self._rounds.shards:
            shard.client.abort(reason)
        self._end()

    def __enter__(self) -> Self:
        """Begin a block at whose end the session is closed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave, or abort when the block raised."""
        if error is None:
            self.close()
        else:
            self.abort(f"{type(error).__name__}: {error}")

    @contextmanager
    def evaluating(self, point: EvaluationPoint = "synced") -> Iterator[None]:
        """Put the parameters that are worth evaluating into the model, for the length of the block.

        With DEF, CSER and local steps the model is between steps not where the run is, but where this worker takes its
        gradients; otherwise ``synced`` changes nothing.

        Args:
            point: ``synced``, the shards' x; or ``virtual``, x - mean residual, which removes the lag of what has not
                been sent. The latter is a round of its own, dense, in which all workers must take part at the same
                step (arXiv:2004.05298; the point at which its official code evaluates).

        Raises:
            ConfigurationError: ``virtual`` makes sense only for update-placed methods without an outer optimizer.
            ProtocolError: before `wrap`.
        """
        self._selecting  # noqa: B018 - it refuses before `wrap`
        pieces = self._rounds.pieces
        if point == "virtual":
            self._check_virtual()
            mean = self._rounds.mean(self.residual.clone())
            pieces = [(piece, x - mean[piece.begin : piece.end]) for piece, x in pieces]
        self._model.assign(pieces)
        try:
            yield
        finally:
            self._show()

    def _check_virtual(self) -> None:
        method = self._settings.method
        if method.placement != "update" or method.outer:
            raise ConfigurationError(
                "the virtual point x - mean residual needs a residual in units of the parameters: placement 'update', "
                f"and no outer optimizer; this run is {method.describe()}"
            )

    # The step

    def _exchange(self, *, skip: bool, inverse_scale: float) -> None:
        """Make one step: alone between rounds, and with all shards where a round is due."""
        if self._closed:
            raise ProtocolError("this session is closed: optimizer.step() has nobody to exchange gradients with")
        if self._repeat is not None:
            self._finish_again(self._repeat)
            return
        groups = hyperparameters_of(self._optimizer)
        overrides = self._placement.overrides(groups)
        begin = time.perf_counter()
        gradient = None if skip else self._gradient(inverse_scale)
        reached(f"worker {self.rank}", "gradient")
        if gradient is not None:
            self._placement.take(*gradient, groups)
        if (self.step + 1) % self._settings.method.period and not self._leaving:
            self._progress.end_step()
            self._show()
            return
        message = self._placement.message()
        select = self._selecting.select_all if self._leaving else self._selecting.select
        sent = None if message is None else select(message, self._rounds.number)
        presence = () if message is None or sent is None else self._model.heard(message.presence, sent)
        proposal = self._selecting.propose(message, sent) if self.rank == 0 else None
        self._rounds.prepare(sent, presence, overrides, proposal, self.residual)
        reached(f"worker {self.rank}", "compress")
        self._remember()
        compressed = time.perf_counter()
        self._rounds.send()
        self._finish()
        self._count(sent, compress_seconds=compressed - begin, wait_seconds=time.perf_counter() - compressed)
        if self._leaving:
            self.close()
            raise SystemExit(128 + signal.SIGTERM)

    def _finish(self) -> None:
        """Hear what became of the round, and begin the next."""
        outcome = self._rounds.finish()
        for piece, values in outcome.returned:
            self._selecting.give_back(piece, values)
        self._selecting.adopt(outcome.updates, outcome.pulled_bytes)
        self._progress.end_step()
        self._restart()

    def _finish_again(self, kept: dict[str, Any]) -> None:
        """Finish the step in which this worker was killed: its message is the one that was kept."""
        self._repeat = None
        self._finish()
        self._model.assign_untrained(kept["untrained"])  # the forward pass was made again, on other parameters
        self._count(None, compress_seconds=0.0, wait_seconds=0.0)

    def _remember(self) -> None:
        if self._memory is None:
            return
        self._memory.flip(
            {
                "run": self._rounds.shards[0].client.history.run,
                "progress": self._progress.state(),
                "number": self._rounds.number,
                "pending": self._rounds.pending,
                "selection": self._selecting.state_dict(),
                "placement": self._placement.state_dict(),
                "untrained": self._model.untrained(buffers_only=True),
            }
        )

    def _gradient(self, inverse_scale: float) -> tuple[Tensor, Presence] | None:
        """Return the model's flat gradient, and which tensors have one; None when the step is skipped."""
        gradient = self._model.gather(inverse_scale)
        try:
            self._model.check_finite(self.rank, self.step)
        except NonFiniteGradientError as error:
            if self._settings.method.nonfinite == "refuse":
                raise
            _logger.warning("skipped: %s", error)
            return None
        return gradient

    def _restart(self) -> None:
        """Begin the next round from where the shards are."""
        self._placement.begin(self._rounds.pieces, self.residual)
        self._show()

    def _show(self) -> None:
        """Put into the model where the next gradient is to be taken."""
        self._model.assign(self._placement.point(self._rounds.pieces))

    def _count(self, sent: SparseGradient | None, *, compress_seconds: float, wait_seconds: float) -> None:
        then = self._statistics
        self._statistics = WorkerStatistics(
            rank=self.rank,
            steps=self.step,
            skipped=then.skipped + (sent is None and wait_seconds > 0),
            numel=self._model.layout.numel,
            push_bytes=tuple(shard.client.push_bytes for shard in self._rounds.shards),
            pull_bytes=tuple(shard.client.pull_bytes for shard in self._rounds.shards),
            setup_bytes=sum(shard.client.calls.setup_bytes for shard in self._rounds.shards),
            pushed_elements=then.pushed_elements + (sent.count if sent is not None else 0),
            density=sent.density if sent is not None else 0.0,
            residual_norm=float(self.residual.norm()),
            threshold=self._selecting.threshold,
            compress_seconds=then.compress_seconds + compress_seconds,
            wait_seconds=then.wait_seconds + wait_seconds,
        )

    # Leaving

    def _at_exit(self) -> None:
        """Leave when the script ends; give up when it ends by an exception."""
        error = getattr(sys, "last_value", None)
        try:
            if error is None:
                self.close()
            else:
                self.abort(f"{type(error).__name__}: {error}")
        except ThresherError as failure:
            _logger.error("%s", failure)  # noqa: TRY400 - it says all; a traceback of the exit would not help

    def _publish_state(self) -> None:
        self._model.publish_state(self._placement.state([shard.follower for shard in self._rounds.shards]))

    def _hear_termination(self) -> None:
        """A spot notice: the next step sends everything that was kept back, and this worker leaves."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)

    def _terminated(self, *_: object) -> None:
        if self._leaving:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._leaving = True

    def _end(self) -> None:
        for shard in self._rounds.shards:
            shard.client.close()
        if self._memory is not None:
            self._memory.close()
        if self._metrics is not None:
            self._metrics.close()
