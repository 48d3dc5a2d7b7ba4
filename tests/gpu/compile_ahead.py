"""Compile every kernel of the GPU tests before they run, in as many processes as there are cores.

    PYTHONPATH=.:tests python -m gpu.compile_ahead

Machine code stays in CuPy's disk cache, where the tests find it.
"""

from __future__ import annotations

import argparse
import os
import time

from cases import CASES
from rich.progress import track

from benchmarks.ahead import build_all
from cuflash.arrays import adapter_of
from cuflash.plan import KernelSpec


def specs() -> list[KernelSpec]:
    """Kernels of the shared cases, each once."""
    from cuflash.device import DeviceInfo
    from cuflash.planner import plan_backward, plan_forward

    device = DeviceInfo.current(0)
    problems = {case_problem(case) for case in CASES}
    steps = (
        step for problem in problems for plan in (plan_forward, plan_backward) for step in plan(problem, device).steps
    )
    return list(dict.fromkeys(step.spec for step in steps))


def case_problem(case):
    """The problem that the tests' own memory makes: its strides and alignment decide the kernel."""
    from cuflash.problem import Problem

    arrays, adapter = case.arrays(), adapter_of(case.arrays().q)
    names = ("q", "k", "v", "dout", "alibi_slopes", "sinks", "seqused_q", "seqused_k")
    views = {name: adapter.view(getattr(arrays, name)) for name in names if getattr(arrays, name) is not None}
    return Problem.build(views, **case.keywords)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpu.compile_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    begin, wanted = time.perf_counter(), specs()
    built = track(build_all(wanted, args.jobs), "compiling kernels", total=len(wanted))
    seconds = [future.result() for future in built]
    print(f"{len(seconds)} kernels in {time.perf_counter() - begin:.0f} s, {max(seconds, default=0):.1f} s the slowest")


if __name__ == "__main__":
    main()
