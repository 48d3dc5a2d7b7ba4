"""CuPy's driver and compiler as far as launching uses them, without a GPU: remembers what it is asked for."""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from cuflash import device
from cuflash.backends import cuda_backend
from cuflash.cuda import counters, launch, module, tensor_map
from cuflash.device import DeviceInfo
from cuflash.dropout import Dropout
from cuflash.problem import View

COUNTERS = 1 << 36  # address of the tile counters


@dataclass
class Launched:
    """One launch as the driver saw it; ``parameters`` is a copy of the struct."""

    entry: str
    grid: int
    threads: int
    shared_bytes: int
    stream: int
    parameters: bytes


@dataclass
class FakeDriver:
    """Stands for ``cupy.cuda``: its driver, runtime and NVRTC, and the class that compiles."""

    launched: list[Launched] = field(default_factory=list)
    compiled: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # entry point, options
    opted_in: dict[int, int] = field(default_factory=dict)  # shared memory by handle
    encoded: list[tuple[int, int]] = field(default_factory=list)  # tensor maps: address, rows of a box
    has_context: bool = True
    capturing: int | None = None  # a stream
    cache_error: OSError | None = None
    supported_archs: tuple[int, ...] = (80, 86, 89, 90, 100, 120)
    entries: list[str] = field(default_factory=list)
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: int = 8

    def funcSetAttribute(self, handle: int, attribute: int, value: int) -> None:  # noqa: N802
        assert attribute == self.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.opted_in[handle] = value

    def ctxGetCurrent(self) -> int:  # noqa: N802
        return int(self.has_context)

    def setDevice(self, index: int) -> None:  # noqa: N802
        self.has_context = True

    def streamIsCapturing(self, stream: int) -> bool:  # noqa: N802
        return stream == self.capturing

    def launchKernel(self, *arguments: int) -> None:  # noqa: N802
        handle, grid, _, _, threads, _, _, shared_bytes, stream, pointers, _ = arguments
        assert self.has_context
        entry = self.entries[handle - 1]
        address = ctypes.c_void_p.from_address(pointers).value
        content = ctypes.string_at(address, launch.PARAMS.get(entry, launch.BACKWARD_PARAMS).itemsize)
        self.launched.append(Launched(entry, grid, threads, shared_bytes, stream, content))

    def encode_tiled(self, address: int, dtype: int, rank: int, pointer: int, sizes, strides, box, *_: object) -> int:
        """Write a map of which a test can read the array's address and the rows of a box."""
        self.encoded.append((pointer, box[1]))
        ctypes.memmove(address, struct.pack("<QQ112x", pointer, box[1]), tensor_map.BYTES)
        return 0

    def zeros(self, size: int, dtype: np.dtype) -> SimpleNamespace:
        assert self.capturing is None, "memory cannot be allocated while a graph is captured"
        return SimpleNamespace(data=SimpleNamespace(ptr=COUNTERS), itemsize=np.dtype(dtype).itemsize)

    def RawModule(self, *, code: str, options: tuple[str, ...]):  # noqa: N802
        return SimpleNamespace(get_function=lambda entry: self.compile(entry, options))

    def compile(self, entry: str, options: tuple[str, ...]) -> SimpleNamespace:
        self.compiled.append((entry, options))
        error, self.cache_error = self.cache_error, None
        if error is not None:
            raise error
        self.entries.append(entry)
        return SimpleNamespace(kernel=SimpleNamespace(ptr=len(self.entries)), num_regs=168)

    @property
    def cupy(self) -> SimpleNamespace:
        cuda = SimpleNamespace(
            driver=self,
            runtime=self,
            nvrtc=FakeNvrtc(self.supported_archs),
            Device=FakeDevice,
            compiler=SimpleNamespace(CompileException=CompileException),
        )
        return SimpleNamespace(cuda=cuda, RawModule=self.RawModule, zeros=self.zeros, int32=np.int32)


class FakeDevice:
    """Stands for ``cupy.cuda.Device``."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class FakeNvrtc:
    """Stands for ``cupy.cuda.nvrtc``."""

    archs: tuple[int, ...]

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return 13, 0

    def getSupportedArchs(self) -> tuple[int, ...]:  # noqa: N802
        return self.archs

    def createProgram(self, *_: object) -> int:  # noqa: N802
        return 1

    def compileProgram(self, *_: object) -> None:  # noqa: N802
        pass

    def destroyProgram(self, _: int) -> None:  # noqa: N802
        pass


class CompileException(Exception):
    """Stands for ``cupy.cuda.compiler.CompileException``."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """An H200 without the H200."""
    fake = FakeDriver()
    for user in (device, module, launch, counters, cuda_backend):
        monkeypatch.setattr(user, "require_cupy", lambda: fake.cupy)
    monkeypatch.setattr(device, "_query", lambda index: DeviceInfo.named("sm_90a"))
    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: fake.encode_tiled)
    monkeypatch.setattr(launch, "tile_counters", functools.cache(counters.TileCounters))
    monkeypatch.setattr(module, "_kernels", {})
    monkeypatch.setattr(module, "_locks", {})
    monkeypatch.delenv(module.IN_MEMORY, raising=False)
    monkeypatch.setattr(cuda_backend, "_launches", {})
    return fake


def launch_on(
    prepared: launch.Launch,
    views: dict[str, View],
    workspace: int = 0,
    dropout: Dropout | None = None,
    stream: int = 0,
) -> None:
    """Launch once on the arrays that views point to."""
    prepared.bind(views)({name: view.pointer for name, view in views.items()}, workspace, dropout, stream)


def forward_views(**operands: View) -> dict[str, View]:
    """Views of a small problem at made-up addresses, each its own."""
    shape = (2, 100, 4, 64)
    views = {name: View.of(shape, "bfloat16", ("cuda", 0)) for name in ("q", "k", "v", "out")}
    views["lse"] = View.of((2, 4, 100), "float32", ("cuda", 0))
    return addressed(views | operands)


def backward_views(**operands: View) -> dict[str, View]:
    shape = (2, 100, 4, 64)
    gradients = {name: View.of(shape, "bfloat16", ("cuda", 0)) for name in ("dout", "dq", "dk", "dv")}
    return addressed(forward_views() | gradients | operands)


def addressed(views: dict[str, View]) -> dict[str, View]:
    for number, view in enumerate(views.values(), start=1):
        view.pointer = number << 20
    return views
