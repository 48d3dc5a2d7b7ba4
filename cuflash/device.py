"""What a plan needs to know about a GPU: a value that can be named on a machine without one."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from types import ModuleType

KB = 1024
MB = 1024 * KB


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Limits of one GPU.

    Attributes
    ----------
    name, arch : str
        Product and architecture; ``sm_90a`` names Hopper with its architecture-specific instructions.
    shared_per_block, shared_per_sm : int
        Bytes of shared memory that a block may opt in to, and that all blocks of a multiprocessor share.
    flops, bandwidth : float or None
        Dense 16-bit FLOP/s with float32 accumulation, and bytes/s of device memory; None where not known.
    """

    name: str
    arch: str
    major: int
    minor: int
    sm_count: int
    shared_per_block: int
    shared_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    l2_bytes: int
    flops: float | None = None
    bandwidth: float | None = None

    @classmethod
    def named(cls, arch: str) -> DeviceInfo:
        """Describe the best-known product of an architecture.

        >>> DeviceInfo.named("sm_90a").sm_count
        132
        >>> DeviceInfo.named("sm_75")
        Traceback (most recent call last):
        ...
        ValueError: arch is 'sm_75'; it must be one of sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120
        """
        if arch not in _NAMED:
            raise ValueError(f"arch is {arch!r}; it must be one of {', '.join(_NAMED)}")
        return _NAMED[arch]

    @classmethod
    def current(cls, index: int) -> DeviceInfo:
        """Describe device ``index`` of this machine."""
        return _query(index)

    @property
    def has_wgmma(self) -> bool:
        """Whether the Hopper kernels run: the instructions of sm_90a, and a compiler that knows them."""
        return self.arch == "sm_90a"

    @property
    def portable_arch(self) -> str:
        """The architecture without its own instructions: what the mma.sync kernels are compiled for."""
        return self.arch.rstrip("a")

    @property
    def tile_family(self) -> str:
        """The rows of the tile table that are meant for this device: Hopper's, or those its shared memory allows.

        >>> DeviceInfo.named("sm_89").tile_family
        'sm_86'
        """
        if self.major == 9:
            return "sm_90"
        return next(family for shared, family in TILE_FAMILIES if shared * KB <= self.shared_per_block)

    def blocks_per_sm(self, threads: int, shared_bytes: int, registers: int = 0) -> int:
        """Thread blocks that fit on one multiprocessor together; 0 registers leaves registers out of the count.

        >>> DeviceInfo.named("sm_90a").blocks_per_sm(threads=128, shared_bytes=96 * 1024, registers=255)
        2
        """
        limits = [self.threads_per_sm // threads, self.shared_per_sm // (shared_bytes + SHARED_RESERVED)]
        if registers:
            per_thread = -(-registers // REGISTER_GRANULE) * REGISTER_GRANULE
            limits.append(self.registers_per_sm // (per_thread * threads))
        return min(limits)


TILE_FAMILIES = ((227, "sm_100"), (163, "sm_80"), (99, "sm_86"))  # least KB of shared memory per block, richest first
SHARED_RESERVED = 1 * KB  # taken by the driver from every block, from sm_80 on
REGISTER_GRANULE = 8

# Rates: NVIDIA's data sheets (dense), except H200: measured here, an 8192^3 bfloat16 matmul and a copy.
# name, arch, SMs, shared memory per block in KB (an SM has 1 more), threads per SM, L2 in MB, TFLOP/s, TB/s
_PRODUCTS = (
    ("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163, 2048, 40, 312, 2.04),
    ("NVIDIA GeForce RTX 3090", "sm_86", 82, 99, 1536, 6, 71, 0.94),
    ("NVIDIA GeForce RTX 4090", "sm_89", 128, 99, 1536, 72, 165, 1.01),
    ("NVIDIA H200", "sm_90a", 132, 227, 2048, 60, 790, 4.24),
    ("NVIDIA B200", "sm_100", 148, 227, 2048, 126, 2250, 8.0),
    ("NVIDIA GeForce RTX 5090", "sm_120", 170, 99, 1536, 96, 209, 1.79),
)
_NAMED = {
    arch: DeviceInfo(
        name=name,
        arch=arch,
        major=int(arch.strip("sm_a")) // 10,
        minor=int(arch.strip("sm_a")) % 10,
        sm_count=sm_count,
        shared_per_block=shared * KB,
        shared_per_sm=(shared + 1) * KB,
        registers_per_sm=65536,
        threads_per_sm=threads,
        l2_bytes=l2 * MB,
        flops=tera_flops * 1e12,
        bandwidth=tera_bytes * 1e12,
    )
    for name, arch, sm_count, shared, threads, l2, tera_flops, tera_bytes in _PRODUCTS
}
_RATES = {info.name: (info.flops, info.bandwidth) for info in _NAMED.values()}


def require_cupy() -> ModuleType:
    """Import CuPy, or say what is missing."""
    if "cupy" not in sys.modules:
        _provide_cache_folder()
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError("GPU arrays need CuPy: pip install 'cuflash[cuda13]', or 'cuflash[cuda12]'") from error
    return cupy


def _provide_cache_folder() -> None:
    """CuPy makes its cache folder on import and cannot be imported where that fails: give it a temporary one there."""
    folder = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        temporary = os.environ["CUPY_CACHE_DIR"] = tempfile.mkdtemp(prefix="cupy-kernel-cache-")
        warnings.warn(
            f"CuPy's kernel cache cannot be made ({error}): kernels are kept in {temporary} and compile again in the "
            "next process; set CUPY_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )


SM_90A_COMPILER = (12, 9)  # the oldest NVRTC that takes -arch=sm_90a beside the -arch=sm_90 that CuPy appends


def _compiler_knows_sm_90a() -> bool:
    version = require_cupy().cuda.nvrtc.getVersion()
    if version >= SM_90A_COMPILER:
        return True
    warnings.warn(
        f"NVRTC {version[0]}.{version[1]} does not compile the Hopper kernels, so the slower portable ones run; "
        "pip install 'cuflash[cuda13]' brings one that does",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@functools.lru_cache(maxsize=None)
def _query(index: int) -> DeviceInfo:
    runtime = require_cupy().cuda.runtime
    try:
        properties = runtime.getDeviceProperties(index)
    except runtime.CUDARuntimeError as error:
        raise RuntimeError(f"CUDA device {index} cannot be used ({error}); nvidia-smi shows what there is") from error
    name, major, minor = properties["name"].decode(), properties["major"], properties["minor"]
    if major < 8:
        raise RuntimeError(f"{name} is sm_{major}{minor}; cuflash needs sm_80 (Ampere) or later")
    flops, bandwidth = _RATES.get(name, (None, None))
    return DeviceInfo(
        name=name,
        arch=f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) and _compiler_knows_sm_90a() else ""),
        major=major,
        minor=minor,
        sm_count=properties["multiProcessorCount"],
        shared_per_block=properties["sharedMemPerBlockOptin"],
        shared_per_sm=properties["sharedMemPerMultiprocessor"],
        registers_per_sm=properties["regsPerMultiprocessor"],
        threads_per_sm=properties["maxThreadsPerMultiProcessor"],
        l2_bytes=properties["l2CacheSize"],
        flops=flops,
        bandwidth=bandwidth,
    )
