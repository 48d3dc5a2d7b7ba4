"""Kernels, compiled and loaded: the one place that knows compiler flags.

``cupy.RawModule`` compiles and keeps machine code in CuPy's disk cache, which is safe between processes: entries are
written to a temporary file, renamed into place, and checked against a hash when read.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

from cuflash.cuda.source import translation_unit
from cuflash.device import require_cupy
from cuflash.plan import KernelSpec

COMPILER_OPTIONS = ("-std=c++17", "-lineinfo")
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # CuPy adds these itself
IN_MEMORY = "CUPY_CACHE_IN_MEMORY"  # read by CuPy at every compilation


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel: ``handle`` is its CUfunction, alive as long as ``owner``."""

    handle: int
    registers: int
    owner: object


_kernels: dict[tuple[int, KernelSpec], Kernel] = {}
_locks: dict[tuple[int, KernelSpec], threading.Lock] = {}
_compiler_lock = threading.Lock()


def load(spec: KernelSpec, device_index: int) -> Kernel:
    """Return the kernel on a device, compiled at most once however many threads ask."""
    key = (device_index, spec)
    kernel = _kernels.get(key)
    if kernel is None:
        with _locks.setdefault(key, threading.Lock()):
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = _build(spec, device_index)
    return kernel


def loaded(spec: KernelSpec, device_index: int) -> Kernel | None:
    """Return the kernel if it is loaded already."""
    return _kernels.get((device_index, spec))


def load_all(specs: Collection[KernelSpec], device_index: int) -> Iterator[Kernel]:
    """Load kernels in parallel and yield them one by one, so that a caller can show progress.

    Machine code stays in CuPy's disk cache: later processes load it in milliseconds.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda spec: load(spec, device_index), specs)


def _build(spec: KernelSpec, device_index: int) -> Kernel:
    cupy = require_cupy()
    _check_compiler(cupy, spec)
    start_compiler(cupy)
    with cupy.cuda.Device(device_index):
        try:
            return _compile(cupy, spec)
        except OSError as error:
            warnings.warn(
                f"CuPy's kernel cache cannot be used ({error}): kernels compile again in every process; "
                "set CUPY_CACHE_DIR to a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )
            os.environ[IN_MEMORY] = "1"
            return _compile(cupy, spec)


def _compile(cupy: ModuleType, spec: KernelSpec) -> Kernel:
    # CuPy appends the plain architecture of the device; next to it the variant with its own instructions wins.
    arch = (f"-arch={spec.arch}",) if spec.arch.endswith("a") else ()
    module = cupy.RawModule(code=translation_unit(spec), options=(*COMPILER_OPTIONS, *arch))
    try:
        function = module.get_function(spec.entry)
        return Kernel(handle=function.kernel.ptr, registers=function.num_regs, owner=function)
    except cupy.cuda.compiler.CompileException as error:
        raise RuntimeError(f"{spec.source} does not compile for {spec.arch} with this NVRTC:\n{error}") from error


def start_compiler(cupy: ModuleType) -> None:
    """Compile nothing, once, alone.

    NVRTC opens its library of builtins during its first compilation. Where several threads come first together, all but
    one of them never find it.
    """
    with _compiler_lock:
        _compile_nothing(cupy.cuda.nvrtc)


@functools.cache
def _compile_nothing(nvrtc: ModuleType) -> None:
    program = nvrtc.createProgram("", "nothing.cu", (), ())
    nvrtc.compileProgram(program, ())
    nvrtc.destroyProgram(program)


def _check_compiler(cupy: ModuleType, spec: KernelSpec) -> None:
    remedy = "pip install 'cuflash[cuda13]' brings one that fits"
    try:
        version = cupy.cuda.nvrtc.getVersion()
        supported = cupy.cuda.nvrtc.getSupportedArchs()
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"NVRTC, CUDA's run-time compiler, cannot be loaded ({error}); {remedy}") from error
    if int(spec.arch.removeprefix("sm_").rstrip("a")) not in supported:
        raise RuntimeError(f"NVRTC {version[0]}.{version[1]} does not know {spec.arch}; {remedy}")
