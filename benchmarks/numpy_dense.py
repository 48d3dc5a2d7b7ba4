"""The NumPy backend beside the dense formula in NumPy: time and peak memory on a machine without a GPU.

    OPENBLAS_NUM_THREADS=1 PYTHONPATH=. python -m benchmarks.numpy_dense

One BLAS thread makes the two comparable on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import record
from benchmarks.inputs import random_inputs
from benchmarks.reference import Gate
from benchmarks.timing import HostClock, Job, interleave
from benchmarks.workloads import Cell

COLUMNS = (
    *record.ENVIRONMENT_COLUMNS, "provider", "pass", *record.PROBLEM_COLUMNS, "run",
    "ms_median", "ms_p20", "ms_p80", "peak_bytes", "blas_threads", "max_error_ratio", "ok",
)  # fmt: skip
CELL = Cell(1, 4096, 4096, 1, 1, 64, 64, "causal", "plain", "float32")


def dense_attention(q, k, v, scale: float):
    """Causal attention as one writes it in NumPy, (batch, heads, seqlen, seqlen) scores and all."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * np.float32(scale)
    scores = np.where(np.tri(q.shape[2], k.shape[2], dtype=bool), scores, np.float32(-np.inf))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return (scores @ v).swapaxes(1, 2)


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that NumPy held at once for the call, its result included."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure(cell: Cell, rounds: int) -> list[dict]:
    import cuflash

    arrays = random_inputs(cell, np)
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    calls = {
        "numpy_dense": lambda: dense_attention(q, k, v, cell.softmax_scale),
        "cuflash_numpy": lambda: cuflash.attention(q, k, v, causal=True),
    }
    gate = Gate(cell, arrays, backward=False)
    ratios = {name: gate.error_ratio({"out": call()}) for name, call in calls.items()}
    clock = HostClock(launches=2)
    samples = interleave([Job(name, call, clock) for name, call in calls.items()], rounds, idle=0)
    environment, run = record.environment(), record.new_run()
    return [
        {
            **environment, "provider": name, "pass": "fwd", **cell.problem_columns(), "run": run,
            "ms_median": f"{sample.median:.6g}", "ms_p20": f"{sample.p20:.6g}", "ms_p80": f"{sample.p80:.6g}",
            "peak_bytes": peak_bytes(calls[name]), "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
            "max_error_ratio": f"{ratios[name]:.4g}", "ok": ratios[name] <= 1,
        }
        for name, sample in samples.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numpy_dense", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    rows = measure(CELL, args.rounds)
    for row in rows:
        Console().print(f"{row['provider']:14} {row['ms_median']:>10} ms, peak {row['peak_bytes'] / 2**20:8.1f} MiB")
    record.append_rows(args.out / "numpy.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
