"""Tensor maps as the driver is asked for them."""

from __future__ import annotations

import ctypes

import pytest

from cuflash.cuda import tensor_map
from cuflash.problem import View

SHAPE, POINTER = (2, 100, 8, 72), 1 << 40


class Encoder:
    """Stands for ``cuTensorMapEncodeTiled``: remembers its arguments and writes a map of one repeated byte."""

    def __init__(self) -> None:
        self.calls, self.status = [], 0

    def __call__(self, address, dtype, rank, pointer, sizes, strides, box, steps, *modes) -> int:
        arrays = [(list(array), array._type_) for array in (sizes, strides, box, steps)]
        self.calls.append((dtype, rank, pointer, arrays, modes))
        assert address % 64 == 0, "the driver writes maps to multiples of 64 bytes only"
        ctypes.memset(address, len(self.calls), 128)
        return self.status


@pytest.fixture
def encoder(monkeypatch) -> Encoder:
    fake = Encoder()
    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: fake)
    return fake


def view(strides: tuple[int, ...] | None = None, shape: tuple[int, ...] = SHAPE, dtype: str = "bfloat16") -> View:
    contiguous = View.of(shape, dtype)
    return View(POINTER, shape, strides or contiguous.strides, dtype)


def encode(view: View, rows: int) -> bytes:
    return tensor_map.Encoder(view, rows).encode(view.pointer)


def test_axes_come_innermost_first_with_strides_in_bytes(encoder):
    encode(view((60_800, 608, 76, 1)), 128)
    ((_, rank, pointer, (sizes, strides, box, steps), _),) = encoder.calls
    assert (rank, pointer) == (4, POINTER)
    assert sizes == ([72, 100, 8, 2], ctypes.c_uint64)
    assert strides == ([1216, 152, 121_600], ctypes.c_uint64), "of rows, heads and batches; columns are neighbours"
    assert box == ([64, 128, 1, 1], ctypes.c_uint32)
    assert steps == ([1, 1, 1, 1], ctypes.c_uint32)


def test_heads_before_rows(encoder):
    encode(view((57_600, 72, 7200, 1)), 64)
    assert encoder.calls[0][3][1][0] == [144, 14_400, 115_200]


@pytest.mark.parametrize("rows", [64, 112, 192])
def test_box_is_as_high_as_the_tile(encoder, rows):
    encode(view(), rows)
    assert encoder.calls[0][3][2][0] == [64, rows, 1, 1]


def test_boxes_are_swizzled_and_filled_with_zeros(encoder):
    encode(view(), 64)
    no_interleave, swizzle_128b, promote_l2_128b, zero_fill = 0, 3, 2, 0  # the enumerations of cuda.h
    assert encoder.calls[0][4] == (no_interleave, swizzle_128b, promote_l2_128b, zero_fill)


@pytest.mark.parametrize(("dtype", "number"), [("float16", 6), ("bfloat16", 9)])
def test_data_types_are_those_of_cuda(encoder, dtype, number):
    encode(view(dtype=dtype), 64)
    assert encoder.calls[0][0] == number


@pytest.mark.parametrize("stride", [0, -3, 7, 1 << 60])
def test_axes_of_size_one_have_a_stride_that_the_driver_takes(encoder, stride):
    """NumPy and others leave any number there, and the driver refuses what is no positive multiple of 16 bytes."""
    encode(view((stride, stride, stride, 1), shape=(1, 1, 1, 64)), 64)
    sizes, strides = (array for array, _ in encoder.calls[0][3][:2])
    assert sizes == [64, 1, 1, 1]
    assert all(0 < found < 1 << 40 and found % 16 == 0 for found in strides)


def test_map_is_what_the_driver_wrote(encoder):
    for number in (1, 2, 3):
        assert encode(view(), 64) == bytes([number]) * tensor_map.BYTES


def test_arrays_at_other_addresses_differ_in_nothing_else(encoder):
    same = tensor_map.Encoder(view(), 64)
    assert same.encode(1 << 20) != same.encode(1 << 30)
    first, second = encoder.calls
    assert (first[2], second[2]) == (1 << 20, 1 << 30)
    assert first[:2] + first[3:] == second[:2] + second[3:]


def test_refusal_of_the_driver_names_what_was_asked(encoder):
    encoder.status = 1
    with pytest.raises(RuntimeError, match=r"returned 1 for sizes \(72, 100, 8, 2\), strides \[1152, 144, 115200\]"):
        encode(view(), 64)


def test_driver_function_is_declared_once(monkeypatch):
    """Addresses are 64 bits wide: ctypes cuts off what it is not told."""
    loaded = []

    class Function:
        argtypes = restype = None

    class Library:
        cuTensorMapEncodeTiled = Function()  # noqa: N815

        def __init__(self, name: str) -> None:
            loaded.append(name)

    tensor_map._encode_tiled.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", Library)
    function = tensor_map._encode_tiled()
    assert tensor_map._encode_tiled() is function
    tensor_map._encode_tiled.cache_clear()
    assert loaded == ["libcuda.so.1"]
    pointers = [index for index, kind in enumerate(function.argtypes) if kind is ctypes.c_void_p]
    assert (pointers, len(function.argtypes), function.restype) == ([0, 3, 4, 5, 6, 7], 12, ctypes.c_int)
