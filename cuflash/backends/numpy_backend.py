"""Attention on NumPy arrays: the kernels' algorithm, their loops and their names, on the CPU.

float16, bfloat16 (``ml_dtypes``), float32 and float64; accumulation in float32, for float64 data in float64.
"""

from __future__ import annotations

from cuflash.backends.numpy_backward import backward
from cuflash.backends.numpy_forward import forward

__all__ = ["backward", "forward"]
