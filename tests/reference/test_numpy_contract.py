"""What the NumPy backend promises besides right numbers: non-finite inputs, tiles, repeats, memory, speed."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from cases import CASES, RICHEST, Case

from cuflash import testing
from cuflash.backends import Gradients, numpy_backend

RICH = Case("rich", **RICHEST, seqlen_k=143, dtype="float32")
LONG = Case("long", seqlen_q=4096, seqlen_k=4096, dtype="float32", causal=True)


def run(case: Case, arrays: testing.Arrays, **tile: int) -> dict[str, np.ndarray | None]:
    problem, operands = case.problem(), (arrays.q, arrays.k, arrays.v)
    out, lse = numpy_backend.forward(problem, *operands, **arrays.features, **tile)
    gradients = numpy_backend.backward(
        problem, arrays.dout, *operands, out, lse, dlse=arrays.dlse, **arrays.features, **tile
    )
    return {"out": out, "lse": lse, **gradients._asdict()}


def dense_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention as it is usually written in NumPy, all heads at once."""
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * q.dtype.type(q.shape[3] ** -0.5)
    scores = np.where(np.tri(q.shape[2], k.shape[2], dtype=bool), scores, q.dtype.type(-np.inf))
    scores -= scores.max(axis=3, keepdims=True)
    p = np.exp(scores, out=scores)
    p /= p.sum(axis=3, keepdims=True)
    return (p @ v).swapaxes(1, 2)


def peak_memory(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("tile", [(16, 16), (7, 13), (64, 32), (1, 1000), (1000, 1)], ids=str)
def test_any_tile_size_gives_the_answer(tile):
    problem, arrays = RICH.problem(), RICH.arrays()
    report = testing.check(run(RICH, arrays, block_m=tile[0], block_n=tile[1]), problem, arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", [RICH, Case("plain", seqlen_q=777, seqlen_k=511)], ids=str)
def test_repeats_are_equal_in_every_bit(case):
    arrays = case.arrays()
    first = run(case, arrays)
    for _ in range(3):
        again = run(case, arrays)
        for name, value in first.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("used", "causal+used", "sinks+used")], ids=str)
def test_absent_rows_and_keys_take_part_in_nothing(case):
    clean, poisoned = case.arrays(), case.arrays()
    for batch in range(case.batch):
        for array in (poisoned.q, poisoned.dout):
            array[batch, case.seqused_q[batch] :] = np.nan
        for array in (poisoned.k, poisoned.v):
            array[batch, case.seqused_k[batch] :] = np.nan
    expected, actual = run(case, clean), run(case, poisoned)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    for batch in range(case.batch):
        for name in ("out", "dq"):
            assert not actual[name][batch, case.seqused_q[batch] :].any()
        for name in ("dk", "dv"):
            assert not actual[name][batch, case.seqused_k[batch] :].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["k", "v"])
def test_a_non_finite_key_reaches_the_rows_that_see_it(operand, value):
    case, key, block = Case("causal", causal=True, dtype="float32"), 50, 16
    arrays = case.arrays()
    clean = run(case, arrays, block_m=block, block_n=block)
    getattr(arrays, operand)[0, key, 0] = value
    dirty = run(case, arrays, block_m=block, block_n=block)
    seeing, other_tiles = slice(key, None), slice(0, key // block * block)
    assert (~np.isfinite(dirty["out"][0, seeing, 0])).any(axis=1).all()
    for name in ("out", "dq"):
        np.testing.assert_array_equal(dirty[name][0, other_tiles], clean[name][0, other_tiles])
        np.testing.assert_array_equal(dirty[name][0, :, 1], clean[name][0, :, 1], err_msg="the other head")
    if operand == "k":
        assert np.isnan(dirty["lse"][0, 0, seeing]).all()


def test_a_nan_score_at_a_masked_pair_vanishes():
    case, key = Case("causal", causal=True, dtype="float32"), 50
    arrays = case.arrays()
    clean = run(case, arrays)  # one tile holds all rows and keys
    arrays.k[0, key, 0] = np.nan
    dirty = run(case, arrays)
    np.testing.assert_array_equal(dirty["out"][0, :key], clean["out"][0, :key])
    np.testing.assert_array_equal(dirty["lse"][0, :, :key], clean["lse"][0, :, :key])


def test_a_nan_gradient_of_p_at_a_masked_pair_vanishes():
    case, key = Case("causal", causal=True, dtype="float32"), 50
    problem, arrays = case.problem(), case.arrays()
    out, lse = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v)

    def gradients() -> Gradients:
        return numpy_backend.backward(problem, arrays.dout, arrays.q, arrays.k, arrays.v, out, lse)

    clean = gradients()
    arrays.v[0, key, 0] = np.nan
    np.testing.assert_array_equal(gradients().dq[0, :key], clean.dq[0, :key])


def test_a_sink_of_minus_infinity_is_no_sink():
    empty_rows = {"seqlen_q": 203, "seqlen_k": 65, "causal": True, "dtype": "float32", "dlse": True}
    case, without = Case("sinks", **empty_rows, sinks=True), Case("plain", **empty_rows)
    arrays, plain = case.arrays(), without.arrays()
    arrays.sinks[:] = -np.inf
    arrays.dlse = plain.dlse
    actual, expected = run(case, arrays), run(without, plain)
    np.testing.assert_array_equal(actual.pop("dsinks"), 0)
    for name, value in actual.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_nan_query_stays_in_its_row():
    case, row = Case("causal", causal=True, dtype="float32"), 50
    arrays = case.arrays()
    clean = run(case, arrays)
    arrays.q[0, row, 0] = np.nan
    dirty = run(case, arrays)
    others = np.arange(case.seqlen_q) != row
    assert np.isnan(dirty["out"][0, row, 0]).all() and np.isnan(dirty["lse"][0, 0, row])
    for name in ("out", "dq"):
        np.testing.assert_array_equal(dirty[name][0, others], clean[name][0, others])


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "reversed"])
def test_memory_is_linear_in_the_length(strides):
    def peak(seqlen: int) -> int:
        case = Case("long", seqlen_q=seqlen, seqlen_k=seqlen, num_heads=1, num_kv_heads=1, head_dim=16, strides=strides)
        arrays = case.arrays()
        return peak_memory(lambda: run(case, arrays))

    assert peak(2048) < 4.5 * peak(512)


def test_the_forward_needs_a_tenth_of_the_dense_memory():
    problem, arrays = LONG.problem(), LONG.arrays()
    operands = arrays.q, arrays.k, arrays.v
    tiled = peak_memory(lambda: numpy_backend.forward(problem, *operands))
    assert tiled < 0.1 * peak_memory(lambda: dense_forward(*operands))


@pytest.mark.slow
def test_the_forward_is_not_slower_than_the_dense_formula():
    problem, arrays = LONG.problem(), LONG.arrays()
    operands = arrays.q, arrays.k, arrays.v
    np.testing.assert_allclose(numpy_backend.forward(problem, *operands)[0], dense_forward(*operands), atol=1e-5)
    rounds = [
        (seconds(lambda: numpy_backend.forward(problem, *operands)), seconds(lambda: dense_forward(*operands)))
        for _ in range(3)
    ]
    tiled, dense = map(min, zip(*rounds, strict=True))
    assert tiled <= dense
