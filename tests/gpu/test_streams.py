"""Streams, CUDA graphs, threads and devices: everything runs where and when the caller's own work runs."""

from __future__ import annotations

import threading

import cupy
import pytest
from cases import Case
from gpu.calls import both_passes, random_operands
from gpu.device_memory import same_bits

import cuflash
from benchmarks.kernels import hold_stream

pytestmark = pytest.mark.gpu

CASE = Case(
    "streams", batch=2, seqlen_q=511, seqlen_k=511, num_heads=4, num_kv_heads=2, causal=True, deterministic=True
)


def assert_same(results: dict, expected: dict) -> None:
    wrong = [name for name in expected if not bool(same_bits(results[name], expected[name]))]
    assert not wrong, f"{wrong} differ"


def test_runs_on_the_current_stream():
    operands, later = random_operands(CASE, seed=1), random_operands(CASE, seed=2)
    expected = both_passes(later, **CASE.keywords)
    both_passes(operands, **CASE.keywords)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        hold_stream(0.2)  # work launched anywhere else would run during this, on the old operands
        for name, array in operands.items():
            array[...] = later[name]
        results = both_passes(operands, **CASE.keywords)
    stream.synchronize()
    assert_same(results, expected)


def test_makes_no_synchronisation():
    operands = random_operands(CASE)
    both_passes(operands, **CASE.keywords)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        both_passes(operands, **CASE.keywords)  # CuPy's pool keeps memory by stream
        stream.synchronize()
        hold_stream(0.5)
        both_passes(operands, **CASE.keywords)
        assert not stream.done, "the call waited for the device"
    stream.synchronize()


def test_graph_capture_and_replay():
    operands, later = random_operands(CASE, seed=1), random_operands(CASE, seed=2)
    expected = both_passes(later, **CASE.keywords)
    pool = cupy.cuda.MemoryPool()  # its blocks belong to the graph as long as it is replayed
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for _ in range(2):
            both_passes(operands, **CASE.keywords)
        stream.synchronize()
        stream.begin_capture()
        results = both_passes(operands, **CASE.keywords)
        graph = stream.end_capture()
        for name, array in operands.items():
            array[...] = later[name]
        for array in results.values():
            array.view(cupy.uint8)[...] = 0xFF
        graph.launch(stream)
    stream.synchronize()
    assert_same(results, expected)


def test_first_use_inside_a_capture_is_explained():
    case = Case("never-used-before", head_dim=200, softcap=7.0, window_size=(3, 5))
    operands = random_operands(case)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="captured"):
                cuflash.attention(operands["q"], operands["k"], operands["v"], softcap=7.0, window_size=(3, 5))
        finally:
            stream.end_capture()


def test_threads_on_streams_of_their_own_with_kernels_not_yet_loaded():
    cases = [
        Case(f"thread-{i}", seqlen_q=257, head_dim=96 + 32 * (i % 2), softcap=3.0 + i, alibi="head", deterministic=True)
        for i in range(8)
    ]
    operands = [random_operands(case, seed=i) for i, case in enumerate(cases)]
    cupy.cuda.Device().synchronize()
    start, results, errors = threading.Barrier(len(cases)), [None] * len(cases), []

    def work(i: int) -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                start.wait()
                for _ in range(5):
                    results[i] = both_passes(operands[i], **cases[i].keywords)
                stream.synchronize()
        except BaseException as error:  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for case, given, found in zip(cases, operands, results, strict=True):
        assert_same(found, both_passes(given, **case.keywords))


def test_follows_the_arrays_device():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two CUDA devices")
    expected = both_passes(random_operands(CASE), **CASE.keywords)
    with cupy.cuda.Device(1):
        operands = random_operands(CASE)
        cupy.cuda.Device(1).synchronize()
    results = both_passes(operands, **CASE.keywords)
    assert cupy.cuda.runtime.getDevice() == 0
    assert {array.device.id for array in results.values()} == {1}
    with cupy.cuda.Device(1):
        cupy.cuda.Device(1).synchronize()
        found = {name: cupy.asnumpy(array) for name, array in results.items()}
    assert_same({name: cupy.asarray(array) for name, array in found.items()}, expected)
