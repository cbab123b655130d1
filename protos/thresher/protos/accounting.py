"""What a run would have moved without compression, and how much less it moved (docs/accounting.md)."""

from typing import Final

_FLOAT32_BYTES: Final = 4


def dense_bytes(pushable_elements: int) -> int:
    """Return the bytes of the same pushes and updates as dense float32, both directions, without framing.

    Args:
        pushable_elements: Elements that could have been pushed: steps times size, over all workers and slices.
    """
    return 2 * _FLOAT32_BYTES * pushable_elements


def compression_ratio(pushable_elements: int, moved_bytes: int) -> float:
    """Return `dense_bytes` over ``moved_bytes``, both directions; 1 before anything has moved.

    >>> compression_ratio(1000, 80)
    100.0
    """
    return dense_bytes(pushable_elements) / moved_bytes if moved_bytes else 1.0
