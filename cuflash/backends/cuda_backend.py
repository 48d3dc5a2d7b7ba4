"""Attention on a GPU: plan, load, launch. Serves every architecture.

Operands are canonical (batch, seqlen, heads, head_dim) views on one device, which is current. Whoever calls allocates
the results, because they belong to the caller's array library, and the workspace between launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cuflash.cuda import module
from cuflash.cuda.launch import BoundLaunch, Launch
from cuflash.device import DeviceInfo, require_cupy
from cuflash.plan import Plan
from cuflash.planner import plan_backward, plan_forward, plan_passes
from cuflash.problem import Problem, View, check_backend_dtype

DTYPES = ("float16", "bfloat16")
MAX_LAUNCHES = 4096  # passes kept ready; decoding with a growing cache brings a new one every step

Planner = Callable[[Problem, DeviceInfo], Plan]
PLANNERS: dict[str, Planner] = {"forward": plan_forward, "backward": plan_backward}


def bind(direction: str, problem: Problem, device_index: int, views: Mapping[str, View], stream: int) -> BoundLaunch:
    """Return what launches a pass on arrays that lie in memory as ``views`` do, whatever their addresses.

    Parameters
    ----------
    direction : {"forward", "backward"}
        The forward writes ``out`` and, where it is given, ``lse``; the backward ``dq``, ``dk``, ``dv`` and, with sinks,
        ``dsinks``.
    problem : Problem
        What the views were checked as.
    views : mapping of str to View
        The results, ``q``, ``k``, ``v``, and those of ``alibi_slopes``, ``sinks``, ``seqused_q``, ``seqused_k`` that
        the problem has; to a backward also ``out``, ``lse``, ``dout`` and, where it is not zero, ``dlse``.
    stream : int
        The caller's current ``cudaStream_t``: nothing is loaded while it is captured.
    """
    return _ready(PLANNERS[direction], problem.without_seed(), device_index, stream).bind(views)


def explain(problem: Problem, device_index: int) -> str:
    """Describe what runs of both passes: kernels, tiles, grids, registers of loaded kernels, occupancy, floors."""
    plans = plan_passes(problem, DeviceInfo.current(device_index))
    registers = {
        step.spec.entry: kernel.registers
        for plan in plans
        for step in plan.steps
        if (kernel := module.loaded(step.spec, device_index)) is not None
    }
    return "\n".join(plan.explain(registers) for plan in plans)


def warmup(problem: Problem, device_index: int, backward: bool = True) -> None:
    """Compile and load, in parallel, what the forward and, if asked, the backward launch.

    After that they may be captured in a CUDA graph.
    """
    plans = plan_passes(problem, DeviceInfo.current(device_index))[: 2 if backward else 1]
    specs = {step.spec for plan in plans for step in plan.steps}
    for _ in module.load_all(specs, device_index):
        pass
    with require_cupy().cuda.Device(device_index):
        for plan in plans:
            _ready(PLANNERS[plan.pass_], problem.without_seed(), device_index, stream=0)


_launches: dict[tuple[Planner, Problem, int], Launch] = {}  # single reads and writes only, so threads need no lock


def _ready(planner: Planner, problem: Problem, device_index: int, stream: int) -> Launch:
    """Return the launches of a pass, planned and loaded at their first use."""
    key = (planner, problem, device_index)
    launch = _launches.get(key)
    if launch is None:
        check_backend_dtype(problem.dtype, "cuda", DTYPES)
        plan = planner(problem, DeviceInfo.current(device_index))
        _check_capture(plan, device_index, stream)
        if len(_launches) >= MAX_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = Launch(plan, device_index)
    return launch


def _check_capture(plan: Plan, device_index: int, stream: int) -> None:
    """Code cannot be loaded while a stream records a CUDA graph, and the driver's own error does not say so."""
    missing = [step.spec.entry for step in plan.steps if module.loaded(step.spec, device_index) is None]
    if missing and require_cupy().cuda.runtime.streamIsCapturing(stream):
        raise RuntimeError(
            f"{missing[0]} is first used while a CUDA graph is captured; make the same call once before the capture"
        )
