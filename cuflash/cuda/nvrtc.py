"""Compile a kernel without a GPU and report what the compiler made of it: machine code, registers, spills, warnings.

At run time kernels go through CuPy and its disk cache (module.py); this is for tests and for looking at a kernel.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from cuflash.cuda.module import COMPILER_OPTIONS, CUPY_OPTIONS, start_compiler
from cuflash.cuda.source import translation_unit
from cuflash.device import require_cupy
from cuflash.plan import KernelSpec

REGISTERS = re.compile(r"Used (\d+) registers")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
STATIC_SHARED = re.compile(r"(\d+) bytes smem")
WARNING = re.compile(r"^.*\bC7\d{3}\b.*$", re.MULTILINE)  # ptxas: matrix instructions serialised, registers short


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What NVRTC says about one kernel; sizes in bytes per thread, ``shared`` the static part per block."""

    cubin: bytes = field(repr=False)
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    warnings: tuple[str, ...]
    seconds: float


class CompileError(RuntimeError):
    """The compiler's log, with the files and lines of kernels_cu."""


def compile_spec(spec: KernelSpec) -> CompileReport:
    """Compile the kernel of a plan's step."""
    return compile_text(translation_unit(spec), spec.arch, name=spec.source)


def compile_text(text: str, arch: str, *, name: str = "kernel.cu") -> CompileReport:
    """Compile one kernel from its complete text."""
    cupy = require_cupy()
    start_compiler(cupy)
    nvrtc = cupy.cuda.nvrtc
    options = (*COMPILER_OPTIONS, *CUPY_OPTIONS, f"-arch={arch}", "--ptxas-options=-v")
    program = nvrtc.createProgram(text, name, (), ())
    start = time.perf_counter()
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{name} for {arch}: {error}\n{nvrtc.getProgramLog(program)}") from error
        seconds = time.perf_counter() - start
        log = nvrtc.getProgramLog(program)
        # CuPy takes the last byte for the end of a string and drops it: a zero, the end of the last program header.
        return _report(nvrtc.getCUBIN(program) + b"\0", log, seconds)
    finally:
        nvrtc.destroyProgram(program)


def _report(cubin: bytes, log: str, seconds: float) -> CompileReport:
    stack, spill_stores, spill_loads = map(int, STACK.search(log).groups())
    shared = STATIC_SHARED.search(log)
    return CompileReport(
        cubin=cubin,
        registers=int(REGISTERS.search(log)[1]),
        stack=stack,
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        shared=int(shared[1]) if shared else 0,
        warnings=tuple(WARNING.findall(log)),
        seconds=seconds,
    )
