"""What the board can do at best, measured in the same run: a copy of device memory and a large matrix product."""

from __future__ import annotations

import statistics

from benchmarks.timing import EventClock

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192


def measure() -> dict[str, str]:
    """``copy_tb_per_s`` (bytes read plus written) and ``matmul_tflops`` (bfloat16 through torch, else float16)."""
    import cupy

    copy_ms = statistics.median(EventClock().burst(_copy()))
    cupy.get_default_memory_pool().free_all_blocks()
    matmul_ms = statistics.median(EventClock().burst(_matmul()))
    return {
        "copy_tb_per_s": f"{2 * COPY_BYTES / copy_ms * 1e-9:.4g}",
        "matmul_tflops": f"{2 * MATMUL_SIZE**3 / matmul_ms * 1e-9:.4g}",
    }


def _copy():
    import cupy

    source = cupy.ones(COPY_BYTES // 4, cupy.float32)
    target = cupy.empty_like(source)
    return lambda: cupy.copyto(target, source)


def _matmul():
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    try:
        import torch

        a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return lambda: torch.matmul(a, b)
    except ImportError:
        import cupy

        a, b = (cupy.random.standard_normal(shape, dtype=cupy.float32).astype(cupy.float16) for _ in range(2))
        return lambda: cupy.matmul(a, b)
