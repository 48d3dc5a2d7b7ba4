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

ELEMENTS = {"bfloat16": "Bfloat16", "float16": "Float16"}
ITEMSIZE = 2  # bytes of both
BACKWARD_FLOPS = 2.5  # of a forward: five matrix products instead of two
SINKS_THREADS = 256
SINKS_BYTES = 4 * SINKS_THREADS // 32  # one partial sum per warp
SECTION_BYTES = 32 * MB  # measured on H200: larger sections of keys and values no longer stay in L2
SECTION_SHARE = 0.6  # of a smaller L2


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What decides machine code: file, entry point, ``(name, C++ type, value)`` of the Config, architecture."""

    source: str
    entry: str
    config: tuple[tuple[str, str, object], ...]
    arch: str


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: a kernel, the number of thread blocks and what each of them takes."""

    spec: KernelSpec
    grid: int
    threads: int
    shared_bytes: int
    min_blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one pass in order, and the memory between them.

    ``workspace`` maps a name to (shape, dtype); ``section_heads`` (batch, head) pairs are worked on together, because
    what their blocks share fits in L2.
    """

    problem: Problem
    device: DeviceInfo
    pass_: str
    steps: tuple[Step, ...]
    tile: TileRow
    workspace: Mapping[str, tuple[tuple[int, ...], str]]
    section_heads: int

    @property
    def padded_seqlen_q(self) -> int:
        return _round_up(self.problem.layout.seqlen_q, self.tile.block_m)

    @property
    def flops(self) -> float:
        """Arithmetic of the visible pairs; absent rows and keys of key padding count as visible."""
        problem = self.problem
        pairs = visible_pairs(problem) * problem.layout.batch * problem.num_heads
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
            f"  tile {tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages, "
            f"split_d {tile.split_d}: {tile.reason}",
        ]
        for step in self.steps:
            used = registers.get(step.spec.entry, 0)
            blocks = self.device.blocks_per_sm(step.threads, step.shared_bytes, used)
            lines.append(
                f"  {step.spec.entry} [{step.spec.arch}]: grid {step.grid}, {step.threads} threads, "
                f"{step.shared_bytes} B shared, {used or '?'} registers, {blocks} blocks per SM"
            )
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
    [('forward_sm80', 128, 128)]
    """
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
    )


def plan_backward(problem: Problem, device: DeviceInfo) -> Plan:
    """Plan dq, dk, dv and, with sinks, dsinks.

    >>> from cuflash.problem import View
    >>> shape = (2, 1000, 8, 128)
    >>> problem = Problem.build({name: View.of(shape, "bfloat16") for name in "qkv"})
    >>> plan = plan_backward(problem, DeviceInfo.named("sm_90a"))
    >>> [step.spec.entry for step in plan.steps]
    ['backward_prepare', 'backward_sm80', 'backward_finish']
    """
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
    rows = (layout.batch, problem.num_heads, q_blocks * tile.block_m)
    workspace = {
        "row_lse": (rows, "float32"),
        "row_delta": (rows, "float32"),
        "dq_accum": ((*rows, rounded_head_dim(problem.head_dim)), "float32"),
    }
    if problem.deterministic:
        workspace["dq_turn"] = ((layout.batch, problem.num_heads, q_blocks), "int32")
    return Plan(
        problem=problem,
        device=device,
        pass_="backward",
        steps=_launchable(*steps),
        tile=tile,
        workspace=workspace,
        section_heads=backward_section_heads(problem, device),
    )


# The fields of each kernel's Config: a kernel that does not depend on a choice is compiled once for all values of it.
_SIZES = ("Element", "head_dim", "head_dim_v", "block_m", "block_n", "num_warps", "min_blocks", "num_stages")
_WIDTHS = ("load_bytes", "store_bytes")
_SCORES = ("window_left", "window_right", "scale_first", "softcap", "alibi", "dropout")
_DQ_TILE = ("Element", "head_dim", "block_m", "num_warps")
CONFIG_FIELDS = {
    "forward_sm80": (*_SIZES, *_WIDTHS, *_SCORES, "sinks"),
    "backward_prepare": (*_DQ_TILE, "head_dim_v", "block_n", "load_bytes", "window_left", "deterministic"),
    "backward_sm80": (*_SIZES, *_WIDTHS, *_SCORES, "split_d", "deterministic"),
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


def _config(problem: Problem, tile: TileRow) -> dict[str, tuple[str, object]]:
    """All compile-time choices, as C++ type and value by name."""
    mask, modifiers = problem.mask, problem.modifiers
    return {
        "Element": ("class", ELEMENTS[problem.dtype]),
        "head_dim": ("int", rounded_head_dim(problem.head_dim)),
        "head_dim_v": ("int", rounded_head_dim(problem.head_dim_v)),
        "block_m": ("int", tile.block_m),
        "block_n": ("int", tile.block_n),
        "num_warps": ("int", tile.num_warps),
        "min_blocks": ("int", tile.min_blocks),
        "num_stages": ("int", tile.num_stages),
        "load_bytes": ("int", _load_bytes(problem, tile.pass_)),
        "store_bytes": ("int", _store_bytes(problem, tile.pass_)),
        "window_left": ("bool", mask.left is not None),
        "window_right": ("bool", mask.right is not None),
        "scale_first": ("bool", _scale_first(problem)),
        "softcap": ("bool", modifiers.softcap != 0),
        "alibi": ("bool", modifiers.alibi),
        "dropout": ("bool", problem.dropout is not None),
        "sinks": ("bool", problem.sinks),
        "split_d": ("int", tile.split_d),
        "deterministic": ("bool", problem.deterministic),
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


def _step(device: DeviceInfo, entry: str, config: dict[str, tuple[str, object]], grid: int, tile: TileRow) -> Step:
    head_dim, head_dim_v = (config[name][1] for name in ("head_dim", "head_dim_v"))
    threads, shared_bytes = {
        "forward_sm80": (tile.threads, tile.shared_bytes(head_dim, head_dim_v)),
        "backward_prepare": (tile.threads, 0),
        "backward_sm80": (tile.threads, tile.shared_bytes(head_dim, head_dim_v)),
        "backward_finish": (tile.threads, tile_bytes(tile.block_m, head_dim)),
        "backward_sinks": (SINKS_THREADS, SINKS_BYTES),
    }[entry]
    spec = KernelSpec(
        source=f"{entry}.cu",
        entry=entry,
        config=tuple((name, *config[name]) for name in CONFIG_FIELDS[entry]),
        arch=device.portable_arch,
    )
    min_blocks = tile.min_blocks if "min_blocks" in CONFIG_FIELDS[entry] else 1
    return Step(spec, grid, threads, shared_bytes, min_blocks)


def _launchable(*steps: Step) -> tuple[Step, ...]:
    """Steps with work to do: a grid of no blocks is an error to CUDA, and there is nothing for it to write."""
    return tuple(step for step in steps if step.grid > 0)


def visible_pairs(problem: Problem) -> int:
    """Visible (query, key) pairs of one head of one sequence at its full lengths.

    >>> from cuflash.problem import View
    >>> shape = (1, 100, 1, 64)
    >>> visible_pairs(Problem.build({name: View.of(shape, "float16") for name in "qkv"}, causal=True))
    5050
    """
    seqlen_q, seqlen_k, mask = problem.layout.seqlen_q, problem.layout.seqlen_k, problem.mask
    offset = mask.offset(seqlen_q, seqlen_k)
    # Row i sees keys from max(0, i + offset - left) up to min(seqlen_k, i + offset + right + 1).
    ends = seqlen_k * seqlen_q if mask.right is None else _clamped_sum(offset + mask.right + 1, seqlen_q, seqlen_k)
    begins = 0 if mask.left is None else _clamped_sum(offset - mask.left, seqlen_q, seqlen_k)
    return ends - begins


def _clamped_sum(first: int, count: int, limit: int) -> int:
    """Sum of ``first, first + 1, ...``, ``count`` terms, each clamped to [0, limit]."""
    rising_from = min(max(-first, 0), count)  # terms before are clamped to 0
    rising_to = min(max(limit - first, 0), count)  # terms from here on are clamped to limit
    rising = rising_to - rising_from
    return rising * (2 * first + rising_from + rising_to - 1) // 2 + (count - rising_to) * limit


def forward_section_heads(problem: Problem, device: DeviceInfo) -> int:
    """Query heads whose keys and values stay in L2 together: those of a power of two of kv heads."""
    per_kv_head = problem.layout.seqlen_k * (problem.head_dim + problem.head_dim_v) * ITEMSIZE
    return problem.group_size * _section(problem, device, per_kv_head)


def backward_section_heads(problem: Problem, device: DeviceInfo) -> int:
    """Kv heads whose groups' q, dout and float32 dq stay in L2 together: all blocks of a kv head use these."""
    per_row = problem.head_dim * (ITEMSIZE + 4) + problem.head_dim_v * ITEMSIZE
    return _section(problem, device, problem.group_size * problem.layout.seqlen_q * per_row)


def _section(problem: Problem, device: DeviceInfo, bytes_per_kv_head: int) -> int:
    limit = min(SECTION_BYTES, SECTION_SHARE * device.l2_bytes)
    heads = 1
    while heads < problem.layout.batch * problem.num_kv_heads and 2 * heads * bytes_per_kv_head <= limit:
        heads *= 2
    return heads


def _blocks(rows: int, block: int) -> int:
    return -(-rows // block)


def _round_up(rows: int, block: int) -> int:
    return _blocks(rows, block) * block
