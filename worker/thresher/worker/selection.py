"""What one worker sends of each round: a feedback whose threshold may come from the run."""

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from thresher.compression import Round, quantile_threshold
from thresher.protos.layout import Layout, Slice
from thresher.protos.optimizers import Hyperparameters
from thresher.protos.sparse import SparseGradient
from thresher.protos.update import Update
from thresher.worker.placement import Message
from thresher.worker.settings import Settings
from thresher.worker.steering import Budgeted, Calibrated, Steering


@final
class Selection:
    """A method at work. One λ per run: rank 0 proposes it, it travels in the update, everybody adopts it.

    Args:
        settings: What to send, and this worker's factor on λ.
        layout: The model.
        groups: Hyper-parameters of the user's optimizer.
    """

    def __init__(self, settings: Settings, layout: Layout, groups: Sequence[Hyperparameters]) -> None:
        """Begin with an empty residual."""
        method = settings.method
        self.feedback = method.feedback_for(layout)
        self.threshold = method.fixed_threshold(layout, groups)  # in the unit of the gradient; None until it is found
        self._rank = settings.rank
        self._factor = settings.threshold_factor
        self._steering: Steering | None = None
        if self.threshold is None and method.rule == "calibrated" and method.density is not None:
            self._steering = Calibrated(method.density)
        elif self.threshold is None and (method.density is not None or method.budget is not None):
            self._steering = Budgeted(
                layout.numel, settings.workers, density=method.density, budget=method.budget, steps=method.steps
            )

    @property
    def residual(self) -> Tensor:
        """What has not been sent yet, [numel] float32."""
        return self.feedback.residual

    def select(self, message: Message, number: int) -> SparseGradient:
        """Return what is sent of ``message`` and the residual in round ``number``, and keep the rest."""
        threshold = self.threshold
        if threshold is None and self._steering is not None:
            # Nobody has proposed one yet: each worker keeps the largest of its own first message.
            threshold = quantile_threshold(message.vector, self._steering.density) / message.scale
        if threshold is not None:
            threshold *= self._factor
        here = Round(number, 0, threshold, message.scale, self._rank, message.rate)
        compress = self.feedback.compress_finite if message.finite else self.feedback.compress
        return compress(message.vector, here)

    def select_all(self, message: Message | None, number: int) -> SparseGradient:
        """Return ``message``, if there is one, and the whole residual; keep nothing: the last push of who leaves."""
        sent = self.residual.clone() if message is None else self.select(message, number).densify() + self.residual
        self.residual.zero_()
        indices = sent.nonzero().view(-1)
        return SparseGradient(indices, sent[indices], sent.numel())

    def give_back(self, piece: Slice, values: SparseGradient) -> None:
        """Put what a shard did not take back into the residual."""
        self.residual[piece.begin : piece.end].index_add_(0, values.indices, values.values)

    def state_dict(self) -> dict[str, Any]:
        """Return everything it remembers: what was not sent, and how λ is found."""
        steering = None if self._steering is None else self._steering.state_dict()
        return {"feedback": self.feedback.state_dict(), "threshold": self.threshold, "steering": steering}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one whose state this is. Raises ConfigurationError when it is that of another method."""
        self.feedback.load_state_dict(state["feedback"])
        self.threshold = state["threshold"]
        if self._steering is not None:
            self._steering.load_state_dict(state["steering"])

    def propose(self, message: Message | None, sent: SparseGradient | None) -> float | None:
        """Return rank 0's λ for the next round, after ``sent`` was selected; None for methods without one."""
        if self._steering is None or message is None or sent is None:
            return self.threshold

        def corrected() -> Tensor:
            whole = self.residual.clone()
            whole[sent.indices] += sent.values
            return whole.div_(message.scale)

        return self._steering.observe(corrected, sent.density)

    def adopt(self, updates: Sequence[Update], pulled_bytes: int = 0) -> None:
        """Take the run's λ for the next round, and hear in how many bytes the updates came."""
        if self._steering is not None and updates:
            self._steering.settle(updates, pulled_bytes)
        for update in updates:
            if update.next_threshold is not None:
                self.threshold = update.next_threshold
