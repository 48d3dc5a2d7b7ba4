"""CuPy's driver and compiler as far as launching uses them, without a GPU: remembers what it is asked for."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from cuflash import device
from cuflash.backends import cuda_backend
from cuflash.cuda import launch, module
from cuflash.device import DeviceInfo
from cuflash.problem import View


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
        forward = {"forward_sm80": launch.FORWARD_PARAMS, "forward_sm90": launch.FORWARD_SM90_PARAMS}
        address = ctypes.c_void_p.from_address(pointers).value
        content = ctypes.string_at(address, forward.get(entry, launch.BACKWARD_PARAMS).itemsize)
        self.launched.append(Launched(entry, grid, threads, shared_bytes, stream, content))

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
            Device=nullcontext,
            compiler=SimpleNamespace(CompileException=CompileException),
        )
        return SimpleNamespace(cuda=cuda, RawModule=self.RawModule)


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
    for user in (device, module, launch, cuda_backend):
        monkeypatch.setattr(user, "require_cupy", lambda: fake.cupy)
    monkeypatch.setattr(device, "_query", lambda index: DeviceInfo.named("sm_90a"))
    monkeypatch.setattr(module, "_kernels", {})
    monkeypatch.setattr(module, "_locks", {})
    monkeypatch.delenv(module.IN_MEMORY, raising=False)
    monkeypatch.setattr(cuda_backend, "_launches", {})
    return fake


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
