"""The contract of a compressor."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, final

import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError, NonFiniteGradientError
from thresher.protos.sparse import SparseGradient

# Constructor arguments that come from the model and are no setting: they are left out of descriptions.
LAYOUT_BOUND = frozenset({"numel", "shapes", "names", "device"})


@final
@dataclass(frozen=True, slots=True)
class Guarantee:
    """What a compressor C promises, in its own word; its tests hold it to that.

    For a compressor that draws random numbers the bounds hold in expectation over them.

    Args:
        conserves: under error feedback, everything sent plus the residual is everything put in.
        kappa: for an absolute compressor, numel → κ, in the unit of the gradient, with E‖x - C(x)‖² ≤ κ² for every x.
            None: not absolute.
        delta: for a relative one (a δ-contraction), numel → δ in (0, 1] with E‖x - C(x)‖² ≤ (1 - δ)‖x‖² for every x.
            None: not relative.
        omega: for an unbiased one, numel → ω with E C(x) = x and E‖x - C(x)‖² ≤ ω‖x‖² for every x. None: biased, or
            without such a bound.

    References:
        Sahu et al., "Rethinking gradient sparsification as total error minimization", arXiv:2108.00951, equations (7)
        and (9); Horváth and Richtárik, arXiv:2006.11077, for ω.
    """

    conserves: bool
    kappa: Callable[[int], float] | None = None
    delta: Callable[[int], float] | None = None
    omega: Callable[[int], float] | None = None


@final
@dataclass(frozen=True, slots=True)
class Round:
    """What is in force when a gradient is compressed; equal on all workers of a run but for ``worker``.

    Args:
        step: number of the round in the run. Random numbers are keyed by it, schedules follow it.
        tensor: which tensor of the model, where each is compressed alone; 0 for the whole model.
        threshold: the run's λ in the unit of the gradient, for a hard threshold that has none of its own.
        scale: the unit of what is compressed in units of the gradient: γ for finished updates, 1 for gradients. An
            absolute compressor becomes C_γ(x) = γ·C(x/γ) (arXiv:2108.00951, Algorithm 1). Finite, > 0.
        worker: whose gradient it is. Choices of coordinates don't look at it, so that workers agree; rounding does, so
            that the errors of the workers are independent and their mean has less of them.
        rate: the learning rate γ in force, for methods that follow a schedule; 1 where it is not known.

    References:
        Baseline: plain settings.
    """

    step: int = 0
    tensor: int = 0
    threshold: float | None = None
    scale: float = 1.0
    worker: int = 0
    rate: float = 1.0


FIRST_ROUND = Round()


class Compressor(ABC):
    """Shrinks a gradient to the few coordinates that are sent.

    Laws: the input is not modified and the output shares no memory with it; equal inputs, rounds and states give equal
    outputs, and the user's random generators are not touched. A coordinate that is NaN or infinite is not lost in
    silence: what chooses by magnitude keeps it, everything else raises
    :class:`~thresher.protos.errors.NonFiniteGradientError`.

    Most are frozen dataclasses without state. One that learns from what it sees (thresholds, norms) keeps that in
    tensors and plain values, which :meth:`state_dict` copies.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def guarantee(self) -> Guarantee:
        """What holds for every input."""

    @abstractmethod
    def compress(self, gradient: Tensor, round: Round = FIRST_ROUND) -> SparseGradient:
        """Choose what is sent of ``gradient``, [numel] float32.

        Raises:
            ConfigurationError: ``gradient`` is not a flat float32 vector, or not one this compressor was made for.
        """

    def describe(self) -> str:
        """The method and its settings, such as ``HardThreshold(0.01)``: equal text means equal behaviour.

        It is the call that makes it (:func:`thresher.compression.catalogue.parse` reads it), without defaults and
        without what comes from the model (shapes).
        """
        return described(self)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state: tensors, plain values and such dictionaries, and what it belongs to."""
        return {"method": self.describe()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`.

        Raises:
            ConfigurationError: the state belongs to another method (both are named), or is not such a state; nothing
                is changed.
        """
        check_state(self.describe(), state, {"method"})


class Sparsifier(Compressor):
    """Chooses coordinates; the values it keeps are untouched, and what it drops is the exact rest (law: D + e == p)."""

    __slots__ = ()


class Quantizer(Compressor):
    """Rounds values to fewer bits. Alone it acts on a whole vector, in ``Quantized`` on what a sparsifier kept."""

    __slots__ = ()


def described(method: Any) -> str:  # noqa: ANN401 - any dataclass
    """The constructor call of a dataclass, without defaults and without what comes from the model.

    Fields without a default come first and by position, the others by name.
    """
    written = []
    for field in fields(method):
        if not field.init or field.name in LAYOUT_BOUND:
            continue
        value = getattr(method, field.name)
        text = value.describe() if hasattr(value, "describe") else repr(value)
        if field.default is MISSING:
            written.append(text)
        elif value != field.default:
            written.append(f"{field.name}={text}")
    return f"{type(method).__name__}({', '.join(written)})"


def check_state(method: str, state: Mapping[str, Any], keys: set[str]) -> None:
    """Refuse a state that is not one of ``method`` with exactly ``keys``.

    Raises:
        ConfigurationError: says what differs.
    """
    if not isinstance(state, Mapping):
        raise ConfigurationError(f"not a state of {method}: found a {type(state).__name__}")
    found = state.get("method")
    if found != method and found is not None:
        raise ConfigurationError(f"the state belongs to {found}, this is {method}")
    if set(state) != keys:
        raise ConfigurationError(f"not a state of {method}: expected the keys {sorted(keys)}, found {sorted(state)}")


def check_compressor(owner: str, compressor: object) -> None:
    """Refuse what is no compressor.

    Raises:
        ConfigurationError: ``compressor`` is something else, such as a feedback.
    """
    if not isinstance(compressor, Compressor):
        raise ConfigurationError(
            f"{owner} takes compressors, not a {type(compressor).__name__}; a feedback goes around them, not into them"
        )


def check_whole(name: str, value: float, *, least: int, most: int | None = None) -> int:
    """Return ``value`` as an integer if it is one in [least, most]; a description may write it as ``2**7``.

    Raises:
        ConfigurationError: it is not.
    """
    if not (value >= least and (most is None or value <= most) and float(value).is_integer()):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigurationError(f"{name} must be a whole number, {limit}, not {value}")
    return int(value)


def check_flat(vector: Tensor) -> None:
    """Refuse anything but a [numel] float32 tensor.

    Raises:
        ConfigurationError: another shape or dtype.
    """
    if vector.ndim != 1 or vector.dtype != torch.float32:
        raise ConfigurationError(
            f"a gradient must be a one-dimensional float32 tensor, not {vector.dtype} of shape {tuple(vector.shape)}"
        )


def check_finite(vector: Tensor) -> None:
    """Refuse NaN and infinity in ``vector``, [numel] float32.

    Raises:
        NonFiniteGradientError: names the first bad index, its value, and how many there are.
    """
    # NaN and infinity survive any summation, and a sum is twenty times faster than isfinite(). A sum of finite numbers
    # may overflow, so it can acquit and not convict.
    if bool(vector.sum().isfinite()):
        return
    bad = vector.isfinite().logical_not_().nonzero().squeeze(1)
    if bad.numel():
        first = int(bad[0])
        raise NonFiniteGradientError(
            f"gradient has {bad.numel()} non-finite of {vector.numel()} elements, the first is "
            f"{float(vector[first])} at index {first}"
        )


def check_density(density: float) -> None:
    """Refuse a density outside (0, 1].

    Raises:
        ConfigurationError: it is outside, or NaN.
    """
    if not 0.0 < density <= 1.0:
        raise ConfigurationError(f"density must be in (0, 1], not {density}")


def kept(density: float, numel: int) -> int:
    """How many of ``numel`` coordinates a ``density`` stands for: max(1, ⌊density · numel⌋), and none of none.

    References:
        arXiv:2108.00951, the official code's rule for Top-k.

    Examples:
        >>> kept(0.01, 1050), kept(0.01, 7), kept(0.01, 0)
        (10, 1, 0)
    """
    return min(numel, max(1, int(density * numel)))
