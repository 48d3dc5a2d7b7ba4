"""Tensor maps: how the copy engine of sm_90 finds an array. The driver encodes them, kernels take them by value."""

from __future__ import annotations

import ctypes
import functools

from cuflash.problem import View

BYTES = 128  # of CUtensorMap
ALIGNMENT = 64  # of the memory that the driver writes one to
CHUNK_COLUMNS = 64  # 128 bytes: the widest box that the 128-byte swizzle allows
ITEMSIZE = 2
DATA_TYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_L2_128B, ZERO_FILL = 0, 3, 2, 0


def encode(view: View, rows: int) -> bytes:
    """Describe a canonical (batch, seqlen, heads, head_dim) array in boxes of 64 columns by ``rows`` rows.

    Columns and rows past the array read as zeros and are not written. Address and strides are multiples of 16 bytes.
    """
    batch, seqlen, heads, head_dim = view.shape
    batch_stride, row_stride, head_stride, _ = view.strides
    sizes = (head_dim, seqlen, heads, batch)
    # The driver checks the stride of an axis of size one too, although it is never used.
    strides = [
        ITEMSIZE * (stride if size > 1 else CHUNK_COLUMNS)
        for size, stride in ((seqlen, row_stride), (heads, head_stride), (batch, batch_stride))
    ]
    raw = (ctypes.c_char * (BYTES + ALIGNMENT))()
    address = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
    status = _encode_tiled()(
        address,
        DATA_TYPES[view.dtype],
        4,
        view.pointer,
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*strides),
        (ctypes.c_uint32 * 4)(CHUNK_COLUMNS, rows, 1, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        NO_INTERLEAVE,
        SWIZZLE_128B,
        PROMOTE_L2_128B,
        ZERO_FILL,
    )
    if status != 0:
        raise RuntimeError(f"cuTensorMapEncodeTiled returned {status} for sizes {sizes}, strides {strides} in bytes")
    return ctypes.string_at(address, BYTES)


@functools.cache
def _encode_tiled():
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, integer, ctypes.c_uint32, pointer, *[pointer] * 4, *[integer] * 4]
    function.restype = integer
    return function
