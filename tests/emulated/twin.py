"""The host twin: kernels compiled by g++ against ``twin/arch`` and run on NumPy memory, one fiber per CUDA thread.

``compile_text`` turns one flattened translation unit into a shared library, cached on disk by its content;
``Kernel.launch`` runs an entry point over a grid. See PLANTED.md for what the twin is known to notice.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.array_utils import byte_bounds

TWIN_FOLDER = Path(__file__).parent / "twin"
MACHINE_PARTS = (
    "scheduler",
    "threads",
    "shared_memory",
    "background",
    "barriers",
    "copy_engine",
    "tensor_cores",
)
WARP_SIZE = 32

# Contracted multiply-adds would differ from machine to machine; fresh locals hold a pattern, so that a register that a
# kernel forgets to set gives a wrong answer rather than a lucky zero.
COMMON_FLAGS = ("-std=c++17", "-fPIC", "-march=native", "-ffp-contract=off", "-fvisibility=hidden", "-U_FORTIFY_SOURCE")
KERNEL_FLAGS = ("-O1", "-fno-gnu-unique", "-ftrivial-auto-var-init=pattern", "-Wno-unknown-pragmas", "-Wno-psabi")
MACHINE_FLAGS = ("-O3", "-Wall", "-Wextra")


class TwinError(AssertionError):
    """A kernel broke a rule of the programming model; the message says which thread, where and how."""


class CompilationError(Exception):
    """g++ rejects a kernel."""


@dataclass(frozen=True)
class Schedule:
    """One of the interleavings that the hardware may choose.

    ``resident_blocks`` blocks run interleaved, or as many more as make clusters whole; they start in the order of
    their index.
    """

    seed: int = 0
    resident_blocks: int = 2
    detect_races: bool = True


@dataclass(frozen=True)
class Memory:
    """What a kernel may read, and what it may also write; anything else is out of bounds."""

    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]

    def allocations(self) -> ctypes.Array:
        arrays = [(array, 0) for array in self.inputs] + [(array, 1) for array in self.outputs]
        spans = [(*byte_bounds(array), writable) for array, writable in arrays if array.size]
        return (_Allocation * len(spans))(*((low, high - low, writable) for low, high, writable in spans))


class _Allocation(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("writable", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("resident_blocks", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("detect_races", ctypes.c_int),
        ("num_allocations", ctypes.c_int),
        ("allocations", ctypes.POINTER(_Allocation)),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Kernel:
    """An entry point of a compiled library."""

    library: Path
    entry: str

    def launch(
        self,
        params: int,
        *,
        grid: int,
        threads: int,
        shared_bytes: int,
        memory: Memory,
        schedule: Schedule = Schedule(),
    ) -> None:
        """Run the grid to its end; ``params`` is the address of the kernel's argument.

        Raises TwinError where the kernel breaks a rule.
        """
        allocations = memory.allocations()
        message = ctypes.create_string_buffer(1024)
        launch = _Launch(
            grid,
            threads,
            shared_bytes,
            schedule.resident_blocks,
            schedule.seed,
            schedule.detect_races,
            len(allocations),
            allocations,
            ctypes.cast(message, ctypes.c_char_p),
            len(message),
        )
        function = getattr(_load(self.library), f"launch_{self.entry}")
        if function(ctypes.byref(launch), ctypes.c_void_p(params)):
            raise TwinError(message.value.decode())


def compile_text(text: str, entries: Iterable[str]) -> Path:
    """A shared library of a flattened translation unit that exports ``entries``; compiled once per content."""
    exports = "".join(f"TWIN_EXPORT({entry})\n" for entry in entries)
    return _built(f"{text}\n{exports}", "kernel.cpp", (*COMMON_FLAGS, *KERNEL_FLAGS, "-shared"), machine_objects())


def compile_ahead(jobs: Iterable[tuple[str, tuple[str, ...]]]) -> None:
    """Compile many (text, entries) pairs side by side, so that the tests that follow find them in the cache.

    What does not compile is left to the test that needs it, which then says so.
    """

    def attempt(job: tuple[str, tuple[str, ...]]) -> None:
        with suppress(CompilationError):
            compile_text(*job)

    machine_objects()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, dict.fromkeys(jobs)))


@functools.cache
def machine_objects() -> tuple[Path, ...]:
    """The machine itself, which all kernels share."""
    headers = tuple(path.read_text() for path in sorted(TWIN_FOLDER.glob("machine/*.h")))
    flags = (*COMMON_FLAGS, *MACHINE_FLAGS, f"-I{TWIN_FOLDER}", "-c")
    sources = (TWIN_FOLDER / f"machine/{part}.cpp" for part in MACHINE_PARTS)
    return tuple(_built(path.read_text(), path.name, flags, included=headers) for path in sources)


def _built(
    text: str, name: str, flags: Sequence[str], objects: Sequence[Path] = (), included: Sequence[str] = ()
) -> Path:
    """The result of one g++ call; its name is a hash of everything that it depends on."""
    inputs = "\0".join([_compiler_version(), text, *flags, *map(str, objects), *included])
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:24]
    target = _cache_folder() / f"{Path(name).stem}-{digest}{'.so' if objects else '.o'}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_cache_folder()) as folder:
            source, result = Path(folder) / Path(name).name, Path(folder) / "result"
            source.write_text(text)
            command = ["g++", *flags, "-o", str(result), str(source), *map(str, objects)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CompilationError(f"g++ failed on {name}:\n{done.stderr[:4000]}")
            result.replace(target)  # atomic: parallel test processes may build the same thing
    return target


@functools.cache
def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cuflash-twin-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
