"""Tile sizes as data: one row per shared-memory class, pass and head_dim bucket, with the reason beside each row.

Rows are chosen by how much shared memory a block may use, which is what bounds a tile: 227 KB (sm_90, sm_100), 163 KB
(sm_80, sm_87), 99 KB (sm_86, sm_89, sm_120).
"""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024
CHUNK_COLUMNS = 64  # shared memory holds tiles as chunks of 64 columns
CHUNK_ROW_BYTES = 2 * CHUNK_COLUMNS
HEAD_DIM_STEP = 32  # kernels are compiled for multiples of this
STATISTICS_BYTES = 8  # lse and delta of one row


@dataclass(frozen=True, slots=True)
class TileRow:
    """Tile sizes of one kernel.

    Attributes
    ----------
    shared : int
        Shared memory per block, in KB, that a device must offer at least.
    pass_ : str
        ``"forward"`` or ``"backward"``.
    head_dim : int
        The largest head_dim (or head_dim_v) that the row serves.
    dropout : bool or None
        Whether the row is for problems with, without, or (None) for both.
    block_m, block_n : int
        Rows of q and of k that a block works on at a time.
    num_warps, min_blocks, num_stages : int
        Warps of a block, blocks that should fit on a multiprocessor together, buffers of the inner loop.
    split_d : int
        Warps that share one slab of keys and split head_dim between them; 1 in the forward.
    reason : str
        The measurement that chose the row, or what an unmeasured row was chosen for.
    """

    shared: int
    pass_: str
    head_dim: int
    dropout: bool | None
    block_m: int
    block_n: int
    num_warps: int
    min_blocks: int
    num_stages: int
    split_d: int
    reason: str

    @property
    def threads(self) -> int:
        return 32 * self.num_warps

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Dynamic shared memory of the main kernel of the pass: the layout at the top of its .cu file.

        >>> row_for(227 * KB, "forward", 128, 128).shared_bytes(128, 128) // 1024
        96
        """
        if self.pass_ == "forward":
            q_or_out = tile_bytes(self.block_m, max(head_dim, head_dim_v))
            k_and_v = tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, head_dim_v)
            return q_or_out + self.num_stages * k_and_v
        k_and_v = tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, head_dim_v)
        q_and_dout = tile_bytes(self.block_m, head_dim) + tile_bytes(self.block_m, head_dim_v)
        ds_and_p = tile_bytes(self.block_n, self.block_m) * min(self.split_d, 2)
        return k_and_v + self.num_stages * (q_and_dout + STATISTICS_BYTES * self.block_m) + ds_and_p


def tile_bytes(rows: int, columns: int) -> int:
    """Bytes of a 16-bit tile in shared memory, where rows of 64 columns lie together."""
    return -(-columns // CHUNK_COLUMNS) * rows * CHUNK_ROW_BYTES


# fmt: off
TILES = (
    #       KB   pass        D   dropout  m    n   warps blocks stages split
    TileRow(227, "forward",  64,  False, 128, 128, 4,   2,   2,   1, "unmeasured: 2 blocks of 80 KB share an SM"),
    TileRow(227, "forward",  64,  True,  128, 64,  4,   2,   2,   1, "unmeasured: random bits need registers"),
    TileRow(227, "forward",  96,  None,  128, 64,  4,   2,   2,   1, "unmeasured: 2 blocks of 96 KB share an SM"),
    TileRow(227, "forward",  128, None,  128, 64,  4,   2,   2,   1, "unmeasured: 2 blocks of 96 KB share an SM"),
    TileRow(227, "forward",  192, None,  128, 64,  8,   1,   2,   1, "unmeasured: out in registers, 16 rows a warp"),
    TileRow(227, "forward",  256, None,  128, 64,  8,   1,   2,   1, "unmeasured: out in registers, 16 rows a warp"),
    TileRow(163, "forward",  64,  False, 128, 128, 4,   2,   2,   1, "unmeasured: 2 blocks of 80 KB share an SM"),
    TileRow(163, "forward",  64,  True,  128, 64,  4,   2,   2,   1, "unmeasured: random bits need registers"),
    TileRow(163, "forward",  96,  None,  128, 64,  4,   2,   1,   1, "unmeasured: 1 stage lets 2 blocks share an SM"),
    TileRow(163, "forward",  128, None,  128, 64,  4,   2,   1,   1, "unmeasured: 1 stage lets 2 blocks share an SM"),
    TileRow(163, "forward",  192, None,  128, 64,  8,   1,   2,   1, "unmeasured: 144 KB, both stages fit"),
    TileRow(163, "forward",  256, None,  128, 64,  8,   1,   1,   1, "unmeasured: 128 KB, one stage fits"),
    TileRow(99,  "forward",  64,  None,  128, 64,  4,   2,   2,   1, "unmeasured: 2 blocks of 48 KB share an SM"),
    TileRow(99,  "forward",  96,  None,  128, 32,  4,   2,   1,   1, "unmeasured: 2 blocks of 48 KB share an SM"),
    TileRow(99,  "forward",  128, None,  128, 32,  4,   2,   1,   1, "unmeasured: 2 blocks of 48 KB share an SM"),
    TileRow(99,  "forward",  192, None,  128, 32,  8,   1,   2,   1, "unmeasured: 96 KB, both stages fit"),
    TileRow(99,  "forward",  256, None,  64,  64,  4,   1,   1,   1, "unmeasured: 96 KB, one stage fits"),
    TileRow(227, "backward", 64,  None,  64,  128, 8,   1,   2,   1, "unmeasured: dk, dv in registers, 16 keys a warp"),
    TileRow(227, "backward", 128, None,  64,  128, 8,   1,   2,   1, "unmeasured: dk, dv in registers, 16 keys a warp"),
    TileRow(227, "backward", 256, None,  64,  64,  8,   1,   1,   2, "unmeasured: 2 warps split dk, dv of 16 keys"),
    TileRow(163, "backward", 64,  None,  64,  128, 8,   1,   2,   1, "unmeasured: dk, dv in registers, 16 keys a warp"),
    TileRow(163, "backward", 128, None,  64,  128, 8,   1,   2,   1, "unmeasured: dk, dv in registers, 16 keys a warp"),
    TileRow(163, "backward", 256, None,  64,  64,  8,   1,   1,   2, "unmeasured: 2 warps split dk, dv of 16 keys"),
    TileRow(99,  "backward", 64,  None,  64,  128, 8,   1,   2,   1, "unmeasured: 81 KB, both stages fit"),
    TileRow(99,  "backward", 128, None,  64,  64,  8,   1,   1,   2, "unmeasured: 81 KB, one stage fits"),
    TileRow(99,  "backward", 192, None,  32,  64,  8,   1,   1,   2, "unmeasured: 88 KB, one stage fits"),
    TileRow(99,  "backward", 256, None,  32,  32,  4,   1,   1,   2, "unmeasured: 72 KB, one stage fits"),
)
# fmt: on


def row_for(shared_per_block: int, pass_: str, head_dim: int, head_dim_v: int, *, dropout: bool = False) -> TileRow:
    """Choose the row for a problem: the richest class that the device offers, the tightest head_dim bucket.

    >>> row_for(99 * KB, "forward", 80, 40).block_n
    32
    """
    served = [row for row in rows_for(shared_per_block, pass_) if row.head_dim >= max(head_dim, head_dim_v)]
    return next(row for row in served if row.dropout in (None, dropout))


def rows_for(shared_per_block: int, pass_: str) -> list[TileRow]:
    """All rows of a pass for a device, by rising head_dim."""
    offered = max(row.shared for row in TILES if row.shared * KB <= shared_per_block)
    return [row for row in TILES if row.shared == offered and row.pass_ == pass_]


def rounded_head_dim(head_dim: int) -> int:
    """The head_dim that a kernel is compiled for.

    >>> rounded_head_dim(59)
    64
    """
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP
