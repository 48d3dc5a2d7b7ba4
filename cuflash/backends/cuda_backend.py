"""Attention on a GPU: plan, load, launch. Serves every architecture.

Operands are canonical (batch, seqlen, heads, head_dim) views on one device, which is current. Whoever calls allocates
the results, because they belong to the caller's array library; ``allocate`` provides the memory between launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from cuflash.cuda import module
from cuflash.cuda.launch import Launch
from cuflash.device import DeviceInfo
from cuflash.plan import Plan, plan_backward, plan_forward
from cuflash.problem import Problem, View, check_backend_dtype

DTYPES = ("float16", "bfloat16")
PREPARED = 1024  # problems whose launches are kept ready

Allocate = Callable[[tuple[int, ...], str], View]


def forward(
    problem: Problem, device_index: int, views: Mapping[str, View], stream: int, allocate: Allocate | None = None
) -> None:
    """Write ``views["out"]`` and, where it is given, ``views["lse"]``.

    Parameters
    ----------
    problem : Problem
        What the views were checked as.
    views : mapping of str to View
        ``q``, ``k``, ``v``, ``out``, and those of ``lse``, ``alibi_slopes``, ``sinks``, ``seqused_q``, ``seqused_k``
        that the problem has.
    stream : int
        The caller's current ``cudaStream_t``.
    allocate : callable
        ``allocate(shape, dtype)`` returns a view of uninitialised memory that may be reused in the order of ``stream``.
    """
    launch = _prepared(plan_forward, problem.without_seed(), device_index)
    launch(views, 0, problem.dropout, stream)


def backward(
    problem: Problem, device_index: int, views: Mapping[str, View], stream: int, allocate: Allocate
) -> None:
    """Write ``views["dq"]``, ``views["dk"]``, ``views["dv"]`` and, with sinks, ``views["dsinks"]``.

    The other views are those of `forward`, with ``lse``, ``dout`` and, where it is not zero, ``dlse``.
    """
    launch = _prepared(plan_backward, problem.without_seed(), device_index)
    workspace = allocate((launch.workspace_floats,), "float32")
    launch(views, workspace.pointer, problem.dropout, stream)


def explain(problem: Problem, device_index: int) -> str:
    """Describe the forward and the backward: kernels, tiles, grids, registers of loaded kernels, occupancy, floors."""
    plans = _plans(problem, device_index)
    registers = {
        step.spec.entry: kernel.registers
        for plan in plans
        for step in plan.steps
        if (kernel := module.loaded(step.spec, device_index)) is not None
    }
    return "\n".join(plan.explain(registers) for plan in plans)


def warmup(problem: Problem, device_index: int, backward: bool = True) -> None:
    """Compile and load, in parallel, what the forward and, if asked, the backward launch."""
    plans = _plans(problem, device_index)[: 2 if backward else 1]
    specs = {step.spec for plan in plans for step in plan.steps}
    for _ in module.load_all(specs, device_index):
        pass


def _plans(problem: Problem, device_index: int) -> tuple[Plan, Plan]:
    device = DeviceInfo.current(device_index)
    return plan_forward(problem, device), plan_backward(problem, device)


@lru_cache(maxsize=PREPARED)
def _prepared(plan: Callable[[Problem, DeviceInfo], Plan], problem: Problem, device_index: int) -> Launch:
    check_backend_dtype(problem.dtype, "cuda", DTYPES)
    return Launch(plan(problem, DeviceInfo.current(device_index)), device_index)
