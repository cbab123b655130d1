"""The step: gather → compress → push → wait → replay → copy back. `Session._exchange` tells it on one screen."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thresher.protos.errors import NonFiniteGradientError, ProtocolError
from thresher.protos.faults import reached
from thresher.protos.optimizers import OptimizerSpec, hyperparameters_of, spec_of
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Presence
from thresher.worker.batches import keyed_batches
from thresher.worker.directory import check_shard
from thresher.worker.evaluation import EvaluationPoint, evaluation_point
from thresher.worker.joining import join
from thresher.worker.metrics import WorkerMetrics
from thresher.worker.parameters import ModelParameters
from thresher.worker.placement import Message, placed
from thresher.worker.progress import Progress, Schedule
from thresher.worker.recording import Listener, Recorder
from thresher.worker.remembering import Remembering
from thresher.worker.rounds import Rounds
from thresher.worker.selection import Selection
from thresher.worker.settings import Settings, settings_from
from thresher.worker.statistics import WorkerStatistics
from thresher.worker.step_hooks import StepHooks
from thresher.worker.termination import EXIT_STATUS, Termination, failure

_logger = logging.getLogger(__name__)

_NO_OPTIMIZER: Final = OptimizerSpec("Subtract", ({},))


def connect(addresses: str | None = None, *, settings: Settings | None = None) -> "Session":
    """Join the run that this process was started for. The next call is `Session.wrap`.

    Args:
        addresses: ``host:port,host:port,…`` of the shards, or the name of a run, ``ray://NAME`` (see `Directory`); by
            default from the environment (``thresher launch`` sets it), as everything else.
        settings: Everything explicitly, instead of the environment.

    Raises:
        ConfigurationError: when no shard is named, or a setting is out of range; also what `Directory` raises.
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
            check_shard(address, insecure=settings.insecure, encrypted=encrypted)
        self._settings = settings
        self._rounds = Rounds(settings.rank, (), settings.consistency, _NO_OPTIMIZER, dict)
        self._progress = Progress(settings.workers)
        self._remembering: Remembering | None = None
        self._termination = Termination(self._leave)
        self._metrics: WorkerMetrics | None = None
        self._selection: Selection | None = None
        self._recorder = Recorder(settings.rank)
        self._closed = False

    @property
    def rank(self) -> int:
        """This worker's position, 0 … workers - 1."""
        return self._settings.rank

    @property
    def workers(self) -> int:
        """Number of workers, as this one was told: among so many its data are dealt."""
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
        self._optimizer, self._progress.schedule = optimizer, Schedule(optimizer)
        self._model = ModelParameters(model, optimizer)
        self._selection = Selection(self._settings, self._model.layout, spec.groups)
        self._placement = placed(spec, self._settings.method, self._model, self._selection.feedback)
        if self._settings.metrics_listen is not None:
            self._metrics = WorkerMetrics(self.statistics, self._settings.metrics_listen)
        if self._settings.rows is not None:
            self._recorder.open(self._settings.rows)
        try:
            self._join(spec)
        except BaseException:
            self._end()
            raise
        self._termination.listen()
        self._restart()
        resumed, layout = self._progress.resumed, self._model.layout
        self._recorder.start(layout, self._rounds, self._selection, self.step, resumed=resumed)
        StepHooks(optimizer, self._model, self._exchange, self._publish_state)
        return self

    def _join(self, spec: OptimizerSpec) -> None:
        """Begin from where the shards are, and from where this worker was, if it took part before."""
        settings, selection, placement = self._settings, self._selecting, self._placement
        self._remembering = Remembering(settings, self._model, selection, placement, self._progress)
        address = self._metrics.address if self._metrics is not None else ""
        shards = join(settings, self._model, spec, placement, address, run=self._remembering.run)
        optimizer, untrained = placement.shard_optimizer, self._model.untrained
        self._rounds = Rounds(self.rank, shards, settings.consistency, optimizer, untrained)
        if not self._remembering.go_on(self._rounds):
            self._remembering.begin(self._rounds)
            if selection.threshold is None:
                selection.threshold = shards[0].threshold

    def batches(self, loader: "DataLoader[Any]") -> Iterator[Any]:
        """Yield one pass over this worker's share of a loader's data; randomness is keyed by (seed, rank, step).

        All workers deal out the same shuffled order, so that a pass sees every sample once and every worker makes the
        same number of steps. The global generators of torch, numpy and random are seeded anew for each batch, before
        it is fetched and before it is yielded, so that what a step draws depends neither on the steps before nor on how
        its data were loaded. Among several batches of one step each has a key of its own.

        A worker that was killed goes on behind the batches it had taken, one without a state where the others are;
        variables of the loop, such as the number that ``enumerate`` counts, begin anew: count with `step`, and `keep`
        what else must go on. Where a run goes on with another number of workers, the rest of the pass is dealt anew.

        Raises:
            ProtocolError: when another pass is not over yet.
        """
        yield from keyed_batches(loader, self._progress, seed=self._settings.seed, rank=self.rank)

    def passes(self, count: int) -> Iterator[int]:
        """Yield 0 … ``count`` - 1, as ``range(count)`` does; a worker that was killed begins at the pass it was in.

        Raises:
            ProtocolError: when it is called for a second time.
        """
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
            ProtocolError: before `wrap`, when the members ask for different ones, or for the 65th time since the
                iteration of the last push began: the shards remember 64 for a worker that is killed.
            RoundFailedError: when some have not asked by the deadline; the shard's log names them.
        """
        self._selecting  # noqa: B018 - it refuses before `wrap`
        agreed = self._progress.repeated()
        if agreed is None:
            agreed = self._rounds.agree(self._progress.next_agreement(), values)
            self._progress.agreed(agreed)
        return agreed

    def stop(self, wish: bool = False) -> bool:  # noqa: FBT001, FBT002 - reads as a question
        """Return True on all workers as soon as one of them wishes to stop: early stopping; all must ask alike."""
        return self.mean({"stop": float(wish)})["stop"] > 0

    def statistics(self) -> WorkerStatistics:
        """Return this worker's counters; from any thread."""
        return self._recorder.statistics

    def on_step(self, listener: Listener) -> None:
        """Call ``listener`` with the `WorkerRow` of each step that exchanges with the shards, in the loop's thread.

        Listeners are called in the order in which they came, before ``optimizer.step()`` returns, when the model has
        the new parameters. What one raises comes out of ``optimizer.step()``. A step in which this worker was killed
        is told by its next life, also where the last one had just told it.
        """
        self._recorder.listen(listener)

    def close(self) -> None:
        """Leave the run: the other workers go on without this one. Safe to repeat.

        Raises:
            ThresherError: when a shard could not be told.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._rounds.shards:
                self._model.assign(self._rounds.pieces)  # all workers end with the same parameters
                buffers = self._model.untrained(buffers_only=True) if self.rank == 0 else {}
                self._rounds.leave(self.residual, buffers, whole=not self._progress.resumed)
            if self._remembering is not None:
                self._remembering.forget()
        finally:
            self._end()

    def abort(self, reason: str) -> None:
        """Give up: the run fails, and the other workers read ``reason``. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        self._rounds.abort(reason)
        self._end()

    def __enter__(self) -> Self:
        """Begin a block at whose end the session is closed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave, or abort when the block raised; ``sys.exit(0)`` is no failure."""
        self._leave(error)

    @contextmanager
    def evaluating(self, point: EvaluationPoint = "synced") -> Iterator[None]:
        """Put the parameters that are worth evaluating into the model, for the length of the block.

        With DEF, CSER and local steps the model is between steps not where the run is, but where this worker takes its
        gradients; otherwise ``synced`` changes nothing.

        Args:
            point: ``synced``, the shards' x; or ``virtual``, x - mean residual, which removes the lag of what has not
                been sent: a round of its own, dense, in which all workers must take part at the same step.

        Raises:
            ConfigurationError: ``virtual`` makes sense only in lockstep, for update-placed methods without an outer
                optimizer.
            ProtocolError: before `wrap`.
        """
        residual = self._selecting.residual
        self._model.assign(evaluation_point(point, self._settings, self._rounds, self._remembering, residual))
        try:
            yield
        finally:
            self._show()

    # The step

    def _exchange(self, *, skip: bool, inverse_scale: float) -> None:
        """Make one step: alone between rounds, and with all shards where a round is due."""
        if self._closed:
            raise ProtocolError("this session is closed: optimizer.step() has nobody to exchange gradients with")
        self._recorder.begin()
        remembering = self._remembering
        if remembering is not None and remembering.kept is not None:
            self._repeat(remembering, remembering.kept)
            return
        leaving = self._termination.noticed
        groups = hyperparameters_of(self._optimizer)
        overrides = self._placement.overrides(groups)
        gradient = None if skip else self._gradient(inverse_scale)
        reached(f"worker {self.rank}", "gradient")
        if gradient is not None:
            self._placement.take(*gradient, groups)
        if (self.step + 1) % self._settings.method.period and not leaving:
            self._progress.end_step(pushed=False)
            self._show()
            return
        message = self._placement.message()
        sent, presence = self._select(message, leaving=leaving)
        proposal = self._selecting.propose(message, sent) if self.rank == 0 else None
        self._rounds.prepare(sent, presence, overrides, proposal, self.residual, self._progress.bookmark)
        reached(f"worker {self.rank}", "compress")
        if remembering is not None:
            remembering.keep(self._rounds)
        self._recorder.framed()
        self._rounds.send()
        self._finish()
        self._recorder.end(self.step, self._rounds, self._selecting, sent)
        if leaving:
            self.close()
            raise SystemExit(EXIT_STATUS)

    def _repeat(self, remembering: Remembering, kept: Mapping[str, Any]) -> None:
        """Finish the step in which this worker was killed: its message is the kept one."""
        self._recorder.framed()
        self._finish()
        remembering.repeated(self._rounds)
        self._recorder.end_repeated(self.step, self._rounds, self._selecting, kept["number"], kept["pending"])

    def _finish(self) -> None:
        """Hear what became of the round, and begin the next."""
        outcome = self._rounds.finish()
        for piece, values in outcome.returned:
            self._selecting.give_back(piece, values)
        self._selecting.adopt(outcome.updates, outcome.pulled_bytes)
        self._progress.end_step()
        if self._remembering is not None:
            self._remembering.go_along(self._rounds)
        self._restart()

    def _select(self, message: Message | None, *, leaving: bool) -> tuple[SparseGradient | None, Presence]:
        """Return what is sent and which tensors it speaks of; a worker that leaves sends whatever there is."""
        if leaving:
            sent = self._selecting.select_all(message, self._rounds.number)
        elif message is None:
            return None, ()
        else:
            sent = self._selecting.select(message, self._rounds.number)
        present = (False,) * len(self._model.layout.trained) if message is None else message.presence
        return sent, self._model.heard(present, sent)

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

    def _restart(self) -> None:  # the next round, from where the shards are
        self._placement.begin(self._rounds.pieces, self.residual)
        self._show()

    def _show(self) -> None:
        """Put into the model where the next gradient is to be taken."""
        self._model.assign(self._placement.point(self._rounds.pieces))

    # Leaving

    def _leave(self, error: BaseException | None) -> None:
        """Leave when the script, or its block, ends; give up when it ends by a failure."""
        reason = failure(error)
        if reason is None:
            self.close()
        else:
            self.abort(reason)

    def _publish_state(self) -> None:
        self._model.publish_state(self._placement.state([shard.follower for shard in self._rounds.shards]))

    def _end(self) -> None:
        self._termination.ignore()
        self._rounds.close()
        self._recorder.close()
        if self._remembering is not None:
            self._remembering.close()
        if self._metrics is not None:
            self._metrics.close()
