"""The counters from which persistent kernels draw their tiles: one per stream, zero before and after every launch.

Launches on one stream follow each other, so they can share a counter, and each leaves it at zero: no launch pays for
clearing it. A captured launch may later run beside anything, so it gets a counter of its own.

Streams are told apart by their handles, and CUDA may give a destroyed stream's handle to a new one, which then has the
counter of the old. That one's launches are over by then, for CUDA keeps a destroyed stream until its work is done, and
have left the counter at zero.
"""

from __future__ import annotations

import functools
import threading
from collections import deque

from cuflash.device import require_cupy

SLOTS = 65536  # per device; every captured launch takes one for good, every thread one for its own default stream
PER_THREAD_STREAM = 2  # cudaStreamPerThread: one handle, another stream in every thread


class TileCounters:
    """The counters of one device."""

    def __init__(self, device_index: int) -> None:
        cupy = require_cupy()
        self._is_capturing = cupy.cuda.runtime.streamIsCapturing
        with cupy.cuda.Device(device_index) as device:
            self._memory = cupy.zeros(SLOTS, cupy.int32)
            device.synchronize()
        start, itemsize = self._memory.data.ptr, self._memory.itemsize
        self._unused = iter(range(start, start + SLOTS * itemsize, itemsize))
        self._returned: deque[int] = deque()
        self._of_stream: dict[int, int] = {}
        self._of_thread = threading.local()

    def address(self, stream: int) -> int:
        """Return the address of the counter for a launch on ``stream``."""
        if self._is_capturing(stream):
            return self._take()
        if stream == PER_THREAD_STREAM:
            if not hasattr(self._of_thread, "lease"):
                self._of_thread.lease = _Lease(self._take(), self._returned)
            return self._of_thread.lease.address
        address = self._of_stream.get(stream)
        if address is None:
            address = self._of_stream.setdefault(stream, self._take())
        return address

    def _take(self) -> int:
        address = next(self._unused, None)
        if address is not None:
            return address
        try:
            return self._returned.popleft()
        except IndexError:
            raise RuntimeError(
                f"all {SLOTS} tile counters are taken, one by every launch captured in a CUDA graph; "
                "backend='sm80' needs none"
            ) from None


class _Lease:
    """A counter until its thread ends. Launches may outlive the thread, so the longest returned is used again first."""

    def __init__(self, address: int, returned: deque[int]) -> None:
        self.address, self._returned = address, returned

    def __del__(self) -> None:
        self._returned.append(self.address)


@functools.cache
def tile_counters(device_index: int) -> TileCounters:
    """Return the counters of a device; the first call allocates them, which must not happen during a capture."""
    return TileCounters(device_index)
