"""Compares tensors of a checkpoint where they lie, without loading them."""

from __future__ import annotations

from moesaic.checkpoints.safetensors_file import TensorEntry, refuse

_BLOCK_BYTES = 1 << 20


def have_same_values(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors are equal, byte for byte. Ends at the first difference. Raises CheckpointError, which names the
    file that cannot be read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        return _have_same_bytes(one, other)
    except OSError as error:
        refuse(one.file.name, f"cannot be read: {error.strerror}")


def _have_same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.first_byte)
        second.seek(other.first_byte)
        left = one.num_bytes
        while left:
            block, counterpart = first.read(min(left, _BLOCK_BYTES)), second.read(min(left, _BLOCK_BYTES))
            if not block:
                refuse(one.file.name, f"tensor {one.name} is cut off")
            if block != counterpart:
                return False
            left -= len(block)
    return True
