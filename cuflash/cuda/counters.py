"""The counters from which persistent kernels draw their tiles: one per stream, zero before and after every launch.

Launches on one stream follow each other, so they can share a counter, and each leaves it at zero: no launch pays for
clearing it. A captured launch may later run beside anything, so it gets a counter of its own.
"""

from __future__ import annotations

import functools
import itertools
import threading

from cuflash.device import require_cupy

SLOTS = 65536  # per device; every captured launch takes one for good
PER_THREAD_STREAM = 2  # cudaStreamPerThread: one handle, another stream in every thread


class TileCounters:
    """The counters of one device."""

    def __init__(self, device_index: int) -> None:
        cupy = require_cupy()
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        with cupy.cuda.Device(device_index) as device:
            self._memory = cupy.zeros(SLOTS, cupy.int32)
            device.synchronize()
        self._next = itertools.count(self._memory.data.ptr, self._memory.itemsize)
        self._end = self._memory.data.ptr + self._memory.nbytes
        self._of_stream: dict[tuple[int, int], int] = {}

    def address(self, stream: int) -> int:
        """Return the address of the counter for a launch on ``stream``."""
        if self._is_capturing(stream):
            return self._take()
        key = (stream, threading.get_ident() if stream == PER_THREAD_STREAM else 0)
        address = self._of_stream.get(key)
        if address is None:
            address = self._of_stream.setdefault(key, self._take())
        return address

    def _take(self) -> int:
        address = next(self._next)
        if address >= self._end:
            raise RuntimeError(f"{SLOTS} launches have been captured in CUDA graphs; backend='sm80' needs no counters")
        return address


@functools.cache
def tile_counters(device_index: int) -> TileCounters:
    """Return the counters of a device; the first call allocates them, which must not happen during a capture."""
    return TileCounters(device_index)
