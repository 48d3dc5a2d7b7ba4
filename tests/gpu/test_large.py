"""Arrays past 2^31 elements: every offset in 64 bits, by batch, by row and by head."""

from __future__ import annotations

import cupy
import numpy as np
import pytest
from gpu.calls import both_passes
from gpu.device_memory import same_bits

from cuflash.testing import numpy_dtype

pytestmark = pytest.mark.gpu

BFLOAT16 = numpy_dtype("bfloat16")
KEYWORDS = {"causal": True, "deterministic": True}


def need_memory(gigabytes: float) -> None:
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free / 2**30:.0f}")


def normal(shape: tuple[int, ...], seed: int) -> cupy.ndarray:
    """Standard normal bfloat16, made in parts: the float32 numbers behind it would be twice its size."""
    rng, array = cupy.random.default_rng(seed), cupy.empty(shape, BFLOAT16)
    for part in cupy.array_split(array, 16):
        part[...] = rng.standard_normal(part.shape, dtype=np.float32).astype(BFLOAT16)
    return array


def test_many_sequences():
    need_memory(70)
    shape = (2**15 + 3, 129, 8, 64)  # 2.2e9 elements
    operands = {name: normal(shape, seed) for seed, name in enumerate(("q", "k", "v", "dout"))}
    results = both_passes(operands, **KEYWORDS)
    assert all(operands[name].size > 2**31 for name in operands)
    for batch in (0, 2**14, shape[0] - 1):
        some = slice(batch, batch + 1)
        alone = both_passes({name: array[some].copy() for name, array in operands.items()}, **KEYWORDS)
        for name, array in alone.items():
            assert bool(same_bits(cupy.ascontiguousarray(results[name][some]), array)), (batch, name)


@pytest.mark.parametrize("axis", ["rows", "heads"])
def test_strides_past_two_to_the_31(axis: str):
    need_memory(30)
    shape = (1, 300, 2, 64) if axis == "rows" else (1, 300, 4, 64)
    stride = 2**31 // (shape[1] - 1 if axis == "rows" else shape[2] - 1) // 512 * 512 + 512
    count = shape[1] if axis == "rows" else shape[2]
    buffer = cupy.zeros(count * stride, BFLOAT16)
    item = BFLOAT16.itemsize
    inner = 64 * 4 * item  # q, k, v and dout lie side by side
    strides = (0, stride * item, inner, item) if axis == "rows" else (0, inner, stride * item, item)
    names = ("q", "k", "v", "dout")
    operands = {
        name: cupy.ndarray(shape, BFLOAT16, memptr=buffer.data + 64 * item * place, strides=strides)
        for place, name in enumerate(names)
    }
    packed = {name: normal(shape, seed) for seed, name in enumerate(names)}
    for name in names:
        operands[name][...] = packed[name]
    results, expected = both_passes(operands, **KEYWORDS), both_passes(packed, **KEYWORDS)
    for name, array in expected.items():
        assert bool(same_bits(results[name], array)), name
