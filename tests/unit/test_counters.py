"""Counters of tiles: launches that may run at the same time never share one."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from cuflash.cuda import counters

BASE = 1 << 36
CAPTURING = 99


class FakeDevice:
    def __init__(self, index: int) -> None:
        FakeDevice.used.append(index)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        FakeDevice.used.append("synchronized")


@pytest.fixture
def cupy(monkeypatch) -> SimpleNamespace:
    """Memory that is only an address, and one stream that records a graph."""
    FakeDevice.used = []
    allocations = []

    def zeros(size: int, dtype: str) -> SimpleNamespace:
        assert dtype == "int32"
        allocations.append(size)
        return SimpleNamespace(data=SimpleNamespace(ptr=BASE), itemsize=4, nbytes=4 * size)

    runtime = SimpleNamespace(streamIsCapturing=lambda stream: stream == CAPTURING)
    cuda = SimpleNamespace(runtime=runtime, Device=FakeDevice)
    fake = SimpleNamespace(cuda=cuda, zeros=zeros, int32="int32", allocations=allocations)
    monkeypatch.setattr(counters, "require_cupy", lambda: fake)
    counters.tile_counters.cache_clear()
    yield fake
    counters.tile_counters.cache_clear()


def test_memory_is_zero_before_any_stream_uses_it(cupy):
    counters.TileCounters(3)
    assert cupy.allocations == [counters.SLOTS]
    assert FakeDevice.used == [3, "synchronized"]


def test_devices_have_memory_of_their_own_once(cupy):
    assert counters.tile_counters(0) is counters.tile_counters(0)
    assert counters.tile_counters(1) is not counters.tile_counters(0)
    assert len(cupy.allocations) == 2


def test_a_stream_keeps_its_counter(cupy):
    of_device = counters.TileCounters(0)
    first = [of_device.address(stream) for stream in (0, 1, 7)]
    assert len(set(first)) == 3
    assert [of_device.address(stream) for stream in (0, 1, 7)] == first
    assert all(BASE <= address < BASE + 4 * counters.SLOTS and address % 4 == 0 for address in first)


def test_captured_launches_have_counters_of_their_own(cupy):
    """Two graphs, or one graph twice on two streams, may run beside each other and beside the stream they came from."""
    of_device = counters.TileCounters(0)
    addresses = [of_device.address(stream) for stream in (CAPTURING, CAPTURING, 1, CAPTURING)]
    assert len(set(addresses)) == 4
    assert of_device.address(1) == addresses[2]


def test_per_thread_stream_is_another_one_in_every_thread(cupy):
    of_device, found, barrier = counters.TileCounters(0), {}, threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait(timeout=10)
        found[number] = [of_device.address(counters.PER_THREAD_STREAM) for _ in range(2)]
        barrier.wait(timeout=10)  # thread identities are reused when a thread has ended

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({first for first, _ in found.values()}) == 4
    assert all(first == second for first, second in found.values())


def test_thread_that_ends_gives_its_counter_back_last(cupy, monkeypatch):
    """The next thread often gets the identity of the last one, whose launches may still run."""
    monkeypatch.setattr(counters, "SLOTS", 4)
    of_device, found = counters.TileCounters(0), []
    for _ in range(9):
        thread = threading.Thread(target=lambda: found.append(of_device.address(counters.PER_THREAD_STREAM)))
        thread.start()
        thread.join()
    cycle = [BASE, BASE + 4, BASE + 8, BASE + 12]
    assert found == [*cycle, *cycle, BASE]


def test_threads_share_the_counter_of_an_ordinary_stream(cupy):
    of_device, found, barrier = counters.TileCounters(0), [], threading.Barrier(8)

    def work() -> None:
        barrier.wait(timeout=10)
        found.append(of_device.address(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8


def test_running_out_says_why_and_what_to_do(cupy, monkeypatch):
    monkeypatch.setattr(counters, "SLOTS", 3)
    of_device = counters.TileCounters(0)
    addresses = [of_device.address(stream) for stream in (CAPTURING, 1, CAPTURING)]
    assert addresses == [BASE, BASE + 4, BASE + 8]
    with pytest.raises(RuntimeError, match="^all 3 tile counters are taken, .* CUDA graph; backend='sm80' needs none$"):
        of_device.address(CAPTURING)
    assert of_device.address(1) == BASE + 4, "streams that have a counter keep it"
