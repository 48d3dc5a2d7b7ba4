"""What kind of array a caller brings: its metadata, device and stream, and new arrays of the same kind.

Three adapters are native: NumPy, CuPy and PyTorch on a GPU; backends work on their memory as it is. The others borrow:
PyTorch and JAX on the CPU become NumPy arrays, JAX on a GPU and any other object with ``__dlpack__`` become NumPy or
CuPy arrays, all without a copy, and the results go back the same way. A framework is imported only when the caller
brings one of its arrays, that is, when it is imported already.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from cuflash.problem import View

Array = Any  # of whichever library the caller uses

HERE = nullcontext()  # a device guard where nothing has to change
NUMPY_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "int32": np.dtype(np.int32),
}
KINDS = "NumPy, CuPy, PyTorch or JAX arrays, or objects with __dlpack__"


class Adapter:
    """What the library needs to know about one kind of array; subclasses answer for theirs.

    The defaults are those of a native adapter. ``native`` is the adapter whose arrays the backends see.
    """

    kind: str

    @property
    def native(self) -> Adapter:
        return self

    def placed(self, q: Array) -> Adapter:
        """Return the adapter for this array's device, where one kind of array lives on several."""
        return self

    def refuse_autograd(self, operands: Mapping[str, Array]) -> None:
        """Raise where the arrays' own library expects to differentiate a result that it does not know."""

    def is_addressable(self, array: Array) -> bool:
        """Whether every element starts at a multiple of its size."""
        return True

    def is_writable(self, array: Array) -> bool:
        return True

    def borrow(self, name: str, array: Array) -> Array:
        """Return the same memory as an array of ``native``."""
        return array

    def give(self, array: Array, like: Array) -> Array:
        """Return a result of ``native`` as the caller's kind of array."""
        return array

    def hold(self, arrays: Mapping[str, Array]) -> None:
        """Keep borrowed memory alive for as long as kernels may read it."""

    def pointer(self, array: Array) -> int:
        raise NotImplementedError

    def fingerprint(self, array: Array) -> Hashable:
        """Return all that checks and plans depend on, as cheaply as the library can tell it."""
        raise NotImplementedError

    def view(self, array: Array) -> View:
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str, device_index: int) -> Array:
        """Allocate a contiguous array of this kind from its own library's pool."""
        raise NotImplementedError

    def workspace(self, floats: int, device_index: int) -> tuple[int, object]:
        """Allocate float32 values; return their address, and the object with which they are freed."""
        array = self.empty((floats,), "float32", device_index)
        return self.pointer(array), array

    def packed(self, array: Array) -> Array:
        """Return a contiguous, aligned copy."""
        raise NotImplementedError

    def on_device(self, device_index: int) -> AbstractContextManager:
        """Make a device current, and the caller's again afterwards."""
        return HERE

    def stream(self, device_index: int) -> int:
        """Return the ``cudaStream_t`` that the caller's library uses now on a device."""
        return 0


class NumpyAdapter(Adapter):
    kind = "numpy"

    def pointer(self, array: np.ndarray) -> int:
        return array.__array_interface__["data"][0]

    def fingerprint(self, array: np.ndarray) -> Hashable:
        return array.shape, array.strides, array.dtype, array.__array_interface__["data"][0] % 16

    def view(self, array: np.ndarray) -> View:
        dtype = dtype_name(array.dtype)
        return View(self.pointer(array), array.shape, element_strides(array), dtype, ("cpu", 0))

    def is_addressable(self, array: np.ndarray) -> bool:
        return array.flags.aligned

    def is_writable(self, array: np.ndarray) -> bool:
        return array.flags.writeable

    def empty(self, shape: tuple[int, ...], dtype: str, device_index: int) -> np.ndarray:
        return np.empty(shape, NUMPY_DTYPES[dtype])

    def packed(self, array: np.ndarray) -> np.ndarray:
        return np.array(array, order="C")


class CupyAdapter(Adapter):
    kind = "cupy"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._current_device = cupy.cuda.runtime.getDevice
        self._current_stream = cupy.cuda.get_current_stream

    def pointer(self, array: Array) -> int:
        return array.data.ptr

    def fingerprint(self, array: Array) -> Hashable:
        memory = array.data
        return array.shape, array.strides, array.dtype, memory.ptr % 16, memory.device_id

    def view(self, array: Array) -> View:
        device = ("cuda", array.data.device_id)
        return View(array.data.ptr, array.shape, element_strides(array), array.dtype.name, device)

    def is_addressable(self, array: Array) -> bool:
        # Zero-size arrays have no address; CuPy makes no array off its items' grid otherwise, but its views may.
        itemsize = array.dtype.itemsize
        return array.data.ptr % itemsize == 0 and all(stride % itemsize == 0 for stride in array.strides)

    def empty(self, shape: tuple[int, ...], dtype: str, device_index: int) -> Array:
        return self._cupy.ndarray(shape, NUMPY_DTYPES[dtype])

    def workspace(self, floats: int, device_index: int) -> tuple[int, object]:
        memory = self._cupy.cuda.alloc(4 * floats)  # without an array around it, which costs five times as much
        return memory.ptr, memory

    def packed(self, array: Array) -> Array:
        with self.on_device(array.data.device_id):
            return self._cupy.array(array, order="C")

    def on_device(self, device_index: int) -> AbstractContextManager:
        return HERE if self._current_device() == device_index else self._cupy.cuda.Device(device_index)

    def stream(self, device_index: int) -> int:
        return self._current_stream().ptr


class TorchAdapter(Adapter):
    """PyTorch tensors on a GPU: metadata read directly, which costs a sixtieth of a DLPack import."""

    kind = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._dtypes = {name: getattr(torch, name) for name in NUMPY_DTYPES}
        self._names = {dtype: name for name, dtype in self._dtypes.items()}

    def placed(self, q: Array) -> Adapter:
        return self if q.is_cuda else the(TorchHostAdapter)

    def refuse_autograd(self, operands: Mapping[str, Array]) -> None:
        for name, array in operands.items():
            if array.requires_grad and self._torch.is_grad_enabled():
                raise NotImplementedError(f"{name} requires grad, which attention does not record; use cuflash.vjp")

    def pointer(self, array: Array) -> int:
        return array.data_ptr()

    def fingerprint(self, array: Array) -> Hashable:
        if array.layout is not self._torch.strided or array.is_neg():
            return array.layout, array.is_neg()
        return array.shape, array.stride(), array.dtype, array.data_ptr() % 16, array.device

    def view(self, array: Array) -> View:
        device = (array.device.type, array.device.index or 0)
        dtype = self._names.get(array.dtype, str(array.dtype).removeprefix("torch."))
        if array.layout is not self._torch.strided or array.is_neg():  # no plain memory, and no dtype of ours
            kind = "lazily negated" if array.is_neg() else str(array.layout).removeprefix("torch.")
            return View.of(tuple(array.shape), f"{kind} {dtype}", device)
        return View(array.data_ptr(), tuple(array.shape), array.stride(), dtype, device)

    def empty(self, shape: tuple[int, ...], dtype: str, device_index: int) -> Array:
        return self._torch.empty(shape, dtype=self._dtypes[dtype], device=self._device(device_index))

    def packed(self, array: Array) -> Array:
        return array.detach().clone(memory_format=self._torch.contiguous_format)

    def on_device(self, device_index: int) -> AbstractContextManager:
        cuda = self._torch.cuda
        return HERE if cuda.current_device() == device_index else cuda.device(device_index)

    def stream(self, device_index: int) -> int:
        return self._torch.cuda.current_stream(device_index).cuda_stream

    @cache  # noqa: B019 - adapters live as long as the process
    def _device(self, index: int) -> Array:
        return self._torch.device("cuda", index)


class TorchHostAdapter(TorchAdapter):
    """PyTorch tensors on the CPU: NumPy views of the same memory."""

    @property
    def native(self) -> Adapter:
        return the(NumpyAdapter)

    def borrow(self, name: str, array: Array) -> np.ndarray:
        if array.device.type != "cpu":
            raise ValueError(f"{name} is on {array.device}; it must be on q's cpu")
        if array.layout is not self._torch.strided:
            raise TypeError(f"{name} is a {array.layout} tensor; attention takes strided ones")
        plain = array.detach().resolve_neg()
        if plain.dtype is self._torch.bfloat16:
            return plain.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        try:
            return plain.numpy()
        except TypeError:
            raise TypeError(f"{name} is {array.dtype}, which NumPy has no equal of") from None

    def give(self, array: np.ndarray, like: Array) -> Array:
        if array.dtype == ml_dtypes.bfloat16:
            return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)


class DlpackAdapter(Adapter):
    """Any object with ``__dlpack__``; results go back through its array namespace where it has one."""

    kind = "DLPack"
    CPU_DEVICES = (1, 3)  # DLDeviceType: kDLCPU, kDLCUDAHost
    CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged

    def placed(self, q: Array) -> Adapter:
        return the(self.on_gpu) if self._device_type("q", q) in self.CUDA_DEVICES else self

    @property
    def on_gpu(self) -> type[Adapter]:
        return DlpackDeviceAdapter

    @property
    def native(self) -> Adapter:
        return the(NumpyAdapter)

    def borrow(self, name: str, array: Array) -> np.ndarray:
        if self._device_type(name, array) not in self.CPU_DEVICES:
            raise ValueError(f"{name} is on another device; it must be on q's cpu")
        try:
            return np.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(f"{name} cannot be read through DLPack: {error}") from error

    def give(self, array: Array, like: Array) -> Array:
        if hasattr(like, "__array_namespace__"):
            return like.__array_namespace__().from_dlpack(array)
        return array

    def _device_type(self, name: str, array: Array) -> int:
        device_type = int(array.__dlpack_device__()[0])
        if device_type not in self.CPU_DEVICES + self.CUDA_DEVICES:
            raise TypeError(f"{name} is on DLPack device type {device_type}; attention runs on a CPU or a CUDA GPU")
        return device_type


class DlpackDeviceAdapter(DlpackAdapter):
    """The same on a GPU, as CuPy arrays; DLPack hands the stream over in both directions."""

    def __init__(self) -> None:
        self._in_flight: deque[tuple[Array, Mapping[str, Array]]] = deque()
        self._dropping = threading.Lock()  # between looking at the first and popping it, no other thread may pop

    @property
    def native(self) -> Adapter:
        return the(CupyAdapter)

    def borrow(self, name: str, array: Array) -> Array:
        import cupy

        if self._device_type(name, array) not in self.CUDA_DEVICES:
            raise ValueError(f"{name} is on the cpu; it must be on q's GPU")
        with cupy.cuda.Device(int(array.__dlpack_device__()[1])):
            return cupy.from_dlpack(array)

    def hold(self, arrays: Mapping[str, Array]) -> None:
        """Keep what the kernels read until they have run.

        The lender orders its allocations on streams of its own, so memory that it takes back while a kernel on the
        caller's CuPy stream still reads it would be overwritten.
        """
        import cupy

        with self._dropping:
            while self._in_flight and self._in_flight[0][0].done:
                self._in_flight.popleft()
        with cupy.cuda.Device(arrays["q"].data.device_id):
            self._in_flight.append((cupy.cuda.get_current_stream().record(), arrays))


class JaxAdapter(DlpackAdapter):
    """Eager JAX arrays on the CPU. NumPy's DLPack has no bfloat16, so the buffer protocol serves instead."""

    kind = "jax"

    def placed(self, q: Array) -> Adapter:
        self.check("q", q)
        return super().placed(q)

    @property
    def on_gpu(self) -> type[Adapter]:
        return JaxDeviceAdapter

    def is_writable(self, array: Array) -> bool:
        return False

    def borrow(self, name: str, array: Array) -> np.ndarray:
        self.check(name, array)
        if self._device_type(name, array) not in self.CPU_DEVICES:
            raise ValueError(f"{name} is on another device; it must be on q's cpu")
        return np.asarray(array)

    def give(self, array: np.ndarray, like: Array) -> Array:
        return sys.modules["jax"].device_put(array, like.device, may_alias=True)

    @staticmethod
    def check(name: str, array: Array) -> None:
        if isinstance(array, sys.modules["jax"].core.Tracer):
            raise NotImplementedError(
                f"{name} is traced by JAX; call attention on concrete arrays, outside jit, and vjp for gradients"
            )
        if len(array.devices()) != 1:
            raise ValueError(f"{name} is spread over {len(array.devices())} devices; it must be on one")


class JaxDeviceAdapter(DlpackDeviceAdapter):
    kind = "jax"

    def is_writable(self, array: Array) -> bool:
        return False

    def borrow(self, name: str, array: Array) -> Array:
        JaxAdapter.check(name, array)
        return super().borrow(name, array)

    def give(self, array: Array, like: Array) -> Array:
        return sys.modules["jax"].dlpack.from_dlpack(array)


@cache
def the(adapter: type[Adapter]) -> Adapter:
    """Return the one instance of an adapter, made (and its framework imported) on first use."""
    return adapter()


_BY_TYPE: dict[type, Adapter] = {np.ndarray: the(NumpyAdapter)}


def adapter_of(array: Array, name: str = "q") -> Adapter:
    """Return the adapter for a kind of array, before `Adapter.placed` looks at its device.

    >>> adapter_of(np.zeros(3)).kind
    'numpy'
    >>> adapter_of([1, 2], "k")
    Traceback (most recent call last):
    ...
    TypeError: k is a list; attention takes NumPy, CuPy, PyTorch or JAX arrays, or objects with __dlpack__
    """
    adapter = _BY_TYPE.get(type(array))
    if adapter is None:
        adapter = _BY_TYPE[type(array)] = the(_adapter_class(type(array), name))
    return adapter


def common_adapter(operands: Mapping[str, Array]) -> Adapter:
    """Return the adapter that all operands share, placed on q's device."""
    q = operands["q"]
    adapter = adapter_of(q)
    for array in operands.values():
        if type(array) is not type(q):
            _check_kinds(adapter, operands)
    return adapter.placed(q)


def _check_kinds(adapter: Adapter, operands: Mapping[str, Array]) -> None:
    kind = _full_name(type(operands["q"]))
    for name, array in operands.items():
        if adapter_of(array, name).kind != adapter.kind:
            raise TypeError(f"{name} is a {_full_name(type(array))}; it must be q's kind, {kind}")


def _adapter_class(cls: type, name: str) -> type[Adapter]:
    library = cls.__module__.partition(".")[0]
    if issubclass(cls, np.ndarray):
        if cls in (np.ndarray, np.memmap):
            return NumpyAdapter
        rule = "whose own rules would be ignored; attention takes plain numpy.ndarray"
        raise TypeError(f"{name} is a {_full_name(cls)}, {rule}")
    if library == "cupy" and cls.__name__ == "ndarray":
        return CupyAdapter
    if library == "torch" and cls.__name__ in ("Tensor", "Parameter"):
        return TorchAdapter
    if any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in cls.__mro__):
        raise TypeError(f"{name} is a {_full_name(cls)}; attention takes plain torch.Tensor, which it can address")
    if library in ("jax", "jaxlib"):
        return JaxAdapter
    if hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__"):
        return DlpackAdapter
    raise TypeError(f"{name} is a {_full_name(cls)}; attention takes {KINDS}")


def _full_name(cls: type) -> str:
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def dtype_name(dtype: np.dtype) -> str:
    """Name a dtype; NumPy's own names hide the byte order.

    >>> dtype_name(np.dtype(">f4"))
    'byte-swapped float32'
    """
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"


def element_strides(array: Array) -> tuple[int, ...]:
    itemsize = max(array.dtype.itemsize, 1)
    return tuple(stride // itemsize for stride in array.strides)
