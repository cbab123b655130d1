"""Every error Thresher raises, in one tree.

A foreign exception (gRPC, safetensors, OS) is translated at the edge where it enters and never leaks further.
Each message says what was wrong, where, and what to do about it.
"""


class ThresherError(Exception):
    """The root: ``except ThresherError`` catches everything this library raises on purpose."""


class ConfigurationError(ThresherError, ValueError):
    """A setting is out of its range, or two settings contradict each other. Nothing has been started or sent."""


class FrameError(ThresherError, ValueError):
    """A byte string is not a valid frame: truncated, corrupt, out of bounds, or made for another model."""


class LayoutError(ThresherError, ValueError):
    """A model cannot be laid out, or its layout differs from the one that is registered (the difference is listed)."""


class OptimizerError(ThresherError, ValueError):
    """An optimizer the shards do not apply, or hyper-parameters they cannot follow."""


class NonFiniteGradientError(ThresherError, ArithmeticError):
    """A gradient holds NaN or infinity. The step was refused before anything was sent."""


class ProtocolError(ThresherError, RuntimeError):
    """The other side broke the protocol, or this side was used in an order that is not allowed."""


class ConnectionTimeoutError(ThresherError, TimeoutError):
    """A shard could not be reached before the deadline; the message names it and its address."""


class RoundFailedError(ThresherError, RuntimeError):
    """A round could not be closed; the message names the workers or the shard that are missing."""


class FencedError(ThresherError, RuntimeError):
    """Another life of this worker has taken its place; this one has no say any more."""


class BehindError(ThresherError, RuntimeError):
    """What a worker lacks is behind the cut of the shard's log: it needs a snapshot."""


class LostHistoryError(ThresherError, RuntimeError):
    """A shard has lost what a worker was told; the worker's replica may replace it."""


class DataLossError(ThresherError, RuntimeError):
    """Something that was kept is damaged or gone, and nothing here can replace it; the message says what, and where."""


class JournalError(ThresherError, OSError):
    """A journal's folder cannot be used, or something could not be written to it; what was written before is whole."""


class AccessDeniedError(ThresherError, PermissionError):
    """A shard does not know the caller, or does not let it do this; the message says what to configure."""


class BusyError(ThresherError, RuntimeError):
    """A shard does for somebody else what it does for one caller at a time; ask again in a moment."""


class RegistrationError(ThresherError, RuntimeError):
    """A shard refused this worker: another model, another optimizer, a rank that is taken."""


def error_named(name: str, message: str) -> ThresherError:
    """Return the error that the other side raised, as far as its name is one of ours; the message is kept.

    >>> error_named("LayoutError", "conv.weight is missing")
    LayoutError('conv.weight is missing')
    """
    known = {cls.__name__: cls for cls in ThresherError.__subclasses__()}
    return known.get(name, ProtocolError)(message)
