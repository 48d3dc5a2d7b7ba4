"""From a problem and a device to the kernels that solve it: sources, configurations, grids, workspace.

Plans are pure values: they name memory by size and never by address, and are made and printed without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cuflash.device import MB, DeviceInfo
from cuflash.problem import WIDEST_LOAD, ArraySpec, Problem
from cuflash.tiles import TileRow, rounded_head_dim, row_for, tile_bytes
from cuflash.tiles_sm90 import (
    WARPGROUP_ROWS,
    BackwardRow,
    ForwardRow,
    KeysRow,
    QueriesRow,
    backward_row,
    forward_row,
    queries_row,
)

ELEMENTS = {"bfloat16": "Bfloat16", "float16": "Float16"}
ITEMSIZE = 2  # bytes of both
BACKWARD_FLOPS = 2.5  # of a forward: five matrix products instead of two
PREPARED_ROWS = 128  # of a block of the preparation, where no tiles of dq decide
SINKS_THREADS = 256
SINKS_BYTES = 4 * SINKS_THREADS // 32  # one partial sum per warp
SECTION_BYTES = 32 * MB  # measured on H200: larger sections of keys and values no longer stay in L2
SECTION_SHARE = 0.6  # of a smaller L2

Config = dict[str, tuple[str, object]]  # compile-time choices of a kernel: C++ type and value by name


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What decides machine code: file, entry point, ``(name, C++ type, value)`` of the Config, architecture."""

    source: str
    entry: str
    config: tuple[tuple[str, str, object], ...]
    arch: str


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: a kernel, the number of thread blocks and what each of them takes.

    ``boxes`` are the rows that the kernel's tensor maps move at a time, by operand.
    """

    spec: KernelSpec
    grid: int
    threads: int
    shared_bytes: int
    min_blocks: int
    boxes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one pass in order, and the memory between them.

    ``dq_tile`` is the row of a kernel that computes dq alone. ``workspace`` maps a name to (shape, dtype); ``section_heads`` (batch, head) pairs are worked on together, because
    what their blocks share fits in L2. ``note`` says why a Hopper GPU runs the portable kernels, where it does.
    """

    problem: Problem
    device: DeviceInfo
    pass_: str
    steps: tuple[Step, ...]
    tile: TileRow | ForwardRow | BackwardRow | KeysRow
    workspace: Mapping[str, tuple[tuple[int, ...], str]]
    section_heads: int
    dq_tile: QueriesRow | None = None
    note: str | None = None

    @property
    def main_entry(self) -> str:
        """Entry point of the kernel that takes all parameters; a problem without elements never launches it."""
        if self.dq_tile is not None:
            return "backward_queries_sm90"
        return f"{self.pass_}_{'sm80' if isinstance(self.tile, TileRow) else 'sm90'}"

    @property
    def padded_seqlen_q(self) -> int:
        """Rows of the per-row values: whole blocks of every kernel that reads or writes them."""
        return _padded_rows(self.problem, self.tile, self.dq_tile)

    @property
    def flops(self) -> float:
        """Arithmetic of the visible pairs; absent rows and keys of key padding count as visible."""
        problem, layout = self.problem, self.problem.layout
        visible = problem.mask.band(layout.seqlen_q, layout.seqlen_k).num_pairs()
        pairs = visible * layout.batch * problem.num_heads
        forward = 2.0 * pairs * (problem.head_dim + problem.head_dim_v)
        return forward if self.pass_ == "forward" else BACKWARD_FLOPS * forward

    @property
    def bytes(self) -> int:
        """Bytes of the operands and results, each moved once, and of the workspace, written once and read once."""
        problem = self.problem
        shapes = (problem.q.shape, problem.k.shape, problem.v.shape, problem.out_shape)
        operands, lse = sum(ITEMSIZE * math.prod(shape) for shape in shapes), 4 * math.prod(problem.lse_shape)
        if self.pass_ == "forward":
            return operands + lse
        return 2 * operands + lse + 2 * sum(4 * math.prod(shape) for shape, _ in self.workspace.values())

    def floor_us(self) -> float | None:
        """Microseconds that arithmetic or memory traffic alone takes; None on a device of unknown rates."""
        if self.device.flops is None or self.device.bandwidth is None:
            return None
        return 1e6 * max(self.flops / self.device.flops, self.bytes / self.device.bandwidth)

    def explain(self, registers: Mapping[str, int] | None = None) -> str:
        """Describe the plan in lines of text.

        Parameters
        ----------
        registers : mapping of str to int, optional
            Registers per thread by entry point, where kernels are compiled; they sharpen the occupancy.
        """
        registers = registers or {}
        tile, floor = self.tile, self.floor_us()
        lines = [
            f"{self.pass_} on {self.device.name} ({self.device.arch}, {self.device.sm_count} SMs)",
            f"  tile {tile.describe()}: {tile.reason}",
        ]
        if self.dq_tile is not None:
            lines.append(f"  tile of dq {self.dq_tile.describe()}: {self.dq_tile.reason}")
        for step in self.steps:
            used = registers.get(step.spec.entry, 0)
            blocks = self.device.blocks_per_sm(step.threads, step.shared_bytes, used)
            lines.append(
                f"  {step.spec.entry} [{step.spec.arch}]: grid {step.grid}, {step.threads} threads, "
                f"{step.shared_bytes} B shared, {used or '?'} registers, {blocks} blocks per SM"
            )
        lines += [f"  {self.note}"] if self.note else []
        lines.append(f"  {self.flops:.3g} FLOP, {self.bytes:.3g} bytes, sections of {self.section_heads} heads")
        lines.append("  floor unknown for this device" if floor is None else f"  floor {floor:.1f} us")
        return "\n".join(lines)


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
        return _plan_forward_sm90(problem, device)
    layout = problem.layout
    tile = _tile(problem, device, "forward")
    config = _config(problem, tile)
    grid = _blocks(layout.seqlen_q, tile.block_m) * problem.num_heads * layout.batch
    step = _step(device, "forward_sm80", config, grid, tile)
    return Plan(
        problem=problem,
        device=device,
        pass_="forward",
        steps=_launchable(step),
        tile=tile,
        workspace={},
        section_heads=forward_section_heads(problem, device),
        note=f"portable kernels: {obstacle}" if obstacle and device.has_wgmma else None,
    )


def hopper_obstacle(problem: Problem, device: DeviceInfo) -> str | None:
    """Why no Hopper kernel can run a problem; None where the forward can.

    The copy engine takes addresses and strides of multiples of 16 bytes, and reads rows that are absent by key padding.
    """
    if not device.has_wgmma:
        return f"{device.name} is {device.arch}, not sm_90a"
    if problem.layout.used_q or problem.layout.used_k:
        return "seqused_q and seqused_k need the portable kernels"
    for name, array in {"q": problem.q, "k": problem.k, "v": problem.v, "out": problem.out}.items():
        if array is None:
            if obstacle := _row_obstacle(name, "head_dim_v", problem.head_dim_v):
                return obstacle
        elif obstacle := _copy_obstacle(name, array):
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


def _plan_forward_sm90(problem: Problem, device: DeviceInfo) -> Plan:
    layout = problem.layout
    heavy = _scale_first(problem) or problem.dropout is not None
    causal = problem.mask.right is not None
    tile = forward_row(problem.head_dim, problem.head_dim_v, layout.seqlen_q, causal=causal, heavy=heavy)
    config = _score_config(problem) | {
        "block_n": ("int", tile.block_n),
        "num_consumers": ("int", tile.num_consumers),
        "own_out": ("bool", tile.own_out),
        "ping_pong": ("bool", tile.ping_pong),
        "lazy_rescale": ("bool", tile.lazy_rescale),
        "eighths_before_wait": ("int", tile.eighths_before_wait),
    }
    spec = _spec("forward_sm90", config, device.arch)
    tiles = _blocks(layout.seqlen_q, tile.block_m) * problem.num_heads * layout.batch
    shared_bytes = tile.shared_bytes(config["head_dim"][1], config["head_dim_v"][1])
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "out": WARPGROUP_ROWS}
    step = Step(spec, min(device.sm_count, tiles), tile.threads, shared_bytes, 1, tuple(boxes.items()))
    return Plan(
        problem=problem,
        device=device,
        pass_="forward",
        steps=_launchable(step),
        tile=tile,
        workspace={},
        section_heads=forward_section_heads(problem, device),
    )


def plan_backward(problem: Problem, device: DeviceInfo) -> Plan:
    """Plan dq, dk, dv and, with sinks, dsinks.

    >>> from cuflash.problem import View
    >>> shape = (2, 1000, 8, 128)
    >>> problem = Problem.build({name: View.of(shape, "bfloat16") for name in "qkv"})
    >>> plan = plan_backward(problem, DeviceInfo.named("sm_90a"))
    >>> [step.spec.entry for step in plan.steps]
    ['backward_prepare', 'backward_sm90', 'backward_finish']
    """
    obstacle = hopper_backward_obstacle(problem, device)
    if problem.kernels == "sm90" and obstacle:
        raise NotImplementedError(f"backend is 'sm90', but {obstacle}; None or 'sm80' runs it")
    if problem.kernels != "sm80" and not obstacle:
        return _plan_backward_sm90(problem, device)
    layout = problem.layout
    tile = _tile(problem, device, "backward")
    config = _config(problem, tile)
    q_blocks = _blocks(layout.seqlen_q, tile.block_m)
    q_grid = q_blocks * problem.num_heads * layout.batch
    k_grid = _blocks(layout.seqlen_k, tile.block_n) * problem.num_kv_heads * layout.batch
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
        steps=_launchable(*steps),
        tile=tile,
        workspace=_backward_workspace(problem, tile.block_m, rounded_head_dim(problem.head_dim)),
        section_heads=backward_section_heads(problem, device),
        note=f"portable kernels: {obstacle}" if obstacle and device.has_wgmma else None,
    )


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


def _plan_backward_sm90(problem: Problem, device: DeviceInfo) -> Plan:
    layout, head_dim, head_dim_v = problem.layout, problem.head_dim, problem.head_dim_v
    tile = backward_row(head_dim, head_dim_v, layout.seqlen_q, split=problem.deterministic)
    dq_tile = queries_row(head_dim, head_dim_v, softcap=problem.modifiers.softcap != 0) if tile.split else None
    config = _score_config(problem) | {
        "head_dim": ("int", tile.columns(head_dim)),
        "head_dim_v": ("int", tile.columns(head_dim_v)),
        "block_m": ("int", tile.block_m),
        "block_n": ("int", tile.block_n),
        "num_warps": ("int", tile.num_warps),
        "load_bytes": ("int", _load_bytes(problem, "backward")),
        "store_bytes": ("int", _store_bytes(problem, "backward")),
        "warpgroups": ("bool", True),
        "deterministic": ("bool", False),  # no kernel of these needs to be told
        "with_dq": ("bool", not tile.split),
    }
    steps = [_prepare_step(problem, device, config, tile)]
    if dq_tile is not None:
        steps.append(_queries_step(problem, device, config, dq_tile))
    steps.append(_keys_step(problem, device, config, tile))
    if dq_tile is None:
        dq_bytes = tile_bytes(tile.block_m, tile.columns(head_dim))
        spec = _spec("backward_finish", config, device.portable_arch)
        steps.append(Step(spec, steps[0].grid, 32 * tile.num_warps, dq_bytes, 1))
    if problem.sinks:
        spec = _spec("backward_sinks", config, device.portable_arch)
        steps.append(Step(spec, problem.num_heads, SINKS_THREADS, SINKS_BYTES, 1))
    rows = (layout.batch, problem.num_heads, _padded_rows(problem, tile, dq_tile))
    workspace = {"row_lse": (rows, "float32"), "row_delta": (rows, "float32")}
    if dq_tile is None:
        workspace["dq_accum"] = ((*rows, tile.columns(head_dim)), "float32")
    return Plan(
        problem=problem,
        device=device,
        pass_="backward",
        steps=_launchable(*steps),
        tile=tile,
        workspace=workspace,
        section_heads=backward_section_heads(problem, device, accumulates_dq=not tile.split),
        dq_tile=dq_tile,
    )


def _prepare_step(problem: Problem, device: DeviceInfo, config: Config, tile: BackwardRow | KeysRow) -> Step:
    block_m = PREPARED_ROWS if tile.split else tile.block_m
    spec = _spec("backward_prepare", config | {"block_m": ("int", block_m)}, device.portable_arch)
    grid = _blocks(problem.layout.seqlen_q, block_m) * problem.num_heads * problem.layout.batch
    return Step(spec, grid, 32 * tile.num_warps, 0, 1)


def _keys_step(problem: Problem, device: DeviceInfo, config: Config, tile: BackwardRow | KeysRow) -> Step:
    spec = _spec(tile.entry, config, device.arch)
    grid = _blocks(problem.layout.seqlen_k, tile.block_n) * problem.num_kv_heads * problem.layout.batch
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
    spec = _spec("backward_queries_sm90", config, device.arch)
    grid = _blocks(problem.layout.seqlen_q, tile.block_m) * problem.num_heads * problem.layout.batch
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "dout": tile.block_m, "dq": WARPGROUP_ROWS}
    return Step(spec, grid, tile.threads, tile.shared_bytes(head_dim, head_dim_v), 1, tuple(boxes.items()))


def _backward_workspace(problem: Problem, block_m: int, head_dim: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Per-row values, dq in float32 and, for a repeatable sum, whose turn it is at every tile of dq."""
    batch, blocks = problem.layout.batch, _blocks(problem.layout.seqlen_q, block_m)
    rows = (batch, problem.num_heads, blocks * block_m)
    workspace = {
        "row_lse": (rows, "float32"),
        "row_delta": (rows, "float32"),
        "dq_accum": ((*rows, head_dim), "float32"),
    }
    if problem.deterministic:
        workspace["dq_turn"] = ((batch, problem.num_heads, blocks), "int32")
    return workspace


def plan_passes(problem: Problem, device: DeviceInfo) -> tuple[Plan, ...]:
    """Plan the forward and, unless the caller insists on kernels that have none for it, the backward."""
    forward = plan_forward(problem, device)
    if problem.kernels == "sm90" and hopper_backward_obstacle(problem, device):
        return (forward,)
    return forward, plan_backward(problem, device)


# The fields of each kernel's Config: a kernel that does not depend on a choice is compiled once for all values of it.
_SIZES = ("Element", "head_dim", "head_dim_v", "block_m", "block_n", "num_warps", "min_blocks", "num_stages")
_WIDTHS = ("load_bytes", "store_bytes")
_SCORES = ("window_left", "window_right", "scale_first", "softcap", "alibi", "dropout")
_DQ_TILE = ("Element", "head_dim", "block_m", "num_warps", "warpgroups")
_SCHEDULE = ("num_consumers", "own_out", "ping_pong", "lazy_rescale", "eighths_before_wait")
_DQ_SCHEDULE = ("num_consumers", "value_stages")
CONFIG_FIELDS = {
    "forward_sm80": (*_SIZES, *_WIDTHS, *_SCORES, "sinks"),
    "forward_sm90": ("Element", "head_dim", "head_dim_v", "block_n", *_SCHEDULE, *_SCORES, "sinks"),
    "backward_prepare": (*_DQ_TILE, "head_dim_v", "block_n", "load_bytes", "window_left", "deterministic", "with_dq"),
    "backward_sm80": (*_SIZES, *_WIDTHS, *_SCORES, "split_d", "warpgroups", "deterministic"),
    "backward_sm90": ("Element", "head_dim", "head_dim_v", "block_m", *_SCORES, "with_dq"),
    "backward_keys_sm90": ("Element", "head_dim", "head_dim_v", "block_m", *_SCORES),
    "backward_queries_sm90": ("Element", "head_dim", "head_dim_v", "block_n", *_DQ_SCHEDULE, *_SCORES),
    "backward_finish": (*_DQ_TILE, "store_bytes"),
    "backward_sinks": (),
}


def _tile(problem: Problem, device: DeviceInfo, pass_: str) -> TileRow:
    extras = (
        _scale_first(problem)
        + (problem.dropout is not None)
        + 2 * (_load_bytes(problem, pass_) < WIDEST_LOAD)
        + (problem.modifiers.softcap != 0 and pass_ == "backward")
    )
    return row_for(device.tile_family, pass_, problem.head_dim, problem.head_dim_v, extras=extras)


def _config(problem: Problem, tile: TileRow) -> Config:
    """All compile-time choices of the portable kernels, as C++ type and value by name."""
    return _score_config(problem) | {
        "block_m": ("int", tile.block_m),
        "block_n": ("int", tile.block_n),
        "num_warps": ("int", tile.num_warps),
        "min_blocks": ("int", tile.min_blocks),
        "num_stages": ("int", tile.num_stages),
        "load_bytes": ("int", _load_bytes(problem, tile.pass_)),
        "store_bytes": ("int", _store_bytes(problem, tile.pass_)),
        "split_d": ("int", tile.split_d),
        "warpgroups": ("bool", False),
        "deterministic": ("bool", problem.deterministic),
        "with_dq": ("bool", True),
    }


def _score_config(problem: Problem) -> Config:
    """What every kernel must know of a problem."""
    mask, modifiers = problem.mask, problem.modifiers
    return {
        "Element": ("class", ELEMENTS[problem.dtype]),
        "head_dim": ("int", rounded_head_dim(problem.head_dim)),
        "head_dim_v": ("int", rounded_head_dim(problem.head_dim_v)),
        "window_left": ("bool", mask.left is not None),
        "window_right": ("bool", mask.right is not None),
        "scale_first": ("bool", _scale_first(problem)),
        "softcap": ("bool", modifiers.softcap != 0),
        "alibi": ("bool", modifiers.alibi),
        "dropout": ("bool", problem.dropout is not None),
        "sinks": ("bool", problem.sinks),
    }


def _scale_first(problem: Problem) -> bool:
    """Whether scores are scaled before the softmax instead of in it.

    A row's maximum is taken of what the softmax sees, so the scale it folds in must be positive.
    """
    return problem.modifiers.softcap != 0 or problem.modifiers.alibi or problem.softmax_scale <= 0


def _load_bytes(problem: Problem, pass_: str) -> int:
    operands = (problem.q, problem.k, problem.v)
    return _width(problem, operands if pass_ == "forward" else (*operands, problem.out, problem.dout))


def _store_bytes(problem: Problem, pass_: str) -> int:
    return _width(problem, (problem.out,) if pass_ == "forward" else ())


def _width(problem: Problem, arrays: tuple[ArraySpec | None, ...]) -> int:
    """Widest access, in bytes, that every array's alignment allows and that ends exactly where its rows end.

    Arrays of the library's own (None) are contiguous, so their rows decide.
    """
    rows = (ITEMSIZE * problem.head_dim, ITEMSIZE * problem.head_dim_v)
    return math.gcd(WIDEST_LOAD, *rows, *(array.alignment for array in arrays if array is not None))


def _step(device: DeviceInfo, entry: str, config: Config, grid: int, tile: TileRow) -> Step:
    head_dim, head_dim_v = (config[name][1] for name in ("head_dim", "head_dim_v"))
    threads, shared_bytes = {
        "forward_sm80": (tile.threads, tile.shared_bytes(head_dim, head_dim_v)),
        "backward_prepare": (tile.threads, 0),
        "backward_sm80": (tile.threads, tile.shared_bytes(head_dim, head_dim_v)),
        "backward_finish": (tile.threads, tile_bytes(tile.block_m, head_dim)),
        "backward_sinks": (SINKS_THREADS, SINKS_BYTES),
    }[entry]
    spec = _spec(entry, config, device.portable_arch)
    min_blocks = tile.min_blocks if "min_blocks" in CONFIG_FIELDS[entry] else 1
    return Step(spec, grid, threads, shared_bytes, min_blocks)


def _spec(entry: str, config: Config, arch: str) -> KernelSpec:
    fields = tuple((name, *config[name]) for name in CONFIG_FIELDS[entry])
    return KernelSpec(source=f"{entry}.cu", entry=entry, config=fields, arch=arch)


def _launchable(*steps: Step) -> tuple[Step, ...]:
    """Steps with work to do: a grid of no blocks is an error to CUDA, and there is nothing for it to write."""
    return tuple(step for step in steps if step.grid > 0)


def forward_section_heads(problem: Problem, device: DeviceInfo) -> int:
    """Query heads whose keys and values stay in L2 together: those of a power of two of kv heads."""
    per_kv_head = problem.layout.seqlen_k * (problem.head_dim + problem.head_dim_v) * ITEMSIZE
    return problem.group_size * _section(problem, device, per_kv_head)


def backward_section_heads(problem: Problem, device: DeviceInfo, *, accumulates_dq: bool = True) -> int:
    """Kv heads whose groups' q, dout and float32 dq stay in L2 together: all blocks of a kv head use these."""
    per_row = problem.head_dim * (ITEMSIZE + 4 * accumulates_dq) + problem.head_dim_v * ITEMSIZE
    return _section(problem, device, problem.group_size * problem.layout.seqlen_q * per_row)


def _section(problem: Problem, device: DeviceInfo, bytes_per_kv_head: int) -> int:
    limit = min(SECTION_BYTES, SECTION_SHARE * device.l2_bytes)
    heads = 1
    while heads < problem.layout.batch * problem.num_kv_heads and 2 * heads * bytes_per_kv_head <= limit:
        heads *= 2
    return heads


def _padded_rows(problem: Problem, tile: TileRow | ForwardRow | BackwardRow | KeysRow, dq_tile: QueriesRow | None) -> int:
    blocks = (tile.block_m,) if dq_tile is None else (tile.block_m, dq_tile.block_m, PREPARED_ROWS)
    return _round_up(problem.layout.seqlen_q, math.lcm(*blocks))


def _blocks(rows: int, block: int) -> int:
    return -(-rows // block)


def _round_up(rows: int, block: int) -> int:
    return _blocks(rows, block) * block
