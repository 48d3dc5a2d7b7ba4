"""What a call costs on the host, and how long the first call of a new kernel takes.

    PYTHONPATH=. python -m benchmarks.host             # microseconds a call -> host_overhead.csv
    PYTHONPATH=. python -m benchmarks.host --start     # seconds of a first call, cold and from the disk -> compile.csv

Host time is the wall time of 1,000 enqueues of a small problem with one wait at the end, median of five.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import record
from benchmarks.inputs import random_inputs
from benchmarks.workloads import Cell

SMALL = Cell(1, 128, 128, 2, 2, 64, 64, "causal")
ENQUEUES, REPEATS = 1000, 5
HOST_COLUMNS = (
    *record.ENVIRONMENT_COLUMNS,
    "provider",
    "arrays",
    "pass",
    *record.PROBLEM_COLUMNS,
    "us_per_call",
    "repeats",
)
COMPILE_COLUMNS = (*record.ENVIRONMENT_COLUMNS, "pass", *record.PROBLEM_COLUMNS, "start", "seconds")
START_CELLS = (SMALL, Cell(1, 256, 256, 2, 1, 128, 128, "causal"), Cell(1, 256, 256, 2, 2, 256, 256, "full"))


def microseconds(
    call: Callable[[], object], wait: Callable[[], object], *, enqueues=ENQUEUES, repeats=REPEATS
) -> float:
    """Median over ``repeats`` of the wall time of ``enqueues`` calls and one wait, for one call."""
    for _ in range(10):
        call()
    wait()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(enqueues):
            call()
        wait()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / enqueues


def calls(kind: str) -> tuple[dict[tuple[str, str], Callable[[], object]], Callable[[], None]]:
    """What is called with CuPy arrays or torch tensors by (provider, pass), and how to wait for it."""
    import cupy

    import cuflash

    arrays = random_inputs(SMALL, cupy)
    wait = cupy.cuda.Device().synchronize
    if kind == "torch":
        import torch

        arrays = {name: torch.from_dlpack(array) for name, array in arrays.items()}
        wait = torch.cuda.synchronize
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    out, lse = cuflash.attention(q, k, v, causal=True, return_lse=True)
    found = {
        ("cuflash", "fwd"): lambda: cuflash.attention(q, k, v, causal=True),
        ("cuflash", "bwd"): lambda: cuflash.attention_backward(dout, q, k, v, out, lse, causal=True),
    }
    if kind == "torch":
        sdpa = torch.nn.functional.scaled_dot_product_attention
        transposed = [x.transpose(1, 2) for x in (q, k, v)]
        found["torch_sdpa", "fwd"] = lambda: sdpa(*transposed, is_causal=True)
    return found, wait


def measure_host(console: Console) -> list[dict]:
    environment, rows = record.environment(), []
    for kind in ("cupy", "torch"):
        try:
            found, wait = calls(kind)
        except ImportError as error:
            console.print(f"[yellow]{kind} is absent:[/] {error}")
            continue
        for (provider, pass_), call in found.items():
            us = microseconds(call, wait)
            rows.append({
                **environment, "provider": provider, "arrays": kind, "pass": pass_, **SMALL.problem_columns(),
                "us_per_call": f"{us:.4g}", "repeats": REPEATS,
            })  # fmt: skip
            console.print(f"{provider:12} {kind:6} {pass_} {us:8.2f} us")
    return rows


# Runs in a fresh process. CUDA's start, CuPy's own kernels and the operands are not the library's.
FIRST_CALLS = """
import json, sys, time
import cupy
import cuflash
from benchmarks.host import START_CELLS
from benchmarks.inputs import random_inputs
seconds = []
for cell in START_CELLS:
    arrays = random_inputs(cell, cupy)
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    synchronize = cupy.cuda.Device().synchronize
    synchronize()
    begin = time.perf_counter()
    out, lse = cuflash.attention(q, k, v, causal=cell.causal, return_lse=True)
    synchronize()
    middle = time.perf_counter()
    cuflash.attention_backward(dout, q, k, v, out, lse, causal=cell.causal)
    synchronize()
    seconds.append((middle - begin, time.perf_counter() - middle))
json.dump(seconds, sys.stdout)
"""


def first_calls(cache: str) -> list[list[float]]:
    """(forward, backward) seconds of each first call in a new process that keeps its kernels in ``cache``."""
    folders = [str(record.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "CUPY_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, "-c", FIRST_CALLS]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure_start(console: Console) -> list[dict]:
    environment, rows = record.environment(), []
    with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "disk cache"):
            for cell, seconds in zip(START_CELLS, first_calls(cache), strict=True):
                for pass_, value in zip(("fwd", "bwd"), seconds, strict=True):
                    rows.append({
                        **environment, "pass": pass_, **cell.problem_columns(), "start": start,
                        "seconds": f"{value:.4g}",
                    })  # fmt: skip
                    console.print(f"{start:10} {cell.name:16} {pass_} {value:7.3f} s")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--start", action="store_true", help="first calls instead of host time")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    if args.start:
        record.append_rows(args.out / "compile.csv", COMPILE_COLUMNS, measure_start(Console()))
    else:
        record.append_rows(args.out / "host_overhead.csv", HOST_COLUMNS, measure_host(Console()))


if __name__ == "__main__":
    main()
