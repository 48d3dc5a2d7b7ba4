"""The device drops what `cuflash.dropout_mask` says, forward and backward, at every tile size."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

import cuflash
from cuflash.testing import numpy_dtype

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(113, 203), (256, 256), (129, 65)])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.97])
def test_dropped_scores_are_the_masks(seqlen_q: int, seqlen_k: int, dropout_p: float, dtype: str):
    # Zero queries make every probability alike, and unit rows of v (of dout) let out (dv) show each one by itself.
    batch, heads, seed, offset = 2, 3, 0xDEADBEEFCAFE, 7
    dtype = numpy_dtype(dtype)
    q = cupy.zeros((batch, seqlen_q, heads, 64), dtype)
    k = cupy.zeros((batch, seqlen_k, heads, 64), dtype)
    v = unit_rows(batch, seqlen_k, heads, seqlen_k, dtype)
    keywords = {"dropout_p": dropout_p, "seed": seed, "offset": offset}
    expected = cuflash.dropout_mask((batch, heads, seqlen_q, seqlen_k), **keywords)

    out = cuflash.attention(q, k, v, **keywords)
    kept = cupy.asnumpy(out.transpose(0, 2, 1, 3)) != 0
    np.testing.assert_array_equal(kept, expected)

    wide = max(seqlen_q, seqlen_k)
    v = cupy.ones((batch, seqlen_k, heads, wide), dtype)
    dout = unit_rows(batch, seqlen_q, heads, wide, dtype)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **keywords)
    dv = cuflash.attention_backward(dout, q, k, v, out, lse, **keywords).dv
    kept = cupy.asnumpy(dv.transpose(0, 2, 3, 1))[:, :, :seqlen_q] != 0
    np.testing.assert_array_equal(kept, expected)


def unit_rows(batch: int, seqlen: int, heads: int, width: int, dtype: np.dtype) -> cupy.ndarray:
    """Row i has a one in column i; (batch, seqlen, heads, width)."""
    rows = cupy.eye(seqlen, width, dtype=np.float32).astype(dtype)
    return cupy.ascontiguousarray(cupy.broadcast_to(rows[None, :, None, :], (batch, seqlen, heads, width)))
