"""The plans of Hopper's own kernels, and why they cannot run a problem."""

from __future__ import annotations

from cuflash.device import DeviceInfo
from cuflash.plan import (
    ITEMSIZE,
    PREPARED_ROWS,
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
    padded_keys,
    padded_rows,
    scale_first,
    score_config,
)
from cuflash.problem import WIDEST_LOAD, ArraySpec, Problem
from cuflash.tiles import rounded_head_dim
from cuflash.tiles_sm90 import (
    WARPGROUP_ROWS,
    BackwardRow,
    KeysRow,
    QueriesRow,
    backward_row,
    forward_row,
    packed_heads,
    queries_row,
)


def hopper_obstacle(problem: Problem, device: DeviceInfo) -> str | None:
    """Why no Hopper kernel can run a problem; None where the forward can.

    The copy engine takes addresses and strides of multiples of 16 bytes.
    """
    if not device.has_wgmma:
        return f"{device.name} is {device.arch}, not sm_90a"
    for name, array in {"q": problem.q, "k": problem.k, "v": problem.v, "out": problem.out}.items():
        if array is None:
            if obstacle := _row_obstacle(name, "head_dim_v", problem.head_dim_v):
                return obstacle
        elif obstacle := _copy_obstacle(name, array):
            return obstacle
    return None


def hopper_backward_obstacle(problem: Problem, device: DeviceInfo) -> str | None:
    """Why the Hopper backward cannot run a problem; None where it can."""
    if obstacle := hopper_obstacle(problem, device):
        return obstacle
    for name, keyword, columns in (("dk", "head_dim", problem.head_dim), ("dv", "head_dim_v", problem.head_dim_v)):
        if obstacle := _row_obstacle(name, keyword, columns):
            return obstacle
    if problem.dout is not None and (obstacle := _copy_obstacle("dout", problem.dout)):
        return obstacle
    return None


def _copy_obstacle(name: str, array: ArraySpec) -> str | None:
    """Why the copy engine cannot address an array of the caller."""
    if 0 in array.shape:
        return f"{name} has shape {array.shape}; the copy engine knows no empty arrays"
    if array.alignment < WIDEST_LOAD:
        return f"{name}'s address or strides are not multiples of {WIDEST_LOAD} bytes"
    if any(stride <= 0 for size, stride in zip(array.shape[:3], array.strides[:3], strict=True) if size > 1):
        return f"{name} has strides {array.strides}; the copy engine needs positive ones"
    return None


def _row_obstacle(name: str, keyword: str, columns: int) -> str | None:
    """Why the copy engine cannot address a contiguous array of the library's own."""
    if columns % (WIDEST_LOAD // ITEMSIZE):
        return f"{keyword} is {columns}; rows of {name} are no multiples of {WIDEST_LOAD} bytes"
    return None


def plan_forward_sm90(problem: Problem, device: DeviceInfo) -> Plan:
    layout = problem.layout
    extras = scale_first(problem) + (problem.modifiers.softcap != 0) + 3 * (problem.dropout is not None)
    causal = problem.mask.right is not None
    sizes = (problem.head_dim, problem.head_dim_v, layout.seqlen_q)
    tile = forward_row(*sizes, causal=causal, extras=extras)
    heads = packed_heads(problem.group_size, layout.seqlen_q, tile.block_m)
    if heads > 1:
        tile = forward_row(*sizes, causal=causal, extras=extras, packed=True)
    queries = tile.block_m // heads
    masked = causal or problem.mask.left is not None
    blocks = num_blocks(layout.seqlen_q, queries)
    cluster_size = tile.clusters(blocks, masked=masked)
    config = score_config(problem) | {
        "block_n": ("int", tile.block_n),
        "num_consumers": ("int", tile.num_consumers),
        "query_stages": ("int", tile.query_stages),
        "out_chunks": ("int", tile.out_chunks),
        "ping_pong": ("bool", tile.ping_pong),
        "lazy_rescale": ("bool", tile.lazy_rescale),
        "eighths_before_wait": ("int", tile.eighths_before_wait),
        "early_draws": ("int", tile.early_draws if problem.dropout is not None else 0),
        "used_keys": ("bool", layout.used_k),
        "packed_heads": ("int", heads),
        "cluster_size": ("int", cluster_size),
    }
    spec = kernel_spec("forward_sm90", config, device.arch)
    tiles = blocks * (problem.num_heads // heads) * layout.batch
    shared_bytes = tile.shared_bytes(config["head_dim"][1], config["head_dim_v"][1])
    boxes = {"q": queries, "k": tile.block_n, "v": tile.block_n, "out": min(queries, WARPGROUP_ROWS)}
    grid = _persistent_grid(device, tiles, cluster_size)
    step = Step(spec, grid, tile.threads, shared_bytes, 1, tuple(boxes.items()))
    return Plan(
        problem=problem,
        device=device,
        pass_="forward",
        steps=launchable(step),
        tile=tile,
        workspace={},
        section_heads=forward_section_heads(problem, device),
        packed_heads=heads,
        cluster_size=cluster_size,
    )


def plan_backward_sm90(problem: Problem, device: DeviceInfo) -> Plan:
    layout, head_dim, head_dim_v = problem.layout, problem.head_dim, problem.head_dim_v
    extras = (problem.modifiers.softcap != 0) + problem.modifiers.alibi + (problem.dropout is not None)
    tile = backward_row(head_dim, head_dim_v, split=problem.deterministic)
    dq_tile = queries_row(head_dim, head_dim_v, extras=extras) if tile.split else None
    causal = problem.mask.right is not None
    split_groups = tile.splits_groups(problem.group_size, layout.seqlen_q, causal=causal)
    heads = 1 if split_groups else problem.group_size
    queries = problem.mask.band(layout.seqlen_q, layout.seqlen_k).most_queries(tile.block_n)
    first_stores = dq_tile is None and tile.first_stores(queries, heads, causal=causal)
    config = score_config(problem) | {
        "head_dim": ("int", tile.columns(head_dim)),
        "head_dim_v": ("int", tile.columns(head_dim_v)),
        "block_m": ("int", tile.block_m),
        "block_n": ("int", tile.block_n),
        "num_warps": ("int", tile.num_warps),
        "load_bytes": ("int", load_bytes(problem, "backward")),
        "deterministic": ("bool", False),  # no kernel of these needs to be told
        "with_dq": ("bool", not tile.split),
        "first_stores": ("bool", first_stores),
        "split_groups": ("bool", split_groups),
        "used_queries": ("bool", layout.used_q),
        "used_keys": ("bool", layout.used_k),
    }
    steps = [_prepare_step(problem, device, config, tile)]
    if dq_tile is not None:
        steps.append(_queries_step(problem, device, config, dq_tile))
    steps.append(_keys_step(problem, device, config, tile, problem.num_heads // heads))
    if split_groups:
        spec = kernel_spec("backward_finish_groups", config, device.portable_arch)
        grid = num_blocks(layout.seqlen_k, tile.block_n) * problem.num_kv_heads * layout.batch
        steps.append(Step(spec, grid, 32 * tile.num_warps, 0, 1))
    if problem.sinks:
        spec = kernel_spec("backward_sinks", config, device.portable_arch)
        steps.append(Step(spec, problem.num_heads, SINKS_THREADS, SINKS_BYTES, 1))
    rows = (layout.batch, problem.num_heads, padded_rows(problem, tile, dq_tile))
    workspace = {"row_lse": (rows, "float32"), "row_delta": (rows, "float32")}
    if dq_tile is None:
        workspace["dq_accum"] = ((*rows, tile.columns(head_dim)), "float32")
        workspace["dq_done"] = ((1 + layout.batch * problem.num_heads,), "int32")
    if first_stores:
        workspace["dq_turn"] = ((*rows[:2], rows[2] // tile.block_m), "int32")
    if split_groups:
        keys = (layout.batch, problem.num_kv_heads, padded_keys(problem, tile))
        workspace["dkv_accum"] = ((*keys, tile.columns(head_dim) + tile.columns(head_dim_v)), "float32")
    return Plan(
        problem=problem,
        device=device,
        pass_="backward",
        steps=launchable(*steps),
        tile=tile,
        workspace=workspace,
        section_heads=backward_section_heads(problem, device, accumulates_dq=not tile.split, split_groups=split_groups),
        dq_tile=dq_tile,
        split_groups=split_groups,
    )


def _persistent_grid(device: DeviceInfo, tiles: int, cluster_size: int = 1) -> int:
    """Thread blocks of a kernel that draws its tiles: one for each SM, in whole clusters, but no more than tiles."""
    return min(device.sm_count // cluster_size * cluster_size, tiles)


def _prepare_step(problem: Problem, device: DeviceInfo, config: Config, tile: BackwardRow | KeysRow) -> Step:
    block_m = PREPARED_ROWS if tile.split else tile.block_m
    spec = kernel_spec("backward_prepare", config | {"block_m": ("int", block_m)}, device.portable_arch)
    grid = num_blocks(problem.layout.seqlen_q, block_m) * problem.num_heads * problem.layout.batch
    return Step(spec, grid, 32 * tile.num_warps, 0, 1)


def _keys_step(
    problem: Problem, device: DeviceInfo, config: Config, tile: BackwardRow | KeysRow, num_heads: int
) -> Step:
    spec = kernel_spec(tile.entry, config, device.arch)
    tiles = num_blocks(problem.layout.seqlen_k, tile.block_n) * num_heads * problem.layout.batch
    grid = _persistent_grid(device, tiles) if tile.persistent else tiles
    shared_bytes = tile.shared_bytes(config["head_dim"][1], config["head_dim_v"][1])
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "dout": tile.block_m}
    boxes |= {"dk": WARPGROUP_ROWS, "dv": WARPGROUP_ROWS}
    return Step(spec, grid, tile.threads, shared_bytes, 1, tuple(boxes.items()))


def _queries_step(problem: Problem, device: DeviceInfo, config: Config, tile: QueriesRow) -> Step:
    head_dim, head_dim_v = rounded_head_dim(problem.head_dim), rounded_head_dim(problem.head_dim_v)
    config = config | {
        "head_dim": ("int", head_dim),
        "head_dim_v": ("int", head_dim_v),
        "block_n": ("int", tile.block_n),
        "num_consumers": ("int", tile.num_consumers),
        "value_stages": ("int", tile.value_stages),
    }
    spec = kernel_spec("backward_queries_sm90", config, device.arch)
    grid = num_blocks(problem.layout.seqlen_q, tile.block_m) * problem.num_heads * problem.layout.batch
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "dout": tile.block_m, "dq": WARPGROUP_ROWS}
    return Step(spec, grid, tile.threads, tile.shared_bytes(head_dim, head_dim_v), 1, tuple(boxes.items()))
