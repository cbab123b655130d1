"""Loops that neither torch nor numpy has, compiled by numba when they are first called.

Nothing is compiled at import, and numba itself is not imported before a kernel is needed. Compiled code is kept on
disk: in the folder that NUMBA_CACHE_DIR names, else in the ``__pycache__`` beside the source, else in the user's cache
folder (``~/.cache/numba``), the first of them that can be written. Where none can, and where what is kept cannot be
read or written any more, kernels are compiled anew in each process.

A kernel is single-threaded and holds no lock, so a forked child may call what its parent has called. Several at once
are a matter of the caller's threads: kernels run without the interpreter's lock.
"""

import logging
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar, cast, final

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@final
class Kernel(Generic[Arguments, Result]):
    """A function that numba compiles at its first call; it runs without the interpreter's lock.

    It may call kernels of its own module, which are compiled into it. Call it with arguments of the same types always:
    processes that compile one kernel for different types at one time would share a file of the cache.

    Args:
        function: numpy arrays and numbers in; allocates nothing, and raises nothing.
    """

    def __init__(self, function: Callable[Arguments, Result]) -> None:
        """Keep the function; nothing is compiled yet."""
        self.function = cast("FunctionType", function)
        self._compiled: dict[str, Callable[Arguments, Result]] = {}  # one entry, made by whichever thread is the first
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        """Call the compiled function."""
        compiled = self._compiled.get("function")
        if compiled is None:
            compiled = self._compiled.setdefault("function", _compile(self.function, cached=True))
        try:
            return compiled(*arguments, **named)
        except Exception:  # noqa: BLE001  # the loop raises nothing: the cache failed, or this will be raised again
            _log.warning("%s is compiled without numba's cache", self.function.__qualname__, exc_info=True)
            compiled = self._compiled["function"] = _compile(self.function, cached=False)
            return compiled(*arguments, **named)


def kernel(function: Callable[Arguments, Result]) -> Kernel[Arguments, Result]:
    """Have ``function`` compiled when it is first called."""
    return Kernel(function)


def prefetch(vector: Any, index: Any) -> None:  # noqa: ANN401 - of any type; in a kernel, see below
    """Ask memory for ``vector[index]``, which is needed soon; in a kernel only, elsewhere nothing happens.

    The index may lie beyond the end. A loop that does more than adding up does not look far enough ahead by itself to
    keep memory busy.

    Args:
        vector: a numpy array.
        index: uint64.
    """


def _compile(function: FunctionType, *, cached: bool) -> Callable[..., Any]:
    import numba  # noqa: PLC0415  # takes a quarter of a second, and not every process calls a kernel

    linked = _link(function, numba.njit(inline="always"))
    compiled: Callable[..., Any]
    try:
        compiled = numba.njit(linked, nogil=True, cache=cached)
    except RuntimeError:  # no folder for the cache can be written
        compiled = numba.njit(linked, nogil=True)
    return compiled


def _link(function: FunctionType, inline: Callable[[FunctionType], Any]) -> FunctionType:
    """The function, with the kernels it calls as ``inline`` makes them."""
    called = {
        name: inline(_link(value.function, inline))
        for name in function.__code__.co_names
        if isinstance(value := function.__globals__.get(name), Kernel)
    }
    if function.__globals__.get(prefetch.__name__) is prefetch:
        called[prefetch.__name__] = _prefetch_instruction()
    return FunctionType(function.__code__, function.__globals__ | called, function.__name__)


@cache
def _prefetch_instruction() -> Any:  # noqa: ANN401 - numba's own
    """LLVM's prefetch, into all caches, for reading."""
    from llvmlite import ir  # noqa: PLC0415  # as numba
    from numba import types  # noqa: PLC0415
    from numba.core.cgutils import get_or_insert_function  # noqa: PLC0415
    from numba.extending import intrinsic  # noqa: PLC0415

    word, address = ir.IntType(32), ir.IntType(8).as_pointer()
    read, keep_everywhere, data = word(0), word(3), word(1)

    def instruction(_: Any, vector: Any, index: Any) -> Any:  # noqa: ANN401 - numba's types
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401 - and values
            made = context.make_array(signature.args[0])(context, builder, arguments[0])
            place = builder.bitcast(builder.gep(made.data, [arguments[1]]), address)
            kind = ir.FunctionType(ir.VoidType(), [address, word, word, word])
            function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
            builder.call(function, [place, read, keep_everywhere, data])
            return context.get_dummy_value()

        return types.void(vector, index), code

    return intrinsic(instruction)
