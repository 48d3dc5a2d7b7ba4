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


_Buffer = ctypes.c_char * (BYTES + ALIGNMENT)


class Encoder:
    """Describes canonical (batch, seqlen, heads, head_dim) arrays that differ in their address alone.

    Boxes are of 64 columns by ``rows`` rows. Columns and rows past the array read as zeros and are not written.
    Addresses and strides are multiples of 16 bytes.
    """

    def __init__(self, view: View, rows: int) -> None:
        batch, seqlen, heads, head_dim = view.shape
        batch_stride, row_stride, head_stride, _ = view.strides
        self._sizes = (head_dim, seqlen, heads, batch)
        # The driver checks the stride of an axis of size one too, although it is never used.
        self._strides = [
            ITEMSIZE * (stride if size > 1 else CHUNK_COLUMNS)
            for size, stride in ((seqlen, row_stride), (heads, head_stride), (batch, batch_stride))
        ]
        self._data_type = DATA_TYPES[view.dtype]
        self._behind_address = (
            (ctypes.c_uint64 * 4)(*self._sizes),
            (ctypes.c_uint64 * 3)(*self._strides),
            (ctypes.c_uint32 * 4)(CHUNK_COLUMNS, rows, 1, 1),
            (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            NO_INTERLEAVE,
            SWIZZLE_128B,
            PROMOTE_L2_128B,
            ZERO_FILL,
        )

    def encode(self, pointer: int) -> bytes:
        """Return the map of the array at an address."""
        raw = _Buffer()
        address = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        status = _encode_tiled()(address, self._data_type, 4, pointer, *self._behind_address)
        if status != 0:
            asked = f"sizes {self._sizes}, strides {self._strides} in bytes, address {pointer:#x}"
            raise RuntimeError(f"cuTensorMapEncodeTiled returned {status} for {asked}")
        return ctypes.string_at(address, BYTES)


@functools.cache
def _encode_tiled():
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, integer, ctypes.c_uint32, pointer, *[pointer] * 4, *[integer] * 4]
    function.restype = integer
    return function
