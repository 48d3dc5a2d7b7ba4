"""What a GPU backend is handed, on a machine without a GPU: arrays that claim to be on a device, solved by NumPy."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

import cuflash
from cuflash import arrays, dispatch
from cuflash.backends import numpy_backend
from cuflash.problem import View
from cuflash.testing import numpy_dtype

DEVICE, STREAM = 3, 0xABC


class DeviceArray:
    """Host memory that claims to be on a GPU."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host


HOST = arrays.NumpyAdapter()


class DeviceAdapter(arrays.Adapter):
    kind = "pretended"
    current_device = 0

    def fingerprint(self, array: DeviceArray):
        return HOST.fingerprint(array.host)

    def pointer(self, array: DeviceArray) -> int:
        return HOST.pointer(array.host)

    def view(self, array: DeviceArray) -> View:
        view = HOST.view(array.host)
        view.device, view.owner = ("cuda", DEVICE), array
        return view

    def is_addressable(self, array: DeviceArray) -> bool:
        return HOST.is_addressable(array.host)

    def is_writable(self, array: DeviceArray) -> bool:
        return HOST.is_writable(array.host)

    def empty(self, shape, dtype, device_index) -> View:
        assert device_index == self.current_device == DEVICE
        view = HOST.empty(shape, dtype, device_index)
        if dtype != "int32":
            view.owner.fill(np.nan)
        view.device, view.owner = ("cuda", DEVICE), DeviceArray(view.owner)
        return view

    def packed(self, array: DeviceArray) -> DeviceArray:
        return DeviceArray(HOST.packed(array.host))

    @contextmanager
    def on_device(self, device_index: int):
        self.current_device, before = device_index, self.current_device
        yield
        self.current_device = before

    def stream(self, device_index: int) -> int:
        assert device_index == self.current_device
        return STREAM


class Memory:
    """Carries ``__array_interface__``."""


def array_at(view: View) -> np.ndarray:
    """The memory that a view points to, through its pointer alone."""
    memory, dtype = Memory(), numpy_dtype(view.dtype)
    strides = tuple(stride * dtype.itemsize for stride in view.strides)
    memory.__array_interface__ = {
        "version": 3,
        "data": (view.pointer, False),
        "shape": view.shape,
        "strides": strides,
        "typestr": f"|V{dtype.itemsize}",
    }
    return np.asarray(memory).view(dtype)


class HostBackend:
    """`cuda_backend` by contract, solved by `numpy_backend`; remembers its calls."""

    DTYPES = ("float16", "bfloat16")

    def __init__(self) -> None:
        self.calls = []

    def forward(self, problem, device_index, views, stream, allocate) -> None:
        operands = self._operands(problem, device_index, views, stream, allocate)
        lse = operands.pop("lse", None)
        _, actual = numpy_backend.forward(problem, **operands)
        if lse is not None:
            lse[:] = actual

    def backward(self, problem, device_index, views, stream, allocate) -> None:
        operands = self._operands(problem, device_index, views, stream, allocate)
        results = {name: operands.pop(name) for name in ("dq", "dk", "dv", "dsinks") if name in operands}
        for name, gradient in zip(
            ("dq", "dk", "dv", "dsinks"), numpy_backend.backward(problem, **operands), strict=True
        ):
            if gradient is not None:
                results[name][:] = gradient

    def _operands(self, problem, device_index, views, stream, allocate) -> dict[str, np.ndarray]:
        assert (device_index, stream) == (DEVICE, STREAM)
        assert {view.device for view in views.values()} == {("cuda", DEVICE)}
        workspace = allocate((3, 5), "float32")
        assert (workspace.shape, workspace.strides, workspace.dtype) == ((3, 5), (5, 1), "float32")
        self.calls.append((problem, views))
        return {name: array_at(view) for name, view in views.items()}


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(arrays._BY_TYPE, DeviceArray, DeviceAdapter())
    monkeypatch.setattr(dispatch, "_prepared", {})
    monkeypatch.setattr(dispatch, "cuda_backend", HostBackend())
    return dispatch.cuda_backend


def normal(*shape: int, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def on_device(operands: dict[str, object]) -> dict[str, object]:
    return {name: DeviceArray(value) if isinstance(value, np.ndarray) else value for name, value in operands.items()}


CALLS = {
    "plain": {"q": normal(2, 33, 4, 16), "k": normal(2, 41, 2, 16, seed=1), "v": normal(2, 41, 2, 24, seed=2)},
    "by heads": {"q": normal(2, 4, 33, 16), "k": normal(2, 2, 41, 16), "v": normal(2, 2, 41, 24), "layout": "bhsd"},
    "strided": {
        "q": normal(2, 4, 33, 16).swapaxes(1, 2),
        "k": normal(2, 41, 2, 32)[..., ::2],
        "v": normal(2, 41, 4, 24)[:, ::-1, ::2],
    },
    "features": {
        "q": normal(2, 33, 4, 16),
        "k": normal(2, 41, 2, 16, seed=1),
        "v": normal(2, 41, 2, 24, seed=2),
        "alibi_slopes": np.broadcast_to(np.float32(0.5), (2, 4)),
        "sinks": normal(8, dtype="float32")[::2],
        "seqused_q": np.array([33, 5], np.int32),
        "seqused_k": np.array([0, 40], np.int32),
        "dropout_p": 0.5,
        "seed": 4,
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_host(backend, name):
    operands = CALLS[name]
    (expected, expected_lse), host_pullback = cuflash.vjp(**operands, return_lse=True)
    (out, lse), pullback = cuflash.vjp(**on_device(operands), return_lse=True)
    np.testing.assert_array_equal(out.host, expected)
    np.testing.assert_array_equal(lse.host, expected_lse)
    assert out.host.flags.c_contiguous

    dout, dlse = normal(*expected.shape), normal(*expected_lse.shape, dtype="float32")
    dout = dout[..., ::-1]
    gradients = pullback(DeviceArray(dout), DeviceArray(dlse))
    for actual, wanted in zip(gradients, host_pullback(dout, dlse), strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_array_equal(actual.host, wanted)


def test_views_are_canonical_and_problems_the_same_object(backend):
    for seed in (1, 2):
        cuflash.attention(**on_device(CALLS["by heads"]), causal=True, softcap=float(seed > 2))
    (first, views), (second, _) = backend.calls
    assert first is second
    assert views["q"].shape == first.q.shape == (2, 33, 4, 16) and views["q"].strides == (4 * 33 * 16, 16, 33 * 16, 1)
    assert views["out"].shape == (2, 33, 4, 24) and views["out"].strides == (4 * 33 * 24, 24, 33 * 24, 1)
    assert "lse" not in views


def test_dropout_brings_the_seed_of_the_call(backend):
    operands = on_device(CALLS["plain"])
    for seed in (5, 6):
        cuflash.attention(**operands, dropout_p=0.5, seed=seed, offset=seed)
    (first, _), (second, _) = backend.calls
    assert (first.dropout.seed, second.dropout.seed, second.dropout.offset) == (5, 6, 6)
    assert first.without_seed() is second.without_seed()


def test_out_is_written_in_place(backend):
    operands = on_device(CALLS["plain"])
    out = DeviceArray(np.full((2, 33, 4, 24), np.nan, np.float16))
    assert cuflash.attention(**operands, out=out) is out
    np.testing.assert_array_equal(out.host, cuflash.attention(**CALLS["plain"]))
    problem, views = backend.calls[0]
    assert views["out"].pointer == out.host.ctypes.data and problem.out.shape == (2, 33, 4, 24)


def test_another_alignment_is_another_problem(backend):
    memory = np.zeros(2 * 33 * 4 * 16 + 8, np.float16)
    for shift in (0, 1):
        q = memory[shift : shift + 2 * 33 * 4 * 16].reshape(2, 33, 4, 16)
        cuflash.attention(**on_device(CALLS["plain"] | {"q": q}))
    (first, _), (second, _) = backend.calls
    assert first.q.alignment >= 8 and second.q.alignment == 2


def test_dtypes_without_kernels(backend):
    operands = on_device({name: array.astype(np.float32) for name, array in CALLS["plain"].items()})
    with pytest.raises(TypeError, match="^q is float32; the cuda backend takes float16 or bfloat16$"):
        cuflash.attention(**operands)


def test_the_host_backend_takes_no_gpu_arrays(backend):
    with pytest.raises(ValueError, match="^backend is 'numpy' and q is on a GPU"):
        cuflash.attention(**on_device(CALLS["plain"]), backend="numpy")


def test_named_gpu_backends(backend):
    for name in ("cuda", "sm80", "sm90"):
        cuflash.attention(**on_device(CALLS["plain"]), backend=name)
    assert [problem.kernels for problem, _ in backend.calls] == [None, "sm80", "sm90"]
