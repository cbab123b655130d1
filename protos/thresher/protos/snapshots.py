"""State as one safetensors file: what seeds a shard, what a snapshot returns, what a leaving worker hands over."""

from collections.abc import Mapping
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from thresher.protos.errors import FrameError
from thresher.protos.layout import Layout

_UNTRAINED: Final = "untrained."
_ELEMENT_BYTES: Final = 16  # of the largest dtype, complex128
_STATES_PER_PARAMETER: Final = 4  # Adam with amsgrad has three, and one for the parameter itself
_HEADER_BYTES_PER_TENSOR: Final = 1024


def pack_state(state: Mapping[str, Tensor], untrained: Mapping[str, Tensor]) -> bytes:
    """Write a replica's state (as `Replica.state` names it) and untrained tensors by name."""
    named = {**state, **{_UNTRAINED + name: value for name, value in untrained.items()}}
    # Clones, because buffers may share memory, and safetensors refuses those.
    return save(
        {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in named.items()}
    )


def unpack_state(data: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read what `pack_state` wrote: state and untrained tensors.

    Raises:
        FrameError: when it is not a safetensors file.
    """
    try:
        named = load(data)
    except SafetensorError as error:
        raise FrameError(f"not a safetensors file: {error}") from error
    untrained = {name.removeprefix(_UNTRAINED): value for name, value in named.items() if name.startswith(_UNTRAINED)}
    return {name: value for name, value in named.items() if not name.startswith(_UNTRAINED)}, untrained


def state_bytes_bound(layout: Layout, numel: int) -> int:
    """Return a size that no honest state of a slice of ``numel`` elements exceeds: a longer one is refused unread."""
    tensors = len(layout.trained) * _STATES_PER_PARAMETER + len(layout.untrained) + 1
    elements = numel * _STATES_PER_PARAMETER + sum(spec.numel for spec in layout.untrained)
    return elements * _ELEMENT_BYTES + tensors * _HEADER_BYTES_PER_TENSOR
