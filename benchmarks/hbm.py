"""The first figure of the FlashAttention paper again: FLOP, bytes of device memory, run time, standard beside ours.

    PYTHONPATH=. python -m benchmarks.hbm

The bytes are counted by the profiler (``ncu``), which runs this module again as a child; the run times are taken
without it.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import record
from benchmarks.inputs import random_inputs
from benchmarks.standard import StandardAttention
from benchmarks.timing import EventClock, Job, interleave
from benchmarks.workloads import Cell

COLUMNS = (
    *record.ENVIRONMENT_COLUMNS, "provider", *record.PROBLEM_COLUMNS,
    "gflop", "read_bytes", "written_bytes", "ms", "kernels",
)  # fmt: skip
METRICS = {"read_bytes": "dram__bytes_read.sum", "written_bytes": "dram__bytes_write.sum"}
# GPT-2 medium's attention (16 heads of 64, 1024 tokens, batch 64), forward and backward, without mask and dropout.
CELL = Cell(64, 1024, 1024, 16, 16, 64, 64, "full", "plain", "float16")
PROVIDERS = ("standard", "cuflash")
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


def gflop(provider: str, cell: Cell) -> float:
    """Matrix-product FLOP of forward and backward: ours makes the scores twice, standard attention keeps them."""
    products = 6 if provider == "standard" else 7
    return 2 * products * cell.batch * cell.num_heads * cell.visible_pairs() * cell.head_dim * 1e-9


def both_passes(provider: str, cell: Cell) -> Callable[[], None]:
    """A call that runs forward and backward once."""
    import cupy

    arrays = random_inputs(cell, cupy)
    if provider == "standard":
        standard = StandardAttention(cell, arrays)

        def run():
            standard.forward()
            standard.backward()

        return run
    from cuflash import vjp

    def run():
        _, pullback = vjp(arrays["q"], arrays["k"], arrays["v"], causal=cell.causal)
        pullback(arrays["dout"])

    return run


def child(provider: str) -> None:
    """What the profiler sees: one call between its start and stop marks, everything compiled and warm."""
    import cupy

    call = both_passes(provider, CELL)
    call()
    call()
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.start()
    call()
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.stop()


def ncu_command(provider: str) -> list[str]:
    metrics = ",".join(METRICS.values())
    profiler = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--metrics", metrics]
    return [*profiler, sys.executable, "-m", "benchmarks.hbm", "--child", provider]


def parse_ncu(text: str) -> dict[str, float]:
    """Bytes read and written by all kernels of a profile, and how many kernels there were.

    The report starts after the lines that the program and the profiler print: it is the CSV whose header has "ID".
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError("the profiler printed no table: " + " ".join(lines[-3:]))
    totals = dict.fromkeys(METRICS, 0.0)
    kernels = set()
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        for name, metric in METRICS.items():
            if row["Metric Name"] == metric:
                totals[name] += float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
                kernels.add(row["ID"])
    return {**totals, "kernels": len(kernels)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hbm", description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child)
        return
    if shutil.which("ncu") is None:
        raise SystemExit("ncu, NVIDIA's profiler, is not on the PATH")
    console = Console()
    clock = EventClock()
    samples = interleave([Job(name, both_passes(name, CELL), clock) for name in PROVIDERS], rounds=5)
    environment, rows = record.environment(), []
    for name in PROVIDERS:
        done = subprocess.run(ncu_command(name), capture_output=True, text=True, cwd=record.ROOT)
        try:
            counted = parse_ncu(done.stdout)
        except RuntimeError as error:
            raise SystemExit(f"{error}\n{done.stderr[-2000:]}") from error
        rows.append({
            **environment, "provider": name, **CELL.problem_columns(), "gflop": f"{gflop(name, CELL):.5g}",
            "ms": f"{samples[name].median:.6g}", **{key: f"{value:.6g}" for key, value in counted.items()},
        })  # fmt: skip
        traffic = (counted["read_bytes"] + counted["written_bytes"]) * 1e-9
        console.print(f"{name:9} {gflop(name, CELL):8.1f} GFLOP {traffic:8.2f} GB {samples[name].median:8.3f} ms")
    record.append_rows(args.out / "hbm.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
