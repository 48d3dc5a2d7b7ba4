"""The dense oracle against finite differences and against SciPy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from cases import FEATURES, Case
from scipy.special import logsumexp, softmax

from cuflash import testing

TINY = {"seqlen_q": 5, "seqlen_k": 6, "head_dim": 3, "head_dim_v": 2, "dtype": "float64"}
LENGTHS = {"seqused_q": (5, 3), "seqused_k": (4, 6)}
GRADIENT_CASES = [
    Case("plain", **TINY),
    *(Case(name, **TINY | feature | (LENGTHS if name == "used" else {})) for name, feature in FEATURES.items()),
    Case("window", **TINY | {"window_size": (1, 2)}),
    Case("empty-rows", **TINY | {"seqlen_q": 9}, causal=True, dlse=True),
    Case("empty-rows-sinks", **TINY | {"seqlen_q": 9}, causal=True, sinks=True, dlse=True),
    Case("top-left", **TINY, causal="top_left", alibi="batch", batch=2),
    Case("scale", **TINY, softmax_scale=-0.7, softcap=0.8),
    Case("all", **TINY | LENGTHS, batch=2, num_heads=4, causal=True, window_size=(3, 0), softcap=0.9, alibi="batch",
         sinks=True, dropout_p=0.3, dlse=True),
]  # fmt: skip


def loss(case: Case, arrays: testing.Arrays) -> float:
    """A scalar whose gradients by out and lse are dout and dlse; rows without keys have no lse to derive."""
    out, lse = testing.oracle_forward(case.problem(), arrays.q, arrays.k, arrays.v, **arrays.features)
    value = np.sum(out * arrays.dout)
    if arrays.dlse is not None:
        value += np.sum(np.where(np.isfinite(lse), lse, 0) * arrays.dlse)
    return float(value)


def finite_difference(case: Case, arrays: testing.Arrays, name: str, step: float = 1e-5) -> np.ndarray:
    """Central differences by every element of an operand."""
    operand = getattr(arrays, name).astype(np.float64)
    setattr(arrays, name, operand)
    gradient = np.empty_like(operand)
    for index in np.ndindex(operand.shape):
        value = operand[index]
        operand[index] = value + step
        above = loss(case, arrays)
        operand[index] = value - step
        gradient[index] = (above - loss(case, arrays)) / (2 * step)
        operand[index] = value
    return gradient


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_are_finite_differences(case: Case):
    arrays = case.arrays()
    gradients = testing.oracle_backward(
        case.problem(), arrays.dout, arrays.q, arrays.k, arrays.v, dlse=arrays.dlse, **arrays.features
    )
    for name in ("q", "k", "v", "sinks"):
        if getattr(arrays, name) is not None:
            expected = finite_difference(case, case.arrays(), name)
            np.testing.assert_allclose(gradients[f"d{name}"], expected, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_is_scipys_softmax(causal, sinks):
    case = Case("scipy", seqlen_q=31, seqlen_k=43, num_heads=4, dtype="float64", causal=causal, sinks=sinks)
    arrays = case.arrays()
    out, lse = testing.oracle_forward(case.problem(), arrays.q, arrays.k, arrays.v, **arrays.features)
    for head in range(4):
        logits = arrays.q[0, :, head] @ arrays.k[0, :, head // 2].T / np.sqrt(64)
        if causal:
            logits[np.triu_indices(31, k=43 - 31 + 1, m=43)] = -np.inf
        if sinks:
            logits = np.column_stack([logits, np.full(31, arrays.sinks[head])])
        p = softmax(logits, axis=1)[:, :43]
        np.testing.assert_allclose(out[0, :, head], p @ arrays.v[0, :, head // 2], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(lse[0, head], logsumexp(logits, axis=1), rtol=1e-12)


def test_scores_far_from_zero_neither_overflow_nor_vanish():
    case = Case("large", num_heads=1, num_kv_heads=1, dtype="float64", softmax_scale=300.0)
    arrays = case.arrays()
    out, lse = testing.oracle_forward(case.problem(), arrays.q, arrays.k, arrays.v)
    logits = 300.0 * arrays.q[0, :, 0] @ arrays.k[0, :, 0].T
    np.testing.assert_allclose(lse[0, 0], logsumexp(logits, axis=1), rtol=1e-12)
    np.testing.assert_allclose(out[0, :, 0], softmax(logits, axis=1) @ arrays.v[0, :, 0], rtol=1e-9, atol=1e-12)
