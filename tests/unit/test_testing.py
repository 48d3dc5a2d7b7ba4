"""The judge itself: the dense oracle against numbers worked out by hand, the bound against planted errors."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from cases import Case

from cuflash import testing

BASE = Case("base", seqlen_q=33, seqlen_k=47, causal=True, dtype="float16")


def right_answer(case: Case) -> tuple:
    problem, arrays = case.problem(), case.arrays()
    bounds = testing.error_bound(problem, arrays)
    return problem, arrays, {name: bound.exact.copy() for name, bound in bounds.items()}, bounds


def test_oracle_on_one_query_and_two_keys():
    case = Case("hand", seqlen_q=1, seqlen_k=2, num_heads=1, num_kv_heads=1, head_dim=1, dtype="float64")
    q, k, v = (np.array(values, float).reshape(1, -1, 1, 1) for values in ([2.0], [0.0, math.log(3) / 2], [1.0, 5.0]))
    out, lse = testing.oracle_forward(case.problem(), q, k, v)
    assert out.item() == pytest.approx(0.25 * 1 + 0.75 * 5)  # exp(0) : exp(log 3) = 1 : 3
    assert lse.item() == pytest.approx(math.log(4))

    gradients = testing.oracle_backward(case.problem(), np.ones((1, 1, 1, 1)), q, k, v)
    ds = 0.75 * (5 - 4)  # of the second score; of the first the opposite
    np.testing.assert_allclose(gradients["dv"].ravel(), [0.25, 0.75])
    np.testing.assert_allclose(gradients["dk"].ravel(), [-2 * ds, 2 * ds])
    np.testing.assert_allclose(gradients["dq"].ravel(), [ds * math.log(3) / 2])
    assert gradients["dsinks"] is None


def test_oracle_in_another_dtype():
    problem, arrays = BASE.problem(), BASE.arrays()
    out, lse = testing.oracle_forward(problem, arrays.q, arrays.k, arrays.v, dtype=np.float32)
    assert out.dtype == lse.dtype == np.float32


def test_low_precision_rounds_to_the_dtype_and_is_near_the_oracle():
    problem, arrays, exact, _ = right_answer(BASE)
    out, lse = testing.low_precision_forward(problem, arrays)
    np.testing.assert_array_equal(out, out.astype(np.float16))
    assert not np.array_equal(out, exact["out"])
    np.testing.assert_allclose(lse, exact["lse"], rtol=1e-5)
    gradients = testing.low_precision_backward(problem, arrays)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(gradients[name], gradients[name].astype(np.float16))
        assert np.abs(gradients[name] - exact[name]).max() < 0.05


def test_the_bound_is_the_documented_formula():
    problem, arrays, exact, bounds = right_answer(BASE)
    low = testing.low_precision_backward(problem, arrays)
    for name in ("dq", "dk", "dv"):
        error = np.abs(low[name] - exact[name])
        tiny = 8 * np.finfo(np.float32).eps * (1 + np.abs(exact[name]).max()) * math.sqrt(47)
        assert bounds[name].max == pytest.approx(2 * error.max() + tiny)
        assert bounds[name].mean == pytest.approx(1.5 * error.mean() + tiny)


def test_the_bound_of_dsinks_adds_the_errors_of_its_rows():
    case = Case("sinks", seqlen_q=65, num_heads=8, sinks=True)
    problem, arrays, exact, bounds = right_answer(case)
    low = testing.low_precision_backward(problem, arrays)["dsinks"]
    cancelled = np.abs(low - exact["dsinks"]).max()
    assert cancelled < bounds["dsinks"].max < 20 * cancelled


def test_the_oracle_itself_is_right():
    problem, arrays, exact, bounds = right_answer(BASE)
    report = testing.check(exact, problem, arrays, bounds)
    assert report.ok
    assert set(report.outputs) == {"out", "lse", "dq", "dk", "dv"}
    assert all(error.max_ratio == error.mean_ratio == 0 for error in report.outputs.values())


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 0.1])
def test_one_wrong_element_is_found(name, wrong):
    problem, arrays, actual, bounds = right_answer(BASE)
    actual[name].reshape(-1)[-1] += wrong
    report = testing.check(actual, problem, arrays, bounds)
    assert not report.ok
    assert [found for found, error in report.outputs.items() if not error.ok] == [name]
    assert f"{name}: " in str(report) and "wrong" in str(report)


def test_many_small_errors_are_found_by_their_mean():
    problem, arrays, actual, bounds = right_answer(BASE)
    actual["out"] += 0.9 * bounds["out"].max
    error = testing.check(actual, problem, arrays, bounds).outputs["out"]
    assert error.max_ratio < 1 < error.mean_ratio
    assert not error.ok


def test_an_empty_row_needs_its_infinity():
    case = Case("empty", seqlen_q=9, seqlen_k=4, causal=True)
    problem, arrays, actual, bounds = right_answer(case)
    assert np.isneginf(actual["lse"][:, :, :5]).all()
    assert testing.check({"lse": actual["lse"]}, problem, arrays, bounds).ok
    for wrong in (0.0, np.inf, np.nan, -1e30):
        actual["lse"][0, 0, 0] = wrong
        assert not testing.check({"lse": actual["lse"]}, problem, arrays, bounds).ok


def test_bounds_are_made_where_none_are_given():
    problem, arrays, actual, _ = right_answer(BASE)
    assert testing.check({"out": actual["out"], "dq": None}, problem, arrays).ok
    assert testing.check({"dq": actual["dq"]}, problem, arrays).ok
    forward_only = testing.Arrays(arrays.q, arrays.k, arrays.v)
    assert testing.check({"out": actual["out"], "lse": actual["lse"]}, problem, forward_only).ok
    assert set(testing.error_bound(problem, forward_only)) == {"out", "lse"}


def test_a_wrong_shape_is_an_error():
    problem, arrays, actual, bounds = right_answer(BASE)
    with pytest.raises(ValueError, match="out has shape"):
        testing.check({"out": actual["out"][:, :-1]}, problem, arrays, bounds)


def test_random_arrays_fit_the_problem():
    case = Case("all", batch=3, num_heads=4, alibi="batch", sinks=True, seqused_q=(1, 2, 3), seqused_k=(1, 2, 3))
    problem = case.problem()
    arrays = testing.random_arrays(problem, 7, dlse=True)
    assert (arrays.q.shape, arrays.k.shape, arrays.v.shape) == (problem.q.shape, problem.k.shape, problem.v.shape)
    assert arrays.dout.shape == problem.out_shape and arrays.dlse.shape == problem.lse_shape
    assert {array.dtype for array in (arrays.q, arrays.k, arrays.v, arrays.dout)} == {np.dtype(ml_dtypes.bfloat16)}
    assert arrays.alibi_slopes.shape == (3, 4) and arrays.sinks.shape == (4,)
    assert arrays.seqused_q.dtype == arrays.seqused_k.dtype == np.int32
    assert abs(float(arrays.q.astype(float).std()) - 1) < 0.05
    np.testing.assert_array_equal(testing.random_arrays(problem, 7).q, arrays.q)
    assert not np.array_equal(testing.random_arrays(problem, 8).q, arrays.q)


def test_random_arrays_makes_only_what_the_problem_names():
    arrays = testing.random_arrays(BASE.problem(), 0)
    assert arrays.dlse is None
    assert set(arrays.features.values()) == {None}
