"""Exact attention without the S x S matrix, forward and backward, for NumPy, CuPy, PyTorch and JAX arrays.

>>> import numpy as np, cuflash
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 128, 8, 64)).astype(np.float16)
>>> out = cuflash.attention(q, k, v, causal=True)
"""

from __future__ import annotations

from cuflash.api import Gradients, attention, attention_backward, backends, explain, supports, vjp, warmup
from cuflash.dropout import dropout_mask
from cuflash.merging import merge

__version__ = "0.1.0"

__all__ = [
    "Gradients",
    "attention",
    "attention_backward",
    "backends",
    "dropout_mask",
    "explain",
    "merge",
    "supports",
    "vjp",
    "warmup",
]
