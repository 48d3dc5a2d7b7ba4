"""What a plan is: kernels, configurations, grids, workspace; and how a problem enters a kernel's configuration.

Plans are pure values: they name memory by size and never by address, and are made and printed without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cuflash.device import MB, DeviceInfo
from cuflash.problem import WIDEST_LOAD, ArraySpec, Problem
from cuflash.tiles import TileRow, rounded_head_dim
from cuflash.tiles_sm90 import BackwardRow, ForwardRow, KeysRow, QueriesRow

ELEMENTS = {"bfloat16": "Bfloat16", "float16": "Float16"}
ITEMSIZE = 2  # bytes of both
BACKWARD_FLOPS = 2.5  # of a forward: five matrix products instead of two
PREPARED_ROWS = 128  # of a block of the preparation, where no tiles of dq decide
SINKS_THREADS = 256
SINKS_BYTES = 4 * SINKS_THREADS // 32  # one partial sum per warp
# Sections of heads whose keys and values, or queries and their gradients, stay in L2 together: measured on an H200.
FORWARD_SECTION_BYTES = 16 * MB
BACKWARD_SECTION_BYTES = 32 * MB
SECTION_SHARE = 0.6  # of a smaller L2

Tile = TileRow | ForwardRow | BackwardRow | KeysRow
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

    ``dq_tile`` is the row of a kernel that computes dq alone. ``workspace`` maps a name to (shape, dtype);
    ``section_heads`` (batch, head) pairs are worked on together, because what their blocks share fits in L2.
    Rows of ``packed_heads`` query heads, which have their keys in common, share a tile; ``cluster_size`` thread
    blocks share what is copied for them. With ``split_groups`` every query head has tiles of the backward of its
    own, and the heads of a group sum dk and dv in float32. ``note`` says why a Hopper GPU runs the portable kernels,
    where it does.
    """

    problem: Problem
    device: DeviceInfo
    pass_: str
    steps: tuple[Step, ...]
    tile: Tile
    workspace: Mapping[str, tuple[tuple[int, ...], str]]
    section_heads: int
    dq_tile: QueriesRow | None = None
    packed_heads: int = 1
    cluster_size: int = 1
    split_groups: bool = False
    note: str | None = None

    @property
    def main_entry(self) -> str:
        """Entry point of the kernel that takes all parameters; a problem without elements never launches it."""
        if self.dq_tile is not None:
            return "backward_queries_sm90"
        return f"{self.pass_}_{'sm80' if isinstance(self.tile, TileRow) else 'sm90'}"

    @property
    def padded_seqlen_q(self) -> int:
        return padded_rows(self.problem, self.tile, self.dq_tile)

    @property
    def padded_seqlen_k(self) -> int:
        return padded_keys(self.problem, self.tile)

    @property
    def key_tiles(self) -> int:
        """Tiles of the backward: blocks of keys of all key/value heads, of all query heads where groups are split."""
        heads = self.problem.num_heads if self.split_groups else self.problem.num_kv_heads
        blocks = num_blocks(self.problem.layout.seqlen_k, self.tile.block_n)
        return blocks * heads * self.problem.layout.batch

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
        if self.packed_heads > 1:
            lines.append(f"  a tile holds the queries of {self.packed_heads} heads with the same keys")
        if self.cluster_size > 1:
            lines.append(f"  clusters of {self.cluster_size} thread blocks share what is copied for them")
        if self.split_groups:
            lines.append("  a tile takes one query head; those of a group sum dk and dv in float32")
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


# The fields of each kernel's Config: a kernel that does not depend on a choice is compiled once for all values of it.
_SIZES = ("Element", "head_dim", "head_dim_v", "block_m", "block_n", "num_warps", "min_blocks", "num_stages")
_WIDTHS = ("load_bytes", "store_bytes")
_SCORES = ("window_left", "window_right", "scale_first", "softcap", "alibi", "dropout")
_USED = ("used_queries", "used_keys")
_DQ_TILE = ("Element", "head_dim", "block_m", "num_warps")
_SCHEDULE = (
    *("num_consumers", "query_stages", "out_chunks", "ping_pong", "lazy_rescale", "eighths_before_wait"),
    "early_draws",
)
_DQ_SCHEDULE = ("num_consumers", "value_stages")
CONFIG_FIELDS = {
    "forward_sm80": (*_SIZES, *_WIDTHS, *_SCORES, "sinks"),
    "forward_sm90": (
        *("Element", "head_dim", "head_dim_v", "block_n", "packed_heads", "cluster_size"),
        *_SCHEDULE,
        *_SCORES,
        *("sinks", "used_keys"),
    ),
    "backward_prepare": (
        *(*_DQ_TILE, "head_dim_v", "block_n", "load_bytes", "window_left", "deterministic"),
        *("with_dq", "first_stores", "split_groups"),
    ),
    "backward_sm80": (*_SIZES, *_WIDTHS, *_SCORES, "split_d", "deterministic"),
    "backward_sm90": (
        *("Element", "head_dim", "head_dim_v", "block_m", *_SCORES, *_USED),
        *("with_dq", "first_stores", "split_groups"),
    ),
    "backward_keys_sm90": ("Element", "head_dim", "head_dim_v", "block_m", *_SCORES, "used_queries"),
    "backward_queries_sm90": ("Element", "head_dim", "head_dim_v", "block_n", *_DQ_SCHEDULE, *_SCORES, *_USED),
    "backward_finish": (*_DQ_TILE, "store_bytes"),
    "backward_finish_groups": ("Element", "head_dim", "head_dim_v", "block_n", "num_warps", "dropout"),
    "backward_sinks": (),
}


def score_config(problem: Problem) -> Config:
    """What every kernel must know of a problem."""
    mask, modifiers = problem.mask, problem.modifiers
    return {
        "Element": ("class", ELEMENTS[problem.dtype]),
        "head_dim": ("int", rounded_head_dim(problem.head_dim)),
        "head_dim_v": ("int", rounded_head_dim(problem.head_dim_v)),
        "window_left": ("bool", mask.left is not None),
        "window_right": ("bool", mask.right is not None),
        "scale_first": ("bool", scale_first(problem)),
        "softcap": ("bool", modifiers.softcap != 0),
        "alibi": ("bool", modifiers.alibi),
        "dropout": ("bool", problem.dropout is not None),
        "sinks": ("bool", problem.sinks),
    }


def scale_first(problem: Problem) -> bool:
    """Whether scores are scaled before the softmax instead of in it.

    A row's maximum is taken of what the softmax sees, so the scale it folds in must be positive.
    """
    return problem.modifiers.softcap != 0 or problem.modifiers.alibi or problem.softmax_scale <= 0


def load_bytes(problem: Problem, pass_: str) -> int:
    operands = (problem.q, problem.k, problem.v)
    return _width(problem, operands if pass_ == "forward" else (*operands, problem.out, problem.dout))


def store_bytes(problem: Problem, pass_: str) -> int:
    return _width(problem, (problem.out,) if pass_ == "forward" else ())


def _width(problem: Problem, arrays: tuple[ArraySpec | None, ...]) -> int:
    """Widest access, in bytes, that every array's alignment allows and that ends exactly where its rows end.

    Arrays of the library's own (None) are contiguous, so their rows decide.
    """
    rows = (ITEMSIZE * problem.head_dim, ITEMSIZE * problem.head_dim_v)
    return math.gcd(WIDEST_LOAD, *rows, *(array.alignment for array in arrays if array is not None))


def kernel_spec(entry: str, config: Config, arch: str) -> KernelSpec:
    fields = tuple((name, *config[name]) for name in CONFIG_FIELDS[entry])
    return KernelSpec(source=f"{entry}.cu", entry=entry, config=fields, arch=arch)


def launchable(*steps: Step) -> tuple[Step, ...]:
    """Steps with work to do: a grid of no blocks is an error to CUDA, and there is nothing for it to write."""
    return tuple(step for step in steps if step.grid > 0)


def forward_section_heads(problem: Problem, device: DeviceInfo) -> int:
    """Query heads whose keys and values stay in L2 together: those of a power of two of kv heads."""
    per_kv_head = problem.layout.seqlen_k * (problem.head_dim + problem.head_dim_v) * ITEMSIZE
    pairs = problem.layout.batch * problem.num_kv_heads
    return problem.group_size * _section(device, pairs, per_kv_head, FORWARD_SECTION_BYTES)


def backward_section_heads(
    problem: Problem, device: DeviceInfo, *, accumulates_dq: bool = True, split_groups: bool = False
) -> int:
    """Kv heads whose groups' q, dout and float32 dq stay in L2 together: all blocks of a kv head use these.

    Query heads, with their own alone, where groups are split.
    """
    per_row = problem.head_dim * (ITEMSIZE + 4 * accumulates_dq) + problem.head_dim_v * ITEMSIZE
    heads = 1 if split_groups else problem.group_size
    pairs = problem.layout.batch * problem.num_heads // heads
    return _section(device, pairs, heads * problem.layout.seqlen_q * per_row, BACKWARD_SECTION_BYTES)


def _section(device: DeviceInfo, pairs: int, bytes_per_pair: int, most_bytes: int) -> int:
    limit = min(most_bytes, SECTION_SHARE * device.l2_bytes)
    heads = 1
    while heads < pairs and 2 * heads * bytes_per_pair <= limit:
        heads *= 2
    return heads


def padded_rows(problem: Problem, tile: Tile, dq_tile: QueriesRow | None) -> int:
    """Rows of the per-row values of the backward: whole blocks of every kernel that reads or writes them."""
    blocks = (tile.block_m,) if dq_tile is None else (tile.block_m, dq_tile.block_m, PREPARED_ROWS)
    return round_up(problem.layout.seqlen_q, math.lcm(*blocks))


def padded_keys(problem: Problem, tile: Tile) -> int:
    """Keys of the sums of dk and dv: whole blocks."""
    return round_up(problem.layout.seqlen_k, tile.block_n)


def num_blocks(rows: int, block: int) -> int:
    return -(-rows // block)


def round_up(rows: int, block: int) -> int:
    return num_blocks(rows, block) * block
