"""What a GPU backend is handed, on a machine without a GPU: arrays that claim to be on a device, solved by NumPy."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest

import cuflash
from cuflash import arrays, dispatch
from cuflash.backends import numpy_backend
from cuflash.problem import Problem, View
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

    def __init__(self) -> None:
        self.copied: list[DeviceArray] = []
        self.freed_on: list[int] = []  # the device that was current when a workspace was freed

    def fingerprint(self, array: DeviceArray):
        return HOST.fingerprint(array.host)

    def pointer(self, array: DeviceArray) -> int:
        return HOST.pointer(array.host)

    def view(self, array: DeviceArray) -> View:
        view = HOST.view(array.host)
        view.device = ("cuda", DEVICE)
        return view

    def is_addressable(self, array: DeviceArray) -> bool:
        return HOST.is_addressable(array.host)

    def is_writable(self, array: DeviceArray) -> bool:
        return HOST.is_writable(array.host)

    def empty(self, shape, dtype, device_index) -> DeviceArray:
        assert device_index == self.current_device == DEVICE
        array = HOST.empty(shape, dtype, device_index)
        array.fill(np.nan)
        return DeviceArray(array)

    def workspace(self, floats: int, device_index: int) -> tuple[int, DeviceArray]:
        pointer, array = super().workspace(floats, device_index)
        weakref.finalize(array, lambda: self.freed_on.append(self.current_device))
        return pointer, array

    def packed(self, array: DeviceArray) -> DeviceArray:
        self.copied.append(array)
        return DeviceArray(HOST.packed(array.host))

    @contextmanager
    def on_device(self, device_index: int):
        self.current_device, before = device_index, self.current_device
        try:
            yield
        finally:
            self.current_device = before

    def stream(self, device_index: int) -> int:
        assert device_index == self.current_device
        return STREAM


class LentArray(DeviceArray):
    """The same of another library, which may take its memory back when nothing here holds it any more."""


class Lender(arrays.Adapter):
    kind = "lent"

    def __init__(self, native: DeviceAdapter) -> None:
        self._native = native
        self.held: list[tuple[dict[str, DeviceArray], int]] = []  # and how many copies had been begun

    @property
    def native(self) -> DeviceAdapter:
        return self._native

    def borrow(self, name: str, array: LentArray) -> DeviceArray:
        return DeviceArray(array.host)

    def hold(self, arrays: dict[str, DeviceArray]) -> None:
        self.held.append((arrays, len(self.native.copied)))


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
    """`cuda_backend` by contract, solved by `numpy_backend`; remembers its calls, and for what it was bound."""

    DTYPES = ("float16", "bfloat16")

    def __init__(self) -> None:
        self.calls, self.bound = [], []

    def bind(self, direction, problem, device_index, views, stream) -> HostLaunch:
        assert (device_index, stream) == (DEVICE, STREAM)
        assert {view.device for view in views.values()} == {("cuda", DEVICE)}
        self.bound.append((direction, tuple(views)))
        return HostLaunch(direction, problem, views, self.calls)


@dataclass
class HostLaunch:
    """`cuflash.cuda.launch.BoundLaunch` by contract."""

    direction: str
    problem: Problem
    views: dict[str, View]
    calls: list
    workspace_floats: int = 15

    def __call__(self, pointers, workspace, dropout, stream) -> None:
        assert stream == STREAM and set(pointers) == set(self.views)
        probe = array_at(View(workspace, (self.workspace_floats,), (1,), "float32"))
        probe[:] = 0
        problem = self.problem if dropout is None else self.problem.with_seed(dropout.seed, dropout.offset)
        views = {name: replace(view, pointer=pointers[name]) for name, view in self.views.items()}
        self.calls.append((problem, views))
        operands = {name: array_at(view) for name, view in views.items()}
        if self.direction == "forward":
            given_lse = operands.pop("lse", None)
            _, lse = numpy_backend.forward(problem, **operands)
            if given_lse is not None:
                given_lse[:] = lse
            return
        results = {name: operands.pop(name) for name in ("dq", "dk", "dv", "dsinks") if name in operands}
        gradients = dict(zip(("dq", "dk", "dv", "dsinks"), numpy_backend.backward(problem, **operands), strict=True))
        for name, result in results.items():
            result[:] = gradients[name]


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(arrays._BY_TYPE, DeviceArray, DeviceAdapter())
    monkeypatch.setattr(dispatch, "_prepared", {})
    monkeypatch.setattr(dispatch, "cuda_backend", HostBackend())
    return dispatch.cuda_backend


@pytest.fixture
def lender(backend, monkeypatch):
    lender = Lender(arrays.adapter_of(DeviceArray(np.empty(0))))
    monkeypatch.setitem(arrays._BY_TYPE, LentArray, lender)
    return lender


def normal(*shape: int, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def on_device(operands: dict[str, object]) -> dict[str, object]:
    return {name: DeviceArray(value) if isinstance(value, np.ndarray) else value for name, value in operands.items()}


def fails(*_: object) -> None:
    raise MemoryError


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


def test_a_kind_of_call_is_bound_once_for_each_set_of_results(backend):
    operands = on_device(CALLS["plain"])
    inputs = ("q", "k", "v")
    for _ in range(2):
        out, lse = cuflash.attention(**operands, return_lse=True)
        cuflash.attention(**operands)
        for dlse in (None, DeviceArray(np.ones_like(lse.host))):
            cuflash.attention_backward(out, *operands.values(), out, lse, dlse=dlse)
    assert [(direction, set(names)) for direction, names in backend.bound] == [
        ("forward", {*inputs, "out", "lse"}),
        ("forward", {*inputs, "out"}),
        ("backward", {*inputs, "out", "lse", "dout", "dq", "dk", "dv"}),
        ("backward", {*inputs, "out", "lse", "dout", "dq", "dk", "dv", "dlse"}),
    ]
    assert len(backend.calls) == 8


def test_a_bound_call_brings_its_own_addresses(backend):
    for seed in (0, 1):
        arrays = {name: normal(2, 33, 4, 16, seed=seed + place) for place, name in enumerate("qkv")}
        out = cuflash.attention(**on_device(arrays))
        np.testing.assert_array_equal(out.host, cuflash.attention(**arrays))
    assert len(backend.bound) == 1


SQUARE = {name: normal(2, 16, 16, 16, seed=place) for place, name in enumerate("qkv")}
SWAPPED = {name: array.swapaxes(1, 2) for name, array in SQUARE.items()}
OF_ONE_SHAPE = {
    "plain": SQUARE,
    "strides": SQUARE | {"k": SWAPPED["k"]},
    "alignment": SQUARE | {"k": normal(2 * 16**3 + 1)[1:].reshape(2, 16, 16, 16)},
    "dtype": {name: array.astype(numpy_dtype("bfloat16")) for name, array in SQUARE.items()},
    "layout": SQUARE | {"layout": "bhsd"},
    "the same problem with results of another layout": SWAPPED,
    "window": SQUARE | {"window_size": (3, 0)},
    "another window": SQUARE | {"window_size": (4, 0)},
    "mask": SQUARE | {"causal": True},
    "another mask": SQUARE | {"causal": "top_left"},
}


def test_calls_of_one_shape_are_told_apart(backend):
    for _ in range(2):
        for operands in OF_ONE_SHAPE.values():
            out = cuflash.attention(**on_device(operands))
            np.testing.assert_array_equal(out.host, cuflash.attention(**operands))
    assert len(backend.bound) == len(OF_ONE_SHAPE)


def test_out_is_checked_at_every_call(backend):
    """Where it lies beside other operands, and whether it may be written, no key knows."""
    memory = normal(4, 2, 33, 4, 16)
    q, k, v, out = map(DeviceArray, memory)
    cuflash.attention(q, k, v, out=out)
    with pytest.raises(ValueError, match="^out overlaps k; only out=q itself"):
        cuflash.attention(q, k, v, out=k)
    with pytest.raises(ValueError, match="^out overlaps q; vjp reads it again"):
        cuflash.vjp(q, k, v, out=q)
    out.host.flags.writeable = False
    with pytest.raises(ValueError, match="^out is read-only"):
        cuflash.attention(q, k, v, out=out)
    assert len(backend.calls) == 1
    assert cuflash.attention(q, k, v, out=q) is q


def test_dropout_brings_the_seed_of_the_call(backend):
    operands = on_device(CALLS["plain"])
    for seed in (5, 6):
        cuflash.attention(**operands, dropout_p=0.5, seed=seed, offset=seed)
    (first, _), (second, _) = backend.calls
    assert (first.dropout.seed, second.dropout.seed, second.dropout.offset) == (5, 6, 6)
    assert first.without_seed() == second.without_seed()


def test_out_is_written_in_place(backend):
    operands = on_device(CALLS["plain"])
    out = DeviceArray(np.full((2, 33, 4, 24), np.nan, np.float16))
    assert cuflash.attention(**operands, out=out) is out
    np.testing.assert_array_equal(out.host, cuflash.attention(**CALLS["plain"]))
    problem, views = backend.calls[0]
    assert views["out"].pointer == out.host.ctypes.data and problem.out.shape == (2, 33, 4, 24)


def test_a_workspace_is_freed_while_its_device_is_current(backend, monkeypatch):
    """An asynchronous pool frees on a stream of the current device."""
    adapter, operands = arrays.adapter_of(DeviceArray(np.empty(0))), on_device(CALLS["plain"])
    cuflash.attention(**operands)
    assert adapter.freed_on == [DEVICE]
    monkeypatch.setattr(HostLaunch, "__call__", fails)
    with pytest.raises(MemoryError):
        cuflash.attention(**operands)
    assert adapter.freed_on == [DEVICE, DEVICE]


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


def test_lent_memory_is_held_while_it_is_copied(lender):
    """The kernels of a pass read the copies, but those that copy still read the lender's memory."""
    operands = CALLS["strided"]
    cuflash.attention(**{name: LentArray(array) for name, array in operands.items()})
    (originals, copies_begun), (read, _) = lender.held
    assert copies_begun == len(lender.native.copied) == 1
    assert all(originals[name].host is operands[name] for name in "qkv")
    assert [read[name].host is operands[name] for name in "qkv"] == [True, False, True]


def test_lent_memory_is_held_where_a_copy_or_a_launch_fails(lender, monkeypatch):
    """What was launched before may still run."""
    operands = {name: LentArray(array) for name, array in CALLS["strided"].items()}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(HostLaunch, "__call__", fails)
        cuflash.attention(**operands)
    assert len(lender.held) == 2
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(DeviceAdapter, "packed", fails)
        cuflash.attention(**operands)
    assert len(lender.held) == 3
