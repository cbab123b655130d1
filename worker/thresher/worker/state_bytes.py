"""A worker's state as bytes: a skeleton in JSON, and behind it, in its order, the bytes of the tensors."""

import json
import os
import struct
from collections import Counter, OrderedDict
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from thresher.protos.errors import ConfigurationError

_LENGTH: Final = struct.Struct("<Q")
_FLOAT: Final = struct.Struct("<d")
_DTYPES: Final = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

# A Counter answers for keys that it lacks, which MultiStepLR relies on. Other kinds of dicts do more than that.
_DICTS: Final[dict[type, str]] = {dict: "dict", OrderedDict: "dict", Counter: "counter"}


def encode(state: dict[str, Any]) -> list[memoryview]:
    """Return ``state`` as a row of buffers; those of tensors on the CPU are the tensors' own.

    Raises:
        ConfigurationError: a value in ``state`` cannot be kept; the message says where it is.
    """
    buffers: list[memoryview] = []
    skeleton = json.dumps(_skeleton(state, "", buffers), separators=(",", ":")).encode()
    return [memoryview(_LENGTH.pack(len(skeleton))), memoryview(skeleton), *buffers]


def _skeleton(value: object, at: str, buffers: list[memoryview]) -> object:
    """``value`` as JSON with the lengths of its tensors and bytes, whose content is added to ``buffers`` in order."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return {"float": _FLOAT.pack(value).hex()}  # JSON knows no NaN
        case bytes():
            buffers.append(memoryview(value))
            return {"bytes": len(value)}
        case Tensor() if value.layout is torch.strided and not value.is_meta and not value.is_quantized:
            buffers.append(_bytes_of(value.detach().cpu().resolve_conj().resolve_neg().contiguous()))
            return {"tensor": [str(value.dtype), list(value.shape)]}
        case list() | tuple():
            items = [_skeleton(item, f"{at}[{number}]", buffers) for number, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        case dict() if type(value) in _DICTS and all(isinstance(key, str | int) for key in value):
            items = [[key, _skeleton(item, _path(at, key), buffers)] for key, item in value.items()]
            return {_DICTS[type(value)]: items}
    kind = "dict whose keys are not all str or int" if type(value) in _DICTS else type(value).__name__
    raise ConfigurationError(
        f"{at or 'the state'}: a {kind} cannot be kept; keep its state_dict(), or dense tensors, bytes, numbers and "
        "str, in lists, tuples and plain dicts: dict() makes one of another kind"
    )


def _path(at: str, key: str | int) -> str:
    return f"{at}[{key}]" if isinstance(key, int) else f"{at}.{key}".lstrip(".")


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def decode(fd: int, offset: int) -> dict[str, Any]:
    """Read what `encode` returned from a file.

    Raises:
        OSError: it cannot be read, or ends too soon.
    """
    reader = _Reader(fd, offset)
    (length,) = _LENGTH.unpack(reader.take(_LENGTH.size))
    return cast("dict[str, Any]", reader.value(json.loads(reader.take(length))))


@final
class _Reader:
    """Reads a half from its front to its end, in the order in which `_skeleton` met its values."""

    def __init__(self, fd: int, offset: int) -> None:
        self._fd, self._offset = fd, offset

    def value(self, skeleton: object) -> object:
        match skeleton:
            case list():
                return [self.value(item) for item in skeleton]
            case {"tuple": items}:
                return tuple(self.value(item) for item in items)
            case {"dict": pairs}:
                return {key: self.value(item) for key, item in pairs}
            case {"counter": pairs}:
                return Counter({key: self.value(item) for key, item in pairs})
            case {"float": digits}:
                return _FLOAT.unpack(bytes.fromhex(digits))[0]
            case {"bytes": length}:
                return bytes(self.take(length))
            case {"tensor": [dtype, shape]}:
                tensor = torch.empty(shape, dtype=_DTYPES[dtype])
                self._fill(_bytes_of(tensor))
                return tensor
        return skeleton

    def take(self, length: int) -> bytearray:
        data = bytearray(length)
        self._fill(memoryview(data))
        return data

    def _fill(self, data: memoryview) -> None:
        while data:
            count = os.preadv(self._fd, [data], self._offset)
            if not count:
                raise OSError(0, "became shorter while it was open")
            data, self._offset = data[count:], self._offset + count
