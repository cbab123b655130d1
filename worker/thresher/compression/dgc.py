"""Deep gradient compression: momentum correction, local clipping and a warm-up of the density, tensor by tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from thresher.compression.base import (
    FIRST_ROUND,
    Guarantee,
    Round,
    Sparsifier,
    check_density,
    check_finite,
    check_flat,
    check_state,
    check_whole,
    described,
)
from thresher.compression.error_feedback import ErrorFeedback
from thresher.compression.feedback import Feedback, Where, check_tensor
from thresher.compression.layer_wise import check_numel
from thresher.compression.momentum_correction import advanced, checked_momentum
from thresher.compression.top_k import TopK
from thresher.protos.errors import ConfigurationError
from thresher.protos.sparse import SparseGradient


@final
@dataclass(eq=False)
class DGC(Feedback):
    """The whole recipe of "Deep gradient compression", on a model cut into tensors.

    - Momentum correction, as in :class:`~thresher.compression.momentum_correction.MomentumCorrection`; the optimizer
      behind it must be plain SGD. Weight decay is that optimizer's and has no momentum of its own here, as it has in
      the official code.
    - Tensors with more than one dimension send their largest ``density``, each for itself. Selection is exact; the
      official code adjusts a threshold that it takes from a sample.
    - The others (biases, norms) are sent whole in each round, and keep their velocity.
    - Warm-up: in epoch e of W the density is max(densityᵏ, density) with k = (e + 1) / (W + 1). Epochs follow
      :attr:`Round.step`.
    - Local gradient clipping: before anything else a worker scales its whole gradient to a norm of at most
      clip / √workers, so that the sum of independent ones has about the norm ``clip``.

    Args:
        shapes: of the trained tensors, in the order in which they make up the flat vector.
        density: kept fraction of each tensor after the warm-up, in (0, 1].
        momentum: β in [0, 1).
        nesterov: DGC's Nesterov form.
        masking: momentum factor masking.
        clip: largest norm of the gradient, > 0, as it would be set for one worker. None: no clipping.
        workers: how many there are; needed for clipping only.
        warm_up_epochs: W ≥ 0.
        steps_per_epoch: how many rounds an epoch has; needed for the warm-up only.
        device: where the buffers live and where gradients must be.

    Raises:
        ConfigurationError: a setting is out of its range, or one that another needs is missing.

    References:
        Lin et al., "Deep gradient compression", arXiv:1712.01887; defaults, warm-up and the treatment of
        one-dimensional tensors as in its official code.

    Examples:
        >>> feedback = DGC([(4, 2), (2,)], density=0.25, momentum=0.5)
        >>> feedback.compress(torch.arange(10.0)).indices  # 2 of the matrix, and the bias
        tensor([6, 7, 8, 9])
    """

    runs_in: ClassVar[frozenset[Where]] = frozenset({"gradient", "hook", "simulator"})

    shapes: Sequence[Sequence[int]]
    density: float = 0.001
    momentum: float = 0.9
    _: KW_ONLY
    nesterov: bool = False
    masking: bool = True
    clip: float | None = None
    workers: int | None = None
    warm_up_epochs: int = 0
    steps_per_epoch: int | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_density(self.density)
        self.density = float(self.density)
        self.momentum = checked_momentum(self.momentum)
        self._bound = self._checked_bound()
        self._check_warm_up()
        shapes = self.shapes = tuple(tuple(shape) for shape in self.shapes)
        selection = LargestPerMatrix(shapes, self.density, self.warm_up_epochs, self.steps_per_epoch or 1)
        numel = sum(selection.sizes)
        self._feedback = ErrorFeedback(selection, numel, device=self.device)
        self._velocity = torch.zeros(numel, device=self.device)
        self._masked = torch.zeros(numel, dtype=torch.bool, device=self.device)
        for shape, piece in zip(shapes, torch.split(self._masked, selection.sizes), strict=True):
            piece.fill_(self.masking and len(shape) > 1)

    def _checked_bound(self) -> float | None:
        """The largest norm of a worker's own gradient."""
        if self.clip is None:
            return None
        if not 0.0 < self.clip < math.inf:
            raise ConfigurationError(f"clip must be a finite number above 0, not {self.clip}")
        if self.workers is None:
            raise ConfigurationError("clip is shared by all workers: set workers to how many there are")
        self.clip = float(self.clip)
        self.workers = check_whole("workers", self.workers, least=1)
        return self.clip / math.sqrt(self.workers)

    def _check_warm_up(self) -> None:
        self.warm_up_epochs = check_whole("warm_up_epochs", self.warm_up_epochs, least=0)
        if self.steps_per_epoch is not None:
            self.steps_per_epoch = check_whole("steps_per_epoch", self.steps_per_epoch, least=1)
        elif self.warm_up_epochs:
            raise ConfigurationError("a warm-up is counted in epochs: set steps_per_epoch")

    @property
    def guarantee(self) -> Guarantee:
        """It does not conserve its input; with a memory there is no bound on the error of one input alone."""
        return Guarantee(conserves=False)

    @property
    def residual(self) -> Tensor:
        """v, the accumulated velocity that has not been sent, [numel] float32: the buffer itself."""
        return self._feedback.residual

    @property
    def velocity(self) -> Tensor:
        """u, [numel] float32; each step makes a new one."""
        return self._velocity

    def describe(self) -> str:
        """Such as ``DGC(density=0.01, nesterov=True)``."""
        return described(self)

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """What is sent of the accumulated velocity; ``gradient``, [numel] float32, is not modified.

        Raises:
            ConfigurationError: another shape, dtype or device.
            NonFiniteGradientError: NaN or infinity in the gradient, or in a velocity that outgrows float32; names the
                first index and how many. Nothing has changed then.
        """
        self._check_fits(gradient)
        clipped = self._clipped(gradient)
        velocity, moved = advanced(self._velocity, clipped, self.momentum, nesterov=self.nesterov)
        sent = self._feedback.compress(moved, round)
        velocity[sent.indices[self._masked[sent.indices]]] = 0.0
        self._velocity = velocity
        return sent

    def _clipped(self, gradient: Tensor) -> Tensor:
        if self._bound is None:
            return gradient
        check_finite(gradient)  # scaled, an infinity would be reported as NaN
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        return gradient if norm <= self._bound else gradient * (self._bound / norm)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: u and v."""
        return {
            "method": self.describe(),
            "velocity": self._velocity.clone(),
            "feedback": self._feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method or another numel (both are named), or is not such a
                state; nothing is changed.
        """
        check_state(self.describe(), state, {"method", "velocity", "feedback"})
        velocity = check_tensor("velocity", state["velocity"], self._velocity)
        self._feedback.load_state_dict(state["feedback"])
        self._velocity = velocity.to(self.device, copy=True)


@final
@dataclass(frozen=True, slots=True)
class LargestPerMatrix(Sparsifier):
    """What DGC selects: the largest of each tensor with more than one dimension, and all of the others.

    Args:
        shapes: of the tensors.
        density: kept fraction of each after the warm-up.
        warm_up_epochs: W; 0: no warm-up.
        steps_per_epoch: how many rounds an epoch has.

    References:
        arXiv:1712.01887, section 3.3, and the official code.
    """

    shapes: tuple[Sequence[int], ...]
    density: float
    warm_up_epochs: int
    steps_per_epoch: int

    @property
    def sizes(self) -> list[int]:
        """The number of elements of each tensor."""
        return [prod(shape) for shape in self.shapes]

    @property
    def guarantee(self) -> Guarantee:
        """It conserves: what is dropped is the exact rest. A bound would hold for this model only, so none is given."""
        return Guarantee(conserves=True)

    def density_at(self, step: int) -> float:
        """The density in force in round ``step``."""
        epoch = step // self.steps_per_epoch
        return max(self.density, math.pow(self.density, (epoch + 1) / (self.warm_up_epochs + 1)))

    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """The selected coordinates of ``gradient``, [numel] float32, untouched.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector of these shapes.
        """
        check_flat(gradient)
        check_numel("DGC", sum(self.sizes), gradient.numel())
        largest = TopK(self.density_at(round.step))
        return SparseGradient.concatenate(
            [
                largest.compress(tensor) if len(shape) > 1 else SparseGradient.dense(tensor.clone())
                for shape, tensor in zip(self.shapes, torch.split(gradient, self.sizes), strict=True)
            ]
        )
