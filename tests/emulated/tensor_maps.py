"""Tensor maps for the twin: the driver's encoder, with its rules, writing bytes that copy_engine.h reads."""

from __future__ import annotations

import ctypes

from cuflash.cuda import tensor_map

SUCCESS, INVALID_VALUE = 0, 1
MARK = int.from_bytes(b"twin-map", "little")
MAX_BOX = 256
MAX_SIZE = 1 << 32
MAX_STRIDE = 1 << 40
COPY_BYTES = 16


class TwinMap(ctypes.Structure):
    """Mirrors `twin::Map`."""

    _fields_ = [
        ("mark", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 4),
        ("strides", ctypes.c_uint64 * 3),
        ("box_rows", ctypes.c_uint64),
    ]


def encode_tiled(
    target: int, data_type: int, rank: int, base: int, sizes: ctypes.Array, strides: ctypes.Array, box: ctypes.Array,
    element_strides: ctypes.Array, interleave: int, swizzle: int, promotion: int, fill: int,
) -> int:  # fmt: skip
    """What ``cuTensorMapEncodeTiled`` is to the driver; only the maps that the library makes."""
    sizes, strides, box = list(sizes), list(strides), list(box)
    is_valid = (
        target % tensor_map.ALIGNMENT == 0
        and data_type in tensor_map.DATA_TYPES.values()
        and rank == len(sizes) == len(box) == len(strides) + 1 == 4
        and base % COPY_BYTES == 0
        and all(0 < size <= MAX_SIZE for size in sizes)
        and all(0 < stride < MAX_STRIDE and stride % COPY_BYTES == 0 for stride in strides)
        and all(0 < extent <= MAX_BOX for extent in box)
    )
    is_ours = (
        box[0] == tensor_map.CHUNK_COLUMNS
        and box[2:] == [1, 1]
        and list(element_strides) == [1, 1, 1, 1]
        and (interleave, swizzle, fill) == (tensor_map.NO_INTERLEAVE, tensor_map.SWIZZLE_128B, tensor_map.ZERO_FILL)
    )
    if not is_valid:
        return INVALID_VALUE
    assert is_ours, "the twin's copy engine knows boxes of 64 swizzled columns only"
    encoded = TwinMap(MARK, base, tuple(sizes), tuple(strides), box[1])
    ctypes.memset(target, 0, tensor_map.BYTES)
    ctypes.memmove(target, ctypes.addressof(encoded), ctypes.sizeof(encoded))
    return SUCCESS
