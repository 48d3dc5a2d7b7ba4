"""From a problem and a device to the plan of each pass: Hopper's own kernels where they can run it, else others."""

from __future__ import annotations

from cuflash.device import DeviceInfo
from cuflash.plan import (
    CONFIG_FIELDS,
    SINKS_BYTES,
    SINKS_THREADS,
    Config,
    Plan,
    Step,
    backward_section_heads,
    forward_section_heads,
    kernel_spec,
    launchable,
    load_bytes,
    num_blocks,
    scale_first,
    score_config,
    store_bytes,
)
from cuflash.plan_sm90 import hopper_backward_obstacle, hopper_obstacle, plan_backward_sm90, plan_forward_sm90
from cuflash.problem import WIDEST_LOAD, Problem
from cuflash.tiles import TileRow, row_for, rounded_head_dim, tile_bytes


def plan_forward(problem: Problem, device: DeviceInfo) -> Plan:
    """Plan out and lse.

    >>> from cuflash.problem import View
    >>> shape = (2, 1000, 8, 128)
    >>> problem = Problem.build({name: View.of(shape, "bfloat16") for name in "qkv"}, causal=True)
    >>> plan = plan_forward(problem, DeviceInfo.named("sm_90a"))
    >>> [(step.spec.entry, step.grid, step.threads) for step in plan.steps]
    [('forward_sm90', 128, 384)]
    """
    obstacle = hopper_obstacle(problem, device)
    if problem.kernels == "sm90" and obstacle:
        raise NotImplementedError(f"backend is 'sm90', but {obstacle}; 'sm80' runs it")
    if problem.kernels != "sm80" and not obstacle:
        return plan_forward_sm90(problem, device)
    layout = problem.layout
    tile = _tile(problem, device, "forward")
    config = _config(problem, tile)
    grid = num_blocks(layout.seqlen_q, tile.block_m) * problem.num_heads * layout.batch
    step = _step(device, "forward_sm80", config, grid, tile)
    return Plan(
        problem=problem,
        device=device,
        pass_="forward",
        steps=launchable(step),
        tile=tile,
        workspace={},
        section_heads=forward_section_heads(problem, device),
        note=f"portable kernels: {obstacle}" if obstacle and device.has_wgmma else None,
    )


def plan_backward(problem: Problem, device: DeviceInfo) -> Plan:
    """Plan dq, dk, dv and, with sinks, dsinks.

    >>> from cuflash.problem import View
    >>> shape = (2, 1000, 8, 128)
    >>> problem = Problem.build({name: View.of(shape, "bfloat16") for name in "qkv"})
    >>> plan = plan_backward(problem, DeviceInfo.named("sm_90a"))
    >>> [step.spec.entry for step in plan.steps]
    ['backward_prepare', 'backward_sm90']
    """
    obstacle = hopper_backward_obstacle(problem, device)
    if problem.kernels == "sm90" and obstacle:
        raise NotImplementedError(f"backend is 'sm90', but {obstacle}; None or 'sm80' runs it")
    if problem.kernels != "sm80" and not obstacle:
        return plan_backward_sm90(problem, device)
    layout = problem.layout
    tile = _tile(problem, device, "backward")
    config = _config(problem, tile)
    q_blocks = num_blocks(layout.seqlen_q, tile.block_m)
    q_grid = q_blocks * problem.num_heads * layout.batch
    k_grid = num_blocks(layout.seqlen_k, tile.block_n) * problem.num_kv_heads * layout.batch
    steps = [
        _step(device, "backward_prepare", config, q_grid, tile),
        _step(device, "backward_sm80", config, k_grid, tile),
        _step(device, "backward_finish", config, q_grid, tile),
    ]
    if problem.sinks:
        steps.append(_step(device, "backward_sinks", config, problem.num_heads, tile))
    return Plan(
        problem=problem,
        device=device,
        pass_="backward",
        steps=launchable(*steps),
        tile=tile,
        workspace=_backward_workspace(problem, tile.block_m, rounded_head_dim(problem.head_dim)),
        section_heads=backward_section_heads(problem, device),
        note=f"portable kernels: {obstacle}" if obstacle and device.has_wgmma else None,
    )


def plan_passes(problem: Problem, device: DeviceInfo) -> tuple[Plan, ...]:
    """Plan the forward and, unless the caller insists on kernels that have none for it, the backward."""
    forward = plan_forward(problem, device)
    if problem.kernels == "sm90" and hopper_backward_obstacle(problem, device):
        return (forward,)
    return forward, plan_backward(problem, device)


def _backward_workspace(problem: Problem, block_m: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Per-row values, dq in float32 and, for a repeatable sum, whose turn it is at every tile of dq."""
    batch, blocks = problem.layout.batch, num_blocks(problem.layout.seqlen_q, block_m)
    rows = (batch, problem.num_heads, blocks * block_m)
    workspace = {
        "row_lse": (rows, "float32"),
        "row_delta": (rows, "float32"),
        "dq_accum": ((*rows, head_dim), "float32"),
    }
    if problem.deterministic:
        workspace["dq_turn"] = ((batch, problem.num_heads, blocks), "int32")
    return workspace


def _tile(problem: Problem, device: DeviceInfo, pass_: str) -> TileRow:
    extras = (
        scale_first(problem)
        + (problem.dropout is not None)
        + 2 * (load_bytes(problem, pass_) < WIDEST_LOAD)
        + (problem.modifiers.softcap != 0)
    )
    return row_for(device.tile_family, pass_, problem.head_dim, problem.head_dim_v, extras=extras)


def _config(problem: Problem, tile: TileRow) -> Config:
    """All compile-time choices of the portable kernels, as C++ type and value by name."""
    return score_config(problem) | {
        "block_m": ("int", tile.block_m),
        "block_n": ("int", tile.block_n),
        "num_warps": ("int", tile.num_warps),
        "min_blocks": ("int", tile.min_blocks),
        "num_stages": ("int", tile.num_stages),
        "load_bytes": ("int", load_bytes(problem, tile.pass_)),
        "store_bytes": ("int", store_bytes(problem, tile.pass_)),
        "split_d": ("int", tile.split_d),
        "first_stores": ("bool", False),
        "split_groups": ("bool", False),
        "deterministic": ("bool", problem.deterministic),
        "with_dq": ("bool", True),
    }


def _step(device: DeviceInfo, entry: str, config: Config, grid: int, tile: TileRow) -> Step:
    head_dim, head_dim_v = (config[name][1] for name in ("head_dim", "head_dim_v"))
    threads, shared_bytes = {
        "forward_sm80": (tile.threads, tile.shared_bytes(head_dim, head_dim_v)),
        "backward_prepare": (tile.threads, 0),
        "backward_sm80": (tile.threads, tile.shared_bytes(head_dim, head_dim_v)),
        "backward_finish": (tile.threads, tile_bytes(tile.block_m, head_dim)),
        "backward_sinks": (SINKS_THREADS, SINKS_BYTES),
    }[entry]
    spec = kernel_spec(entry, config, device.portable_arch)
    min_blocks = tile.min_blocks if "min_blocks" in CONFIG_FIELDS[entry] else 1
    return Step(spec, grid, threads, shared_bytes, min_blocks)
