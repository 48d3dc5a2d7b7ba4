"""Compile what a run will launch before any of it is timed, in as many processes as there are cores.

Machine code stays in CuPy's disk cache, where the run finds it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from benchmarks.workloads import Cell
from cuflash.device import DeviceInfo
from cuflash.plan import KernelSpec, Step
from cuflash.planner import plan_backward, plan_forward
from cuflash.problem import Problem, View

PLANNERS = {"fwd": plan_forward, "bwd": plan_backward}


def steps(cells: Iterable[Cell], passes: Iterable[str], kernels: str | None, device: DeviceInfo) -> list[Step]:
    """Launches of some cells; ``kernels`` is the family that the caller insists on."""
    passes = list(passes)
    plans = (PLANNERS[pass_](_problem(cell, kernels, pass_), device) for cell in cells for pass_ in passes)
    return [step for plan in plans for step in plan.steps]


def specs(cells: Iterable[Cell], passes: Iterable[str], kernels: str | None, device: DeviceInfo) -> list[KernelSpec]:
    """Kernels of these launches, each once."""
    return list(dict.fromkeys(step.spec for step in steps(cells, passes, kernels, device)))


def _problem(cell: Cell, kernels: str | None, pass_: str) -> Problem:
    rows, keys = (cell.batch, cell.seqlen_q), (cell.batch, cell.seqlen_k)
    views = {
        "q": View.of((*rows, cell.num_heads, cell.head_dim), cell.dtype),
        "k": View.of((*keys, cell.num_kv_heads, cell.head_dim), cell.dtype),
        "v": View.of((*keys, cell.num_kv_heads, cell.head_dim_v), cell.dtype),
    }
    per_head = {"alibi": "alibi_slopes", "sinks": "sinks"}
    if cell.feature in per_head:
        views[per_head[cell.feature]] = View.of((cell.num_heads,), "float32")
    if pass_ == "bwd":
        views["dout"] = View.of((*rows, cell.num_heads, cell.head_dim_v), cell.dtype)
    deterministic = pass_ == "bwd" and cell.deterministic
    return Problem.build(views, **cell.attention_keywords(), deterministic=deterministic, kernels=kernels)


def build_all(wanted: Collection[KernelSpec], jobs: int | None = None) -> Iterator[Future[float]]:
    """Each kernel as it is ready: the seconds it took, or why it does not compile."""
    # Fresh processes: a forked one could not use the device of its parent.
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from as_completed([pool.submit(build, spec) for spec in wanted])


def build(spec: KernelSpec) -> float:
    """Compile one kernel in this process; seconds it took."""
    from cuflash.cuda.module import load

    begin = time.perf_counter()
    load(spec, 0)
    return time.perf_counter() - begin
