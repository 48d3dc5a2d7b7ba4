"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import Case

from cuflash.backends import numpy_backend
from cuflash.merging import merge
from cuflash.testing import check


def parts_of(case: Case, cuts: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Attention without a mask over consecutive pieces of the keys, cut at ``cuts``."""
    arrays = case.arrays()
    results = []
    for start, end in zip([0, *cuts], [*cuts, case.seqlen_k], strict=True):
        part = Case("part", seqlen_q=case.seqlen_q, seqlen_k=end - start, num_heads=case.num_heads, dtype=case.dtype)
        keys = slice(start, end)
        results.append(numpy_backend.forward(part.problem(), arrays.q, arrays.k[:, keys], arrays.v[:, keys]))
    outs, lses = zip(*results, strict=True)
    return list(outs), list(lses)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cuts", [[], [64], [1, 2, 50], [0, 113, 113]], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_parts_make_the_whole(dtype, cuts, sinks):
    case = Case("whole", seqlen_q=65, num_heads=4, dtype=dtype, sinks=sinks)
    arrays = case.arrays()
    out, lse = merge(*parts_of(case, cuts), sinks=arrays.sinks)
    report = check({"out": out, "lse": lse}, case.problem(), arrays)
    assert report.ok, f"\n{report}"
    assert out.dtype == lse.dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_low_precision_parts_are_added_in_float32(dtype):
    outs = [np.full((1, 1, 1, 2), value, dtype) for value in (1.0, 3.0)]
    lses = [np.full((1, 1, 1), value, np.float32) for value in (0.0, np.log(3))]
    out, lse = merge(outs, lses)
    assert out.dtype == dtype and lse.dtype == np.float32
    np.testing.assert_array_equal(out.astype(np.float32), 2.5)
    np.testing.assert_allclose(lse, np.log(4), rtol=1e-6)


def test_layouts_agree():
    outs, lses = parts_of(Case("whole", num_heads=4, dtype="float64"), [40])
    out, lse = merge(outs, lses)
    other, other_lse = merge([out.swapaxes(1, 2) for out in outs], lses, layout="bhsd")
    np.testing.assert_array_equal(other.swapaxes(1, 2), out)
    np.testing.assert_array_equal(other_lse, lse)


def test_rows_without_keys():
    generator = np.random.default_rng(0)
    full, empty = generator.normal(size=(1, 2, 3, 4)), np.zeros((1, 2, 3, 4))
    lse, no_lse = generator.normal(size=(1, 3, 2)), np.full((1, 3, 2), -np.inf)
    sinks = np.array([0.5, -1.0, 2.0], np.float32)

    out, merged = merge([empty, full], [no_lse, lse])
    np.testing.assert_allclose(out, full, rtol=1e-15)
    np.testing.assert_allclose(merged, lse, rtol=1e-15)

    out, merged = merge([empty, empty], [no_lse, no_lse])
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(merged, -np.inf)

    out, merged = merge([empty, empty], [no_lse, no_lse], sinks=sinks)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(merged, np.broadcast_to(sinks[:, None], (1, 3, 2)))


def test_a_nan_is_not_merged_away():
    lse = np.zeros((1, 1, 2))
    lse[0, 0, 1] = np.nan
    out, merged = merge([np.ones((1, 2, 1, 3))] * 2, [np.zeros((1, 1, 2)), lse])
    assert np.isnan(merged[0, 0, 1]) and np.isnan(out[0, 1]).all()
    assert np.isfinite(merged[0, 0, 0]) and np.isfinite(out[0, 0]).all()


def test_arrays_of_another_library():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    outs, lses = parts_of(Case("whole", num_heads=4, dtype="float64"), [40])
    sinks = np.linspace(-1, 1, 4)
    expected, expected_lse = merge(outs, lses, sinks=sinks)
    tensors, tensor_lses = ([torch.from_numpy(array) for array in arrays] for arrays in (outs, lses))
    out, lse = merge(tensors, tensor_lses, sinks=torch.from_numpy(sinks))
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-12)


OUT, LSE = np.zeros((1, 5, 3, 2)), np.zeros((1, 3, 5))


@pytest.mark.parametrize(
    "outs, lses, keywords, message",
    [
        ([], [], {}, "at least 1"),
        ([OUT, OUT], [LSE], {}, "outs has 2 parts and lses 1"),
        ([OUT[0]], [LSE], {}, "must have four axes"),
        ([OUT, OUT[:, :4]], [LSE, LSE], {}, r"outs\[1\] has shape"),
        ([OUT], [LSE.swapaxes(1, 2)], {}, r"lses\[0\] has shape \(1, 5, 3\); it must be \(1, 3, 5\)"),
        ([OUT], [LSE], {"sinks": np.zeros(5)}, "sinks has shape"),
        ([OUT], [LSE], {"layout": "sbhd"}, "layout is 'sbhd'"),
    ],
)
def test_wrong_parts(outs, lses, keywords, message):
    with pytest.raises(ValueError, match=message):
        merge(outs, lses, **keywords)
