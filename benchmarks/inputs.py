"""Random operands of a cell, on the host or on the device."""

from __future__ import annotations

import numpy as np

from benchmarks.workloads import Cell


def numpy_dtype(name: str) -> np.dtype:
    """NumPy dtype by name; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def random_inputs(cell: Cell, xp, seed: int = 0) -> dict:
    """Standard-normal q, k, v and dout of a cell in canonical order, and the slopes or sinks that it takes.

    ``xp`` is numpy or cupy; the numbers of the two differ.
    """
    rng = xp.random.default_rng(seed)
    dtype = numpy_dtype(cell.dtype)
    shapes = {
        "q": (cell.batch, cell.seqlen_q, cell.num_heads, cell.head_dim),
        "k": (cell.batch, cell.seqlen_k, cell.num_kv_heads, cell.head_dim),
        "v": (cell.batch, cell.seqlen_k, cell.num_kv_heads, cell.head_dim_v),
        "dout": (cell.batch, cell.seqlen_q, cell.num_heads, cell.head_dim_v),
    }
    arrays = {name: rng.standard_normal(shape, dtype=np.float32).astype(dtype) for name, shape in shapes.items()}
    if cell.feature == "alibi":
        # The geometric slopes of the ALiBi paper.
        heads = xp.arange(1, cell.num_heads + 1)
        arrays["alibi_slopes"] = (2.0 ** (-8.0 * heads / cell.num_heads)).astype(np.float32)
    if cell.feature == "sinks":
        arrays["sinks"] = rng.standard_normal(cell.num_heads, dtype=np.float32)
    return arrays
