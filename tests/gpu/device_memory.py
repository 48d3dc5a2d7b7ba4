"""Device memory that tells on whoever misuses it: poisoned, with guard bands, in the caller's own strides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cupy
import numpy as np

BAND = 4096  # bytes on either side
POISON = 0xFF  # every byte; NaN in float16, bfloat16 and float32, -1 in int32


class GuardedPool:
    """An allocator whose every block begins as poison and lies between bands of poison."""

    def __init__(self) -> None:
        self._blocks: list[tuple[cupy.cuda.MemoryPointer, int]] = []

    def malloc(self, size: int) -> cupy.cuda.MemoryPointer:
        block = cupy.get_default_memory_pool().malloc(size + 2 * BAND)
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.runtime.memsetAsync(block.ptr, POISON, size + 2 * BAND, stream)
        self._blocks.append((block, size))
        return block + BAND

    def broken_bands(self) -> list[str]:
        """Which blocks were written past their ends; also keeps no block alive any longer."""
        broken = []
        for block, size in self._blocks:
            for side, start in (("before", 0), ("after", BAND + size)):
                band = cupy.ndarray((BAND,), cupy.uint8, memptr=block + start)
                if not bool((band == POISON).all()):
                    broken.append(f"{side} a block of {size} bytes")
        self._blocks.clear()
        return broken


@contextmanager
def guarded() -> Iterator[None]:
    """Allocate from a `GuardedPool` inside the block, and check its bands at the end."""
    pool = GuardedPool()
    with cupy.cuda.using_allocator(pool.malloc):
        yield
    cupy.cuda.Device().synchronize()
    broken = pool.broken_bands()
    assert not broken, f"written out of bounds: {broken}"


class DeviceCopy:
    """A host array on the device with the same strides and the same misalignment, inside poisoned memory."""

    def __init__(self, host: np.ndarray):
        itemsize = host.dtype.itemsize
        steps = [(n - 1) * stride for n, stride in zip(host.shape, host.strides, strict=True)] if host.size else [0]
        low, high = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps) + itemsize
        lead = BAND + (host.__array_interface__["data"][0] + low) % 16
        self._memory = cupy.full(lead + high - low + BAND, POISON, cupy.uint8)
        pointer = self._memory.data + (lead - low)
        self.array = cupy.ndarray(host.shape, host.dtype, memptr=pointer, strides=host.strides)
        self.array[...] = cupy.asarray(np.ascontiguousarray(host))
        self._before = self._memory.copy()

    def assert_unchanged(self, name: str) -> None:
        assert bool((self._memory == self._before).all()), f"{name} or its surroundings were written"


def same_bits(a: cupy.ndarray, b: cupy.ndarray) -> cupy.ndarray:
    """Whether two contiguous arrays hold the same bits, NaN included, as a device scalar: no synchronisation."""
    return (a.view(cupy.uint8) == b.view(cupy.uint8)).all()
