"""Tile sizes as data: one row per family of devices, pass, head_dim bucket and demand, with the reason beside each row.

Families are told apart by the shared memory that a block may use, which is what bounds a tile: 227 KB (sm_90, sm_100),
163 KB (sm_80, sm_87), 99 KB (sm_86, sm_89, sm_120). A measured reason is the speed's ratio to FlashAttention-2 (FA2) in
the same run; benchmarks/NOTES.md has the runs, with the variants that lost.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_COLUMNS = 64  # shared memory holds tiles as chunks of 64 columns
CHUNK_ROW_BYTES = 2 * CHUNK_COLUMNS
HEAD_DIM_STEP = 32  # kernels are compiled for multiples of this
STATISTICS_BYTES = 8  # lse and delta of one row
ANY = 5  # all extras together


@dataclass(frozen=True, slots=True)
class TileRow:
    """Tile sizes of one kernel.

    Attributes
    ----------
    family : str
        The devices that the row is for, by their first architecture: `DeviceInfo.tile_family`.
    pass_ : str
        ``"forward"`` or ``"backward"``.
    head_dim : int
        The largest head_dim (or head_dim_v) that the row serves.
    extras : int
        How many features that need registers in the inner loop the row serves at most without spilling them:
        scores scaled before the softmax, dropout, narrow loads (they count twice), and the softcap once more than as a
        scale: its polynomial or its derivative.
    block_m, block_n : int
        Rows of q and of k that a block works on at a time.
    num_warps, min_blocks, num_stages : int
        Warps of a block, blocks that should fit on a multiprocessor together, buffers of the inner loop.
    split_d : int
        Warps that share one slab of keys and split head_dim between them; 1 in the forward.
    reason : str
        The measurement that chose the row, or what an unmeasured row was chosen for.
    """

    family: str
    pass_: str
    head_dim: int
    extras: int
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

    def describe(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages, split_d {self.split_d}"
        )

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Dynamic shared memory of the main kernel of the pass: the layout at the top of its .cu file.

        >>> row_for("sm_90", "forward", 128, 128).shared_bytes(128, 128) // 1024
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
    #       family    pass        D   extras m   n    warps blocks stages split
    TileRow("sm_90",  "forward",  64,  0,   128, 128, 4,   2,   2,   1, "H200: 1.06 to 1.22 of FA2"),
    TileRow("sm_90",  "forward",  64,  ANY, 128, 64,  4,   2,   2,   1, "H200, dropout: 1.03 to 1.07 of FA2"),
    TileRow("sm_90",  "forward",  128, 0,   128, 64,  4,   2,   2,   1, "H200: 1.03 to 1.19 of FA2"),
    TileRow("sm_90",  "forward",  128, 1,   128, 32,  4,   2,   2,   1, "H200, dropout: 0.98 to 1.11 of FA2; 48 spill"),
    TileRow("sm_90",  "forward",  128, ANY, 64,  64,  4,   2,   2,   1, "H200: 0.86 to 1.08 of FA2; 128 rows spill"),
    TileRow("sm_90",  "forward",  192, ANY, 128, 64,  8,   1,   2,   1, "unmeasured: as at 256"),
    TileRow("sm_90",  "forward",  256, ANY, 128, 64,  8,   1,   2,   1, "H200: 1.02 to 1.10 of FA2"),
    TileRow("sm_100", "forward",  64,  ANY, 128, 64,  4,   2,   2,   1, "unmeasured: 2 blocks of 48 KB share an SM"),
    TileRow("sm_100", "forward",  128, ANY, 64,  64,  4,   2,   2,   1, "unmeasured: 128 rows spill"),
    TileRow("sm_100", "forward",  192, ANY, 128, 64,  8,   1,   2,   1, "unmeasured: as on H200"),
    TileRow("sm_100", "forward",  256, ANY, 128, 64,  8,   1,   2,   1, "unmeasured: as on H200"),
    TileRow("sm_80",  "forward",  64,  0,   128, 128, 4,   2,   2,   1, "unmeasured: 2 blocks of 80 KB share an SM"),
    TileRow("sm_80",  "forward",  64,  ANY, 128, 64,  4,   2,   2,   1, "unmeasured: 128 keys spill"),
    TileRow("sm_80",  "forward",  128, 1,   128, 32,  4,   2,   2,   1, "unmeasured: 48 keys spill with a window"),
    TileRow("sm_80",  "forward",  128, ANY, 64,  64,  4,   2,   2,   1, "unmeasured: 128 rows spill"),
    TileRow("sm_80",  "forward",  192, ANY, 128, 64,  8,   1,   2,   1, "unmeasured: 144 KB, 2 stages fit"),
    TileRow("sm_80",  "forward",  256, ANY, 128, 64,  8,   1,   1,   1, "unmeasured: 128 KB, 1 stage fits"),
    TileRow("sm_86",  "forward",  64,  ANY, 128, 64,  4,   2,   2,   1, "unmeasured: 2 blocks of 48 KB share an SM"),
    TileRow("sm_86",  "forward",  128, 0,   128, 32,  4,   2,   1,   1, "unmeasured: 2 blocks of 48 KB share an SM"),
    TileRow("sm_86",  "forward",  128, ANY, 64,  64,  4,   2,   1,   1, "unmeasured: 128 rows spill"),
    TileRow("sm_86",  "forward",  192, ANY, 128, 32,  8,   1,   2,   1, "unmeasured: 96 KB, 2 stages fit"),
    TileRow("sm_86",  "forward",  256, 1,   64,  64,  4,   1,   1,   1, "unmeasured: 96 KB, 1 stage fits"),
    TileRow("sm_86",  "forward",  256, ANY, 64,  32,  4,   1,   2,   1, "unmeasured: 64 keys spill"),
    TileRow("sm_90",  "backward", 64,  1,   32,  128, 4,   2,   2,   1, "H200: 1.05 to 1.12 of FA2"),
    TileRow("sm_90",  "backward", 64,  ANY, 64,  64,  4,   2,   2,   1, "H200: 0.97 to 1.09 of FA2, at 3 blocks an SM"),
    TileRow("sm_90",  "backward", 128, 1,   64,  128, 8,   1,   2,   2, "H200: 1.01 to 1.08 of FA2"),
    TileRow("sm_90",  "backward", 128, ANY, 64,  64,  8,   1,   2,   2, "unmeasured: 16 keys a warp leave registers"),
    TileRow("sm_90",  "backward", 192, ANY, 64,  64,  8,   1,   2,   2, "unmeasured: as at 256"),
    TileRow("sm_90",  "backward", 224, ANY, 32,  32,  4,   2,   2,   2, "unmeasured: 64 rows spill"),
    TileRow("sm_90",  "backward", 256, 0,   64,  64,  8,   1,   2,   2, "H200: 0.89 to 0.96 of FA2, 1 block an SM"),
    TileRow("sm_90",  "backward", 256, ANY, 32,  32,  4,   2,   2,   2, "unmeasured: 64 rows spill"),
    TileRow("sm_100", "backward", 64,  ANY, 64,  64,  4,   2,   2,   1, "unmeasured: 2 blocks of 57 KB share an SM"),
    TileRow("sm_100", "backward", 128, 1,   64,  128, 8,   1,   2,   2, "unmeasured: as on H200"),
    TileRow("sm_100", "backward", 128, ANY, 64,  64,  8,   1,   2,   2, "unmeasured: 16 keys a warp leave registers"),
    TileRow("sm_100", "backward", 192, ANY, 64,  64,  8,   1,   2,   2, "unmeasured: 161 KB, 2 stages fit"),
    TileRow("sm_100", "backward", 256, ANY, 32,  32,  4,   2,   2,   2, "unmeasured: 64 rows spill"),
    TileRow("sm_80",  "backward", 64,  ANY, 64,  64,  4,   2,   2,   1, "unmeasured: 2 blocks of 57 KB share an SM"),
    TileRow("sm_80",  "backward", 128, ANY, 64,  64,  8,   1,   2,   2, "unmeasured: 128 keys spill with a window"),
    TileRow("sm_80",  "backward", 192, ANY, 64,  64,  8,   1,   2,   2, "unmeasured: 161 KB, 2 stages fit"),
    TileRow("sm_80",  "backward", 256, ANY, 32,  32,  4,   1,   2,   2, "unmeasured: 64 rows spill, and 1 stage"),
    TileRow("sm_86",  "backward", 64,  ANY, 64,  64,  4,   2,   1,   1, "unmeasured: 2 blocks of 41 KB share an SM"),
    TileRow("sm_86",  "backward", 128, ANY, 64,  64,  8,   1,   1,   2, "unmeasured: 81 KB, 1 stage fits"),
    TileRow("sm_86",  "backward", 256, ANY, 32,  32,  4,   1,   1,   2, "unmeasured: 73 KB, 1 stage fits"),
)
# fmt: on


def row_for(family: str, pass_: str, head_dim: int, head_dim_v: int, *, extras: int = 0) -> TileRow:
    """Choose the row for a problem: the tightest head_dim bucket, and in it the first row that bears the extras.

    >>> row_for("sm_86", "forward", 80, 40).block_n
    32
    """
    served = [row for row in rows_for(family, pass_) if row.head_dim >= max(head_dim, head_dim_v)]
    return next(row for row in served if row.extras >= extras)


def rows_for(family: str, pass_: str) -> list[TileRow]:
    """All rows of a pass for a family of devices, by rising head_dim and extras."""
    return [row for row in TILES if row.family == family and row.pass_ == pass_]


def rounded_head_dim(head_dim: int) -> int:
    """The head_dim that a kernel is compiled for.

    >>> rounded_head_dim(59)
    64
    """
    return -(-head_dim // HEAD_DIM_STEP) * HEAD_DIM_STEP
