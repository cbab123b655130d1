"""The step: gather → compress → push → wait → replay → copy back. `Session._exchange` tells it on one screen."""

import atexit
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thresher.compression import Feedback
from thresher.protos.errors import ConfigurationError, NonFiniteGradientError, ProtocolError, ThresherError
from thresher.protos.optimizers import OptimizerSpec, hyperparameters_of, spec_of
from thresher.protos.snapshots import pack_state
from thresher.protos.sparse import SparseGradient
from thresher.protos.transport import check_address
from thresher.protos.update import Presence
from thresher.worker.batches import keyed_seed, seed_everything, share
from thresher.worker.joining import join
from thresher.worker.metrics import WorkerMetrics
from thresher.worker.outer import outer_spec
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import GradientPlaced, Placement, UpdatePlaced
from thresher.worker.rounds import Rounds
from thresher.worker.selection import Selection
from thresher.worker.settings import Settings, settings_from
from thresher.worker.statistics import WorkerStatistics

_logger = logging.getLogger(__name__)

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
        for address in settings.addresses:
            check_address(address, insecure=settings.insecure)
        self._settings = settings
        self._rounds = Rounds(())
        self._metrics: WorkerMetrics | None = None
        self._step = 0
        self._batch = 0  # batches taken since the last step: gradients may be accumulated over several
        self._selection: Selection | None = None
        self._statistics = WorkerStatistics(settings.rank)
        self._hidden: list[Tensor | None] = []
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
        return self._step

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
        metrics_address = self._metrics.address if self._metrics is not None else ""
        try:
            self._rounds = Rounds(join(self._settings, self._model, spec, self._placement, metrics_address))
        except BaseException:
            self._end()
            raise
        atexit.register(self._at_exit)
        self._restart()
        self._count(None, compress_seconds=0.0, wait_seconds=0.0)
        self._hook()
        return self

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
        seed = self._settings.seed
        shared = share(loader, seed=seed, step=self._step, rank=self.rank, workers=self.workers)
        while True:
            seed_everything(keyed_seed("data", seed, self.rank, self._step, self._batch))
            try:
                batch = next(shared)
            except StopIteration:
                return
            seed_everything(keyed_seed("step", seed, self.rank, self._step, self._batch))
            self._batch += 1
            yield batch

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
                shard.client.leave(self._rounds.number, buffers)
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
        groups = hyperparameters_of(self._optimizer)
        overrides = self._placement.overrides(groups)
        begin = time.perf_counter()
        gradient = None if skip else self._gradient(inverse_scale)
        if gradient is not None:
            self._placement.take(*gradient, groups)
        self._step, self._batch = self._step + 1, 0
        if self._step % self._settings.method.period:
            self._show()
            return
        message = self._placement.message()
        sent = None if message is None else self._selecting.select(message, self._rounds.number)
        presence = () if message is None or sent is None else self._model.heard(message.presence, sent)
        proposal = self._selecting.propose(message, sent) if self.rank == 0 else None
        compressed = time.perf_counter()
        self._selecting.adopt(*self._rounds.exchange(sent, presence, overrides, proposal, self.residual))
        self._restart()
        self._count(sent, compress_seconds=compressed - begin, wait_seconds=time.perf_counter() - compressed)

    def _gradient(self, inverse_scale: float) -> tuple[Tensor, Presence] | None:
        """Return the model's flat gradient, and which tensors have one; None when the step is skipped."""
        gradient = self._model.gather(inverse_scale)
        try:
            self._model.check_finite(self.rank, self._step)
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
            steps=self._step,
            skipped=then.skipped + (sent is None and self._step > 0),
            numel=self._model.layout.numel,
            push_bytes=tuple(shard.client.push_bytes for shard in self._rounds.shards),
            pull_bytes=tuple(shard.client.pull_bytes for shard in self._rounds.shards),
            setup_bytes=sum(shard.client.setup_bytes for shard in self._rounds.shards),
            pushed_elements=then.pushed_elements + (sent.count if sent is not None else 0),
            density=sent.density if sent is not None else 0.0,
            residual_norm=float(self.residual.norm()),
            threshold=self._selecting.threshold,
            compress_seconds=then.compress_seconds + compress_seconds,
            wait_seconds=then.wait_seconds + wait_seconds,
        )

    # The optimizer's hooks

    def _hook(self) -> None:
        """Put the exchange into ``optimizer.step()`` by torch's own hooks: nothing is patched, nothing subclassed."""
        optimizer = self._optimizer
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_pre_hook(self._before_state_dict)
        optimizer.register_load_state_dict_pre_hook(self._before_load_state_dict)
        # GradScaler then calls step() even on overflow and says so, as it does for fused optimizers. An overflow on one
        # worker only must still be heard by the others.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # noqa: SLF001 - its only switch

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Exchange; then hide the gradients, so that the user's optimizer itself finds nothing left to do."""
        if self._closed:
            raise ProtocolError("this session is closed: optimizer.step() has nobody to exchange gradients with")
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        skip, inverse_scale = _taken_from_scaler(optimizer)
        self._exchange(skip=skip, inverse_scale=inverse_scale)
        self._hidden = self._model.hide_gradients()
        return ((optimizer, lambda: loss), {}) if closure is not None else None

    def _after_step(self, *_: Any) -> None:
        self._model.restore_gradients(self._hidden)
        self._hidden = []

    def _before_state_dict(self, *_: Any) -> None:
        self._model.publish_state(self._placement.state([shard.replica for shard in self._rounds.shards]))

    def _before_load_state_dict(self, *_: Any) -> None:
        raise ProtocolError(
            "the optimizer's state lives at the shards now; load a state_dict before the optimizer is wrapped, "
            "and rank 0's seeds the shards"
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

    def _end(self) -> None:
        for shard in self._rounds.shards:
            shard.client.close()
        if self._metrics is not None:
            self._metrics.close()


def _taken_from_scaler(optimizer: torch.optim.Optimizer) -> tuple[bool, float]:
    """Return what a GradScaler left on the optimizer: is this step to be skipped, and what unscales its gradients?

    Both are taken off, or the optimizer itself would use them; the scaler deletes the attributes, so they stay.
    """
    overflow, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if overflow is not None:
        optimizer.found_inf = optimizer.grad_scale = None  # type: ignore[attr-defined]
    return overflow is not None and bool(overflow), 1.0 if scale is None else 1.0 / float(scale)
