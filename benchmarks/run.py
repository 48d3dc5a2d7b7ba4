"""Time attention beside its peers: gate, interleave, record.

    PYTHONPATH=. python -m benchmarks.run --cells hopper,gqa --passes fwd,bwd --rounds 3 --budget-seconds 500

Every provider's result is compared with a float64 reference before any of its time counts; what fails is recorded as
not ok and not timed. Rows are written cell by cell, so an interrupted run keeps what it measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from benchmarks import ahead, ceilings, record
from benchmarks.inputs import random_inputs
from benchmarks.providers import PROVIDERS, Provider, available, reason
from benchmarks.reference import Gate
from benchmarks.timing import Clock, Job, Sample, interleave
from benchmarks.workloads import GROUPS, Cell, select
from cuflash.device import DeviceInfo

PASSES = ("fwd", "bwd")
OURS = ("cuflash", "cuflash_sm80", "cuflash_numpy")
FAILURE_COLUMNS = (*record.ENVIRONMENT_COLUMNS, "run", "provider", "pass", *record.PROBLEM_COLUMNS, "reason")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of the speed table before its environment columns: no sample where the gate or the call failed."""

    provider: str
    pass_: str
    ratio: float
    sample: Sample | None


@dataclass(slots=True)
class CellResult:
    cell: Cell
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # provider, pass, reason

    def tflops(self) -> dict[tuple[str, str], float]:
        """TFLOP/s by (provider, pass)."""
        return {
            (m.provider, m.pass_): self.cell.flops(m.pass_) / m.sample.median * 1e-9
            for m in self.measurements
            if m.sample
        }


class CellBench:
    """Everything that happens to one cell: inputs, the gate, timing."""

    def __init__(
        self, cell: Cell, providers: Sequence[Provider], passes: Sequence[str], gate_heads: int, seed: int = 0
    ):
        self._cell, self._providers, self._passes = cell, providers, passes
        self._gate_heads, self._seed = gate_heads, seed
        self._arrays: dict[tuple[str, Cell], dict] = {}
        self._gates: dict[tuple[str, Cell], Gate] = {}
        self.result = CellResult(cell)

    def run(self, rounds: int, idle: float, deadline: float, on_burst: Callable[[Job], None]) -> CellResult:
        jobs, ratios = [], {}
        for provider in self._providers:
            passes = [p for p in self._passes if provider.unsupported(self._cell, p) is None]
            if not passes:
                continue
            try:
                bound = provider.bind(self._cell, self._inputs(provider.device, self._cell))
                gated = self._gated(provider, bound)
                clock: Clock = provider.clock()
            except Exception as error:
                self.result.failures += [(provider.name, pass_, reason(error)) for pass_ in passes]
                continue
            calls = {"fwd": (bound.forward, gated.forward, gated.outputs)}
            if bound.backward and gated.backward:
                calls["bwd"] = (bound.backward, gated.backward, gated.gradients)
            for pass_ in (p for p in passes if p in calls):
                call, gate_call, canonical = calls[pass_]
                try:
                    ratio = self._gate(provider).error_ratio(canonical(gate_call()))
                    call()
                except Exception as error:
                    self.result.failures.append((provider.name, pass_, reason(error)))
                    continue
                if ratio <= 1:
                    ratios[provider.name, pass_] = ratio
                    jobs.append(Job((provider.name, pass_), call, clock))
                else:
                    self.result.measurements.append(Measurement(provider.name, pass_, ratio, None))

        def failed(job: Job, error: Exception) -> None:
            self.result.failures.append((*job.key, reason(error)))

        samples = interleave(jobs, rounds, idle=idle, deadline=deadline, on_burst=on_burst, on_failure=failed)
        self.result.measurements += [Measurement(*key, ratios[key], sample) for key, sample in samples.items()]
        return self.result

    def _gated(self, provider: Provider, bound):
        """What the gate checks: the timed calls themselves unless their random bits cannot be known."""
        cell = provider.gate_cell(self._cell)
        return bound if cell == self._cell else provider.bind(cell, self._inputs(provider.device, cell))

    def _gate(self, provider: Provider) -> Gate:
        cell = provider.gate_cell(self._cell)
        key = provider.device, cell
        if key not in self._gates:
            self._gates[key] = Gate(cell, self._inputs(*key), self._gate_heads, "bwd" in self._passes)
        return self._gates[key]

    def _inputs(self, device: str, cell: Cell) -> dict:
        if (device, cell) not in self._arrays:
            self._arrays[device, cell] = random_inputs(cell, namespace_of(device), self._seed)
        return self._arrays[device, cell]


def compile_ahead(
    console: Console, cells: Sequence[Cell], providers: Sequence[Provider], passes: Sequence[str]
) -> None:
    """Compile our kernels in parallel, so that no cell waits for the compiler.

    One that does not compile fails its cells, which record why.
    """
    ours = [provider for provider in providers if provider.name in OURS and provider.device == "gpu"]
    wanted = {}
    for provider in ours:
        for pass_ in passes:
            taken = [cell for cell in cells if provider.unsupported(cell, pass_) is None]
            wanted |= dict.fromkeys(ahead.specs(taken, [pass_], provider.kernels, DeviceInfo.current(0)))
    if wanted:
        for _ in track(ahead.build_all(wanted), "compiling kernels", total=len(wanted), console=console):
            pass


def namespace_of(device: str):
    if device == "cpu":
        import numpy

        return numpy
    import cupy

    return cupy


def release_memory() -> None:
    """Give back what the libraries' allocators keep: the next cell needs it elsewhere."""
    gc.collect()
    if "cupy" in sys.modules and record.gpu_name():
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def speed_rows(environment: dict, run: str, result: CellResult) -> list[dict]:
    rows = []
    for measurement in result.measurements:
        row = {
            **environment, "provider": measurement.provider, "pass": measurement.pass_,
            **result.cell.problem_columns(), "run": run, "max_error_ratio": f"{measurement.ratio:.4g}",
            "ok": measurement.sample is not None,
        }  # fmt: skip
        if sample := measurement.sample:
            row |= {"ms_median": f"{sample.median:.6g}", "ms_p20": f"{sample.p20:.6g}", "ms_p80": f"{sample.p80:.6g}"}
            row["tflops"] = f"{result.cell.flops(measurement.pass_) / sample.median * 1e-9:.5g}"
        rows.append(row)
    return rows


def failure_rows(environment: dict, run: str, result: CellResult) -> list[dict]:
    return [
        {**environment, "run": run, "provider": provider, "pass": pass_, **result.cell.problem_columns(), "reason": why}
        for provider, pass_, why in result.failures
    ]


def summary_table(results: Iterable[CellResult], passes: Sequence[str]) -> Table:
    """How each of our providers does against every other: geometric mean and worst of the same-cell ratios."""
    results = list(results)
    table = Table("ours", "pass", "against", "cells", "geometric mean", "worst", "in cell", title="same-run ratios")
    speeds = [(result.cell.name, result.tflops()) for result in results]
    names = dict.fromkeys(name for _, found in speeds for name, _ in found)
    for ours in (name for name in names if name in OURS):
        for pass_ in passes:
            rivals = [name for name in names if name not in OURS]
            for rival in (*rivals, "best peer"):
                ratios = {}
                for cell, found in speeds:
                    others = rivals if rival == "best peer" else [rival]
                    speeds_of_others = [found[name, pass_] for name in others if (name, pass_) in found]
                    if (ours, pass_) in found and speeds_of_others:
                        ratios[cell] = found[ours, pass_] / max(speeds_of_others)
                if ratios:
                    worst = min(ratios, key=ratios.get)
                    mean = statistics.geometric_mean(ratios.values())
                    table.add_row(ours, pass_, rival, str(len(ratios)), f"{mean:.3f}", f"{ratios[worst]:.3f}", worst)
    return table


def describe(result: CellResult) -> str:
    """One line for the console: TFLOP/s of every provider, forward / backward."""
    speeds = result.tflops()
    names = dict.fromkeys(m.provider for m in result.measurements)
    parts = []
    for name in names:
        numbers = "/".join(f"{speeds[name, p]:.4g}" if (name, p) in speeds else "-" for p in PASSES)
        wrong = [f"{m.pass_} {m.ratio:.3g}" for m in result.measurements if m.provider == name and not m.sample]
        parts.append(f"{name} {numbers}" + (f" [red]wrong: {', '.join(wrong)} of the bound[/]" if wrong else ""))
    return f"[bold]{result.cell.name}[/]  " + "  ".join(parts)


def dry_run(console: Console, cells: Sequence[Cell], names: Sequence[str], passes: Sequence[str]) -> None:
    """List what would be measured without loading a library."""
    for cell in cells:
        whys = {name: [PROVIDERS[name].unsupported(cell, pass_) for pass_ in passes] for name in names}
        takers = [name for name in names if not all(whys[name])]
        refusals = [f"{name} ({next(filter(None, why))})" for name, why in whys.items() if any(why)]
        shape = f"{cell.batch} x {cell.seqlen_q} x {cell.seqlen_k}, heads {cell.num_heads}/{cell.num_kv_heads}"
        line = f"[bold]{cell.name}[/]  {shape}, {cell.flops('fwd') * 1e-9:.3g} GFLOP forward: {' '.join(takers)}"
        console.print(line + (f"; not {', '.join(refusals)}" if refusals else ""), soft_wrap=True, highlight=False)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cells", default="hopper,gqa", help=f"groups or patterns on names; groups: {', '.join(GROUPS)}"
    )
    parser.add_argument("--passes", default="fwd,bwd")
    parser.add_argument("--providers", default="all", help=f"all (on a GPU), or some of {', '.join(PROVIDERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=0.1, help="least seconds of rest before a burst")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin nothing that would pass it")
    parser.add_argument("--gate-heads", type=int, default=4, help="key/value heads that the gate checks in each cell")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="list the cells and who takes them")
    args = parser.parse_args(argv)
    args.cells = select(args.cells.split(","))
    args.passes = args.passes.split(",")
    if unknown := set(args.passes) - set(PASSES):
        parser.error(f"--passes has {', '.join(sorted(unknown))}; the passes are {', '.join(PASSES)}")
    everywhere = [name for name, provider in PROVIDERS.items() if provider.device == "gpu"]
    args.providers = everywhere if args.providers == "all" else args.providers.split(",")
    if unknown := set(args.providers) - set(PROVIDERS):
        parser.error(f"--providers has {', '.join(sorted(unknown))}; the providers are {', '.join(PROVIDERS)}")
    return args


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    args = arguments(argv)
    console = console or Console()
    if args.dry_run:
        dry_run(console, args.cells, args.providers, args.passes)
        return 0
    begin = time.monotonic()
    deadline = begin + args.budget_seconds
    providers, absent = available(args.providers)
    for name, why in absent.items():
        console.print(f"[yellow]{name} is absent:[/] {why}")
    if not providers:
        console.print("[red]no provider to measure[/]")
        return 1
    run, environment = record.new_run(), record.environment()
    packages = dict.fromkeys(package for provider in providers for package in provider.packages)
    measured = ceilings.measure() if any(provider.device == "gpu" for provider in providers) else {}
    run_row = {
        **environment, "run": run, **measured, "versions": json.dumps(record.versions((*packages, "cupy-cuda13x"))),
        "absent": json.dumps(absent), "arguments": shlex.join(sys.argv[1:] if argv is None else argv),
    }  # fmt: skip
    record.append_rows(args.out / "runs.csv", record.RUN_COLUMNS, [run_row])

    compile_ahead(console, args.cells, providers, args.passes)
    results, longest_cell = [], 0.0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        per_cell = len(providers) * len(args.passes) * args.rounds
        task = progress.add_task("", total=per_cell * len(args.cells))
        for number, cell in enumerate(args.cells):
            cell_begin = time.monotonic()
            if cell_begin + longest_cell > deadline:
                left = ", ".join(cell.name for cell in args.cells[number:])
                progress.console.print(f"[yellow]the time is used up; not measured: {left}[/]")
                break
            progress.update(task, description=cell.name)
            bench = CellBench(cell, providers, args.passes, args.gate_heads)
            result = bench.run(args.rounds, args.idle, deadline, lambda job: progress.advance(task))
            record.append_rows(args.out / "speed.csv", record.SPEED_COLUMNS, speed_rows(environment, run, result))
            if result.failures:
                rows = failure_rows(environment, run, result)
                record.append_rows(args.out / "failures.csv", FAILURE_COLUMNS, rows)
            progress.console.print(describe(result))
            for name, pass_, why in result.failures:
                progress.console.print(f"  [red]{name} {pass_}:[/] {why}")
            results.append(result)
            progress.update(task, completed=per_cell * (number + 1))
            del bench
            release_memory()
            longest_cell = max(longest_cell, time.monotonic() - cell_begin)
    summary = summary_table(results, args.passes)
    if summary.row_count:
        console.print(summary)
    console.print(f"run {run}: {len(results)} cells in {time.monotonic() - begin:.0f} s")
    wrong = [m for r in results for m in r.measurements if m.provider in OURS and not m.sample]
    broken = [f for r in results for f in r.failures if f[0] in OURS]
    return 1 if wrong or broken else 0


if __name__ == "__main__":
    sys.exit(main())
