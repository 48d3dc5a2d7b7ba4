"""Kinds of arrays: which are taken, which are refused, and that none is copied or imported in vain."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash.arrays import (
    CupyAdapter,
    DlpackAdapter,
    DlpackDeviceAdapter,
    NumpyAdapter,
    adapter_of,
    common_adapter,
    the,
)

ROOT = Path(__file__).resolve().parents[2]


class Exchangeable:
    """An array of an unknown library, with nothing but DLPack."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_adapters_are_found_by_type():
    array = normal(2, 3)
    assert adapter_of(array) is the(NumpyAdapter)
    assert adapter_of(Exchangeable(array)) is the(DlpackAdapter)
    assert common_adapter({"q": array, "k": array}) is the(NumpyAdapter)


def test_a_view_of_numpy_memory():
    array = normal(4, 6, 8, 10)[1:, ::-2]
    view = the(NumpyAdapter).view(array)
    assert view.pointer == array.ctypes.data
    assert (view.shape, view.strides, view.dtype, view.device) == (
        (3, 3, 8, 10),
        (480, -160, 10, 1),
        "float32",
        ("cpu", 0),
    )
    assert the(NumpyAdapter).view(array.astype(ml_dtypes.bfloat16)).dtype == "bfloat16"


def test_new_arrays():
    adapter = the(NumpyAdapter)
    array = adapter.empty((2, 3), "bfloat16", 0)
    assert array.dtype == ml_dtypes.bfloat16 and array.shape == (2, 3) and array.flags.c_contiguous
    pointer, array = adapter.workspace(5, 0)
    assert pointer == array.ctypes.data and array.nbytes == 20


def test_a_fingerprint_holds_what_checks_depend_on():
    adapter, array = the(NumpyAdapter), normal(4, 8)
    aligned = adapter.fingerprint(array)
    assert aligned == adapter.fingerprint(array[:])
    others = [
        array[:, 1:],
        array[:2],
        array[:, ::2],
        array.astype(np.float64),
        array.astype(">f4"),
        array.ravel()[1:].reshape(-1),
    ]
    assert aligned not in [adapter.fingerprint(other) for other in others]


@pytest.mark.parametrize(
    ("q", "message"),
    [
        ([[1.0]], "q is a list; attention takes NumPy, CuPy, PyTorch or JAX arrays, or objects with __dlpack__"),
        (
            np.float32(1),
            "q is a numpy.float32; attention takes NumPy, CuPy, PyTorch or JAX arrays, or objects with __dlpack__",
        ),
        (None, "q is a NoneType; attention takes NumPy, CuPy, PyTorch or JAX arrays, or objects with __dlpack__"),
        (
            np.ma.ones((1, 2, 1, 8)),
            "q is a numpy.ma.MaskedArray, whose own rules would be ignored; attention takes plain numpy.ndarray",
        ),
        (
            np.ones((1, 1)).view(np.matrix),
            "q is a numpy.matrix, whose own rules would be ignored; attention takes plain numpy.ndarray",
        ),
        (
            normal(1, 2, 1, 8).astype(">f4"),
            "q is byte-swapped float32; attention takes float16, bfloat16, float32, float64",
        ),
        (normal(1, 2, 1, 8).astype(complex), "q is complex128; attention takes float16, bfloat16, float32, float64"),
        (np.array([[[["text"]]]], object), "q is object; attention takes float16, bfloat16, float32, float64"),
        (np.zeros((1, 2, 1, 8), "V0"), "q is void; attention takes float16, bfloat16, float32, float64"),
    ],
)
def test_arrays_that_are_refused(q, message):
    with pytest.raises(TypeError) as raised:
        cuflash.attention(q, q, q)
    assert str(raised.value) == message


def test_kinds_may_not_be_mixed():
    array = normal(1, 2, 1, 8)
    with pytest.raises(TypeError, match=r"^v is a test_arrays.Exchangeable; it must be q's kind, numpy.ndarray$"):
        cuflash.attention(array, array, Exchangeable(array))
    with pytest.raises(TypeError, match="^k is a tuple; attention takes"):
        cuflash.attention(array, (1, 2), array)


def test_memory_mapped_files_are_arrays(tmp_path):
    array = np.memmap(tmp_path / "q", np.float32, "w+", shape=(1, 5, 1, 8))
    array[:] = normal(1, 5, 1, 8)
    out = cuflash.attention(array, np.asarray(array), array)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, cuflash.attention(*3 * [normal(1, 5, 1, 8)]))


def test_anything_with_dlpack():
    arrays = [normal(2, 5, 4, 16), normal(2, 7, 2, 16), normal(2, 7, 2, 8)]
    expected, expected_lse = cuflash.attention(*arrays, return_lse=True)
    out, lse = cuflash.attention(*map(Exchangeable, arrays), return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    written = np.full_like(expected, np.nan)
    given = Exchangeable(written)
    assert cuflash.attention(*map(Exchangeable, arrays), out=given) is given
    np.testing.assert_array_equal(written, expected)


def test_dlpack_objects_that_cannot_be_read():
    q = normal(1, 2, 1, 8)
    with pytest.raises(TypeError, match="^q is on DLPack device type 10; attention runs on a CPU or a CUDA GPU$"):
        cuflash.attention(*3 * [Exchangeable(q, device=(10, 0))])
    with pytest.raises(ValueError, match="^k is on another device; it must be on q's cpu$"):
        cuflash.attention(Exchangeable(q), Exchangeable(q, device=(2, 0)), Exchangeable(q))
    with pytest.raises(TypeError, match="^q cannot be read through DLPack: "):
        cuflash.attention(*3 * [Exchangeable(q.astype(ml_dtypes.bfloat16))])


def test_results_return_through_the_array_namespace():
    class Strict(Exchangeable):
        def __array_namespace__(self):
            return Strict

        @staticmethod
        def from_dlpack(array: np.ndarray) -> Strict:
            return Strict(array)

    q = normal(1, 5, 1, 8)
    out = cuflash.attention(*3 * [Strict(q)])
    assert type(out) is Strict
    np.testing.assert_array_equal(out.array, cuflash.attention(q, q, q))


def test_frameworks_are_imported_only_by_their_arrays():
    program = """
import sys, numpy as np, cuflash
q = np.ones((1, 3, 2, 4), np.float32)
out, pullback = cuflash.vjp(q, q, q)
pullback(out)
cuflash.supports(), cuflash.explain(q, q, q), cuflash.warmup(q, q, q)
assert not {"cupy", "torch", "jax"} & set(sys.modules), set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_threads_drop_held_arrays_only_when_their_kernels_have_run(monkeypatch):
    """Another thread comes in the middle: it finds the first event done as well, and drops what belongs to it."""

    class Done:
        def __init__(self) -> None:
            self.other = threading.Thread(target=adapter.hold, args=(operands,))

        @property
        def done(self) -> bool:
            if self.other.ident is None:
                self.other.start()
                self.other.join(timeout=0.2)
            return True

    adapter, operands = DlpackDeviceAdapter(), {"q": SimpleNamespace(data=SimpleNamespace(device_id=0))}
    running = SimpleNamespace(done=False)
    events = iter([done := Done(), running, running, running])
    stream = SimpleNamespace(record=lambda: next(events))
    cuda = SimpleNamespace(Device=nullcontext, get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    for _ in range(3):
        adapter.hold(operands)
    done.other.join(timeout=10)
    assert [event for event, _ in adapter._in_flight] == [running, running, running]


@pytest.mark.gpu
def test_cupy_arrays():
    import cupy

    array = cupy.asarray(normal(4, 6, 8, 10, dtype="float16"))[1:, ::-2]
    adapter = adapter_of(array)
    assert adapter is the(CupyAdapter)
    view = adapter.view(array)
    assert (view.shape, view.strides, view.dtype, view.device) == (
        (3, 3, 8, 10),
        (480, -160, 10, 1),
        "float16",
        ("cuda", 0),
    )
    assert view.pointer == array.data.ptr and adapter.pointer(array) == array.data.ptr
    assert adapter.empty((2, 3), "bfloat16", 0).dtype == ml_dtypes.bfloat16
    pointer, memory = adapter.workspace(5, 0)
    assert pointer == memory.ptr and memory.mem.size >= 20
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert adapter.stream(0) == stream.ptr


@pytest.mark.gpu
def test_devices_and_kinds_may_not_be_mixed():
    import cupy

    host = normal(1, 2, 1, 8, dtype="float16")
    with pytest.raises(TypeError, match=r"^k is a numpy.ndarray; it must be q's kind, cupy"):
        cuflash.attention(cupy.asarray(host), host, host)
    if cupy.cuda.runtime.getDeviceCount() > 1:
        with cupy.cuda.Device(1):
            other = cupy.asarray(host)
        with pytest.raises(ValueError, match="^k is on cuda:1; it must be on q's cuda:0$"):
            cuflash.attention(cupy.asarray(host), other, other)
