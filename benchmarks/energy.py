"""Energy of a call, from the board's own counter.

    PYTHONPATH=. python -m benchmarks.energy

Each library runs the same problem for two seconds or more; the energy that the board uses when idle for as long is
subtracted. Standard attention beside ours shows that moving data costs more than computing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from benchmarks import record
from benchmarks.inputs import random_inputs
from benchmarks.providers import available, reason
from benchmarks.standard import StandardAttention
from benchmarks.workloads import Cell

COLUMNS = (
    *record.ENVIRONMENT_COLUMNS, "provider", "pass", *record.PROBLEM_COLUMNS,
    "joules_per_call", "idle_watts", "load_watts", "calls", "seconds",
)  # fmt: skip
CELL = Cell(8, 2048, 2048, 16, 16, 64, 64, "causal", "plain", "float16")
PROVIDERS = ("cuflash", "torch_flash", "torch_cudnn", "fa3", "fa4")


class Board:
    """The energy counter of the current device, in joules."""

    def __init__(self):
        import cupy
        import pynvml

        pynvml.nvmlInit()
        bus = cupy.cuda.Device().pci_bus_id
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(bus)
        self.wait = cupy.cuda.Device().synchronize

    def joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


def idle_watts(board: Board, seconds: float, sleep=time.sleep, now=time.perf_counter) -> float:
    """Power without load, clocks settled first."""
    sleep(1.0)
    begin, energy = now(), board.joules()
    sleep(seconds)
    return (board.joules() - energy) / (now() - begin)


def load_energy(
    board: Board, call: Callable[[], object], seconds: float, now=time.perf_counter
) -> tuple[float, int, float]:
    """(joules, calls, seconds) of steady load for at least ``seconds``, after a tenth of that to warm up."""
    batch, begin = 8, now()
    while now() - begin < seconds / 10:
        for _ in range(batch):
            call()
        board.wait()
    # Batches of about 50 ms: the wait between them is lost in them.
    batch_begin = now()
    for _ in range(batch):
        call()
    board.wait()
    batch = max(1, round(0.05 / ((now() - batch_begin) / batch)))
    calls, begin, energy = 0, now(), board.joules()
    while now() - begin < seconds:
        for _ in range(batch):
            call()
        board.wait()
        calls += batch
    return board.joules() - energy, calls, now() - begin


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.energy", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of steady load, at least")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    import cupy

    console, board = Console(), Board()
    arrays = random_inputs(CELL, cupy)
    standard = StandardAttention(CELL, arrays)
    calls = {("standard", "fwd"): standard.forward, ("standard", "bwd"): standard.backward}
    providers, absent = available(args.providers.split(","))
    for name, why in absent.items():
        console.print(f"[yellow]{name} is absent:[/] {why}")
    for provider in providers:
        bound = provider.bind(CELL, arrays)
        calls |= {(provider.name, "fwd"): bound.forward, (provider.name, "bwd"): bound.backward}
    environment, rows = record.environment(), []
    for (name, pass_), call in calls.items():
        try:
            call()
            board.wait()
            idle = idle_watts(board, args.seconds)
            joules, count, seconds = load_energy(board, call, args.seconds)
        except Exception as error:
            console.print(f"[red]{name} {pass_}:[/] {reason(error)}")
            continue
        per_call = (joules - idle * seconds) / count
        rows.append({
            **environment, "provider": name, "pass": pass_, **CELL.problem_columns(),
            "joules_per_call": f"{per_call:.5g}", "idle_watts": f"{idle:.4g}", "load_watts": f"{joules / seconds:.4g}",
            "calls": count, "seconds": f"{seconds:.4g}",
        })  # fmt: skip
        console.print(f"{name:12} {pass_} {per_call:8.4f} J a call, {joules / seconds:.0f} W ({idle:.0f} W idle)")
    record.append_rows(args.out / "energy.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
