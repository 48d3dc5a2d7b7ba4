"""The NumPy backend against the dense float64 oracle, on every shared case."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES, WIDE_CASES, Case, poisoned

from cuflash import testing
from cuflash.backends import numpy_backend


@pytest.mark.parametrize("case", CASES + WIDE_CASES, ids=str)
def test_forward_and_backward(case: Case):
    problem, arrays = case.problem(), case.arrays()
    for operand in (arrays.q, arrays.k, arrays.v, arrays.dout):
        operand.flags.writeable = False

    out, lse = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v, **arrays.features)
    assert out.dtype == arrays.q.dtype
    assert lse.dtype == problem.accumulator
    gradients = numpy_backend.backward(
        problem, arrays.dout, arrays.q, arrays.k, arrays.v, out, lse, dlse=arrays.dlse, **arrays.features
    )
    assert {gradients.dq.dtype, gradients.dk.dtype, gradients.dv.dtype} == {arrays.q.dtype}

    report = testing.check({"out": out, "lse": lse, **gradients._asdict()}, problem, arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", [case for case in CASES if "used" in case.id or "strides" in case.id], ids=str)
def test_out_is_written_where_it_lies_and_nowhere_else(case: Case):
    problem, arrays = case.problem(), case.arrays()
    expected, _ = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v, **arrays.features)
    batch, seqlen_q, heads, head_dim_v = problem.out_shape
    memory = poisoned((batch, heads, seqlen_q + 2, head_dim_v + 4), expected.dtype)
    out = memory[:, :, 1:-1, 2:-2].swapaxes(1, 2)

    returned, _ = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v, **arrays.features, out=out)
    assert returned is out
    np.testing.assert_array_equal(out, expected)
    out[:] = np.nan
    assert np.isnan(memory).all()


IN_PLACE = [Case("plain"), Case("gqa", num_heads=8, causal=True), Case("long", seqlen_q=700)]


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_out_may_be_q(case: Case):
    problem, arrays = case.problem(), case.arrays()
    expected, expected_lse = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v)
    out, lse = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v, out=arrays.q)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
