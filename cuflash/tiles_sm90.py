"""Tile sizes of the Hopper kernels as data, with the measurement that chose each row.

A measured reason is the speed's ratio to the best of FlashAttention-3 and cuDNN in the same run, on an H200 or an H100;
benchmarks/NOTES.md has the runs, with the variants that lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.tiles import ANY, rounded_head_dim, tile_bytes

WARPGROUP_ROWS = 64
WARPGROUP_THREADS = 128
STAGES = 2
CHUNK_COLUMNS = 64  # of a tile in shared memory: kernels_cu/tile/swizzle.cuh
BARRIER_BYTES = 8
QUEUE_BYTES = 48  # tile::TileQueue of kernels_cu/tile/pipeline.cuh
PACKED_ROWS = 128  # of a tile that several heads share: two consumers, so that up to eight heads have whole slabs of 16
PACKED_HEADS = (1, 2, 4, 8)
# Blocks of queries; of groups half under a mask that cuts to the right, else a quarter. On an H100, D 128: gains 12 to
# 25 % at 512, 0 to 2 % at 4096, would lose 2 % at 8192. Groups of 8 gain 4 % at 2048 causal, would lose 4 % full.
FIRST_STORES_BLOCKS = 64
PACKING_PAYS = 0.75  # of the rows that tiles of one head compute: 0.67 and 0.5 of them gave 1.5 and 1.3 times the speed


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """Tile sizes and schedule of forward_sm90.cu.

    Attributes
    ----------
    head_dim, head_dim_v : int
        The largest that the row serves.
    longest : int or None
        The longest seqlen_q that the row serves; None for any.
    causal : bool or None
        Whether the row is for masks that cut to the right, for those that do not, or (None) for both.
    extras : int
        How much that takes registers or time in the inner loop the row serves at most: scores scaled before the softmax
        are 1, a softcap is 1 more, dropout 3.
    num_consumers : int
        Warpgroups of 64 query rows each, beside the producer.
    block_n : int
        Keys of a block.
    query_stages : int
        Buffers of q: with two, the next tile's is loaded long before it is wanted.
    out_chunks : int
        Chunks of 64 columns of the output that are staged at a time in memory of their own, so that the next tile's q
        is loaded meanwhile; 0 stages the output where q was.
    ping_pong : bool
        Consumers take turns on the tensor cores.
    lazy_rescale : bool
        The output is rescaled only where a row's maximum has grown by more than 2^8.
    eighths_before_wait : int
        Eighths of the exponentials that stand before the wait for the output's product; 0 leaves it to the compiler.
    cluster_size : int
        Thread blocks, on neighbouring query blocks, that share the copies of keys and values where no mask cuts.
    early_draws : int
        Philox calls, for eight scores of a thread each, that dropout makes while the tensor cores are at the scores.
    reason : str
        The measurement that chose the row.
    """

    head_dim: int
    head_dim_v: int
    longest: int | None
    causal: bool | None
    extras: int
    num_consumers: int
    block_n: int
    query_stages: int
    out_chunks: int
    ping_pong: bool
    lazy_rescale: bool
    eighths_before_wait: int
    cluster_size: int
    early_draws: int
    reason: str

    @property
    def block_m(self) -> int:
        return WARPGROUP_ROWS * self.num_consumers

    @property
    def threads(self) -> int:
        return WARPGROUP_THREADS * (self.num_consumers + 1)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Dynamic shared memory: the layout at the top of forward_sm90.cu.

        >>> forward_row(128, 128, 4096, causal=True, extras=0).shared_bytes(128, 128) // 1024
        224
        """
        q, out = self.query_stages * tile_bytes(self.block_m, head_dim), tile_bytes(self.block_m, head_dim_v)
        staged = tile_bytes(self.block_m, CHUNK_COLUMNS * self.out_chunks)
        k_and_v = tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, head_dim_v)
        barriers = 2 * (self.query_stages + 2 * STAGES) * BARRIER_BYTES
        return (q + staged if self.out_chunks else max(q, out)) + STAGES * k_and_v + barriers + QUEUE_BYTES

    def clusters(self, query_blocks: int, *, masked: bool) -> int:
        """Choose how many of the query blocks of a head share keys and values.

        Where a mask cuts each would wait for the other where it sees nothing itself.

        >>> row = forward_row(256, 256, 8192, causal=False, extras=0)
        >>> row.clusters(64, masked=False), row.clusters(63, masked=False), row.clusters(64, masked=True)
        (2, 1, 1)
        """
        return 1 if masked or query_blocks % self.cluster_size else self.cluster_size

    def describe(self) -> str:
        schedule = [f"{self.num_consumers} consumer warpgroups"]
        schedule += ["own output staging"] * (self.out_chunks > 0) + ["ping-pong"] * self.ping_pong
        schedule += ["lazy rescaling"] * self.lazy_rescale
        if self.eighths_before_wait:
            schedule.append(f"{self.eighths_before_wait}/8 of the exponentials before the wait")
        return f"{self.block_m}x{self.block_n}, " + ", ".join(schedule)


@dataclass(frozen=True, slots=True)
class BackwardRow:
    """Tile sizes of backward_sm90.cu.

    Attributes
    ----------
    head_dim : int
        What head_dim and head_dim_v are both padded to: halves of a dq tile are 64 columns or 64 rows.
    split : bool
        Another kernel computes dq: a repeatable sum at no price, for seven products instead of five.
    block_m : int
        Queries of a block; the keys of a block are 128, two warpgroups of 64.
    split_groups_from : int or None
        From this seqlen_q on, under a mask that cuts to the right, a tile takes one query head and adds to the sums of
        its group; None where the kernel has no registers for that.
    persistent : bool
        A CTA a multiprocessor goes from tile to tile, and loads the next one's operands meanwhile; else a CTA a tile.
    reason : str
        The measurement that chose the row.
    """

    head_dim: int
    split: bool
    block_m: int
    split_groups_from: int | None
    reason: str
    persistent: bool = True

    entry = "backward_sm90"
    num_consumers = 2
    block_n = WARPGROUP_ROWS * num_consumers
    num_warps = 4 * num_consumers  # of the preparation and of the conversion of dk and dv of groups
    threads = WARPGROUP_THREADS * (num_consumers + 1)

    def columns(self, head_dim: int) -> int:
        return self.head_dim

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Dynamic shared memory: the layout at the top of backward_sm90.cu.

        >>> [backward_row(96, 96, split=split).shared_bytes(128, 128) // 1024 for split in (False, True)]
        [225, 161]
        """
        k_or_v, q_or_dout = tile_bytes(self.block_n, self.head_dim), tile_bytes(self.block_m, self.head_dim)
        stages = STAGES * 2 * (q_or_dout + 4 * self.block_m)
        ds, dq = STAGES * tile_bytes(self.block_m, self.block_n), 4 * self.block_m * self.head_dim
        barriers = (2 * 2 * (1 + STAGES) + 1) * BARRIER_BYTES
        return 3 * k_or_v + stages + (0 if self.split else ds + dq) + barriers + QUEUE_BYTES

    def first_stores(self, queries: int, heads: int, *, causal: bool) -> bool:
        """Whether the first key block of a query block stores its part of dq, so that no accumulator is cleared.

        ``queries`` of ``heads`` heads are seen by a block of keys: all key blocks keep in step with the first, which
        costs the more the longer that takes.
        """
        return -(-queries // self.block_m) <= FIRST_STORES_BLOCKS // (1 if heads == 1 else 2 if causal else 4)

    def splits_groups(self, group_size: int, seqlen_q: int, *, causal: bool) -> bool:
        """Whether tiles take single query heads: more and shorter ones, so that unequal ones end together."""
        long = self.split_groups_from is not None and seqlen_q >= self.split_groups_from
        return causal and group_size > 1 and long

    def describe(self) -> str:
        schedule = f"{self.num_consumers} consumer warpgroups, head_dim {self.head_dim}"
        return f"{self.block_m}x{self.block_n}, {schedule}"


@dataclass(frozen=True, slots=True)
class KeysRow:
    """Tile sizes of backward_keys_sm90.cu, whose two consumer warpgroups work on the same 64 keys.

    Attributes
    ----------
    head_dim : int
        The largest head_dim and head_dim_v that the row serves.
    block_m : int
        Queries of a block.
    reason : str
        The measurement that chose the row.
    """

    head_dim: int
    block_m: int
    reason: str

    entry, persistent = "backward_keys_sm90", False
    split = True
    block_n = WARPGROUP_ROWS
    num_warps = 8  # of the preparation
    threads = WARPGROUP_THREADS * 3

    def splits_groups(self, group_size: int, seqlen_q: int, *, causal: bool) -> bool:
        return False

    def columns(self, head_dim: int) -> int:
        return rounded_head_dim(head_dim)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Dynamic shared memory: the layout at the top of backward_keys_sm90.cu.

        >>> backward_row(256, 256, split=True).shared_bytes(256, 256) // 1024
        225
        """
        k_and_v = tile_bytes(self.block_n, head_dim) + tile_bytes(self.block_n, head_dim_v)
        q_and_dout = tile_bytes(self.block_m, head_dim) + tile_bytes(self.block_m, head_dim_v)
        probabilities, statistics = 4 * self.block_m * self.block_n, 2 * 4 * self.block_m
        barriers = 2 * (1 + 2 * STAGES) * BARRIER_BYTES
        return k_and_v + STAGES * (q_and_dout + probabilities + statistics) + barriers

    def describe(self) -> str:
        return f"{self.block_m}x{self.block_n}, a consumer warpgroup for dk and one for dv"


@dataclass(frozen=True, slots=True)
class QueriesRow:
    """Tile sizes of backward_queries_sm90.cu.

    Attributes
    ----------
    head_dim, head_dim_v : int
        The largest that the row serves.
    extras : int
        How many of softcap, ALiBi and dropout the row serves at most without spilling registers.
    num_consumers : int
        Warpgroups of 64 query rows each, beside the producer.
    block_n : int
        Keys of a block.
    value_stages : int
        Buffers of v; k has two.
    reason : str
        The measurement that chose the row.
    """

    head_dim: int
    head_dim_v: int
    extras: int
    num_consumers: int
    block_n: int
    value_stages: int
    reason: str

    @property
    def block_m(self) -> int:
        return WARPGROUP_ROWS * self.num_consumers

    @property
    def threads(self) -> int:
        return WARPGROUP_THREADS * (self.num_consumers + 1)

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        """Dynamic shared memory: the layout at the top of backward_queries_sm90.cu.

        >>> queries_row(256, 256, extras=0).shared_bytes(256, 256) // 1024
        224
        """
        q_and_dout = tile_bytes(self.block_m, head_dim) + tile_bytes(self.block_m, head_dim_v)
        k, v = tile_bytes(self.block_n, head_dim), tile_bytes(self.block_n, head_dim_v)
        barriers = 2 * (1 + STAGES + self.value_stages) * BARRIER_BYTES
        return q_and_dout + STAGES * k + self.value_stages * v + barriers

    def describe(self) -> str:
        return f"{self.block_m}x{self.block_n}, {self.num_consumers} consumer warpgroups, {self.value_stages} of v"


# fmt: off
FORWARD = (
    #          D    Dv   longest causal extras consumers n q out ping_pong lazy eighths cluster draws
    ForwardRow(64,  64,  None, None,  1,   3, 128, 2, 1, True,  False, 0, 1, 0, "0.97 to 1.09; ALiBi 0.87 of plain"),
    ForwardRow(64,  64,  None, True,  ANY, 3, 96,  2, 1, True,  False, 4, 1, 0, "1.03 to 1.05 of 0/8; 112 keys spill"),
    ForwardRow(64,  64,  None, None,  ANY, 3, 96,  2, 1, True,  False, 2, 1, 0, "1.05 of 0/8"),
    ForwardRow(64,  64,  None, None,  ANY, 2, 128, 2, 1, True,  False, 2, 1, 0, "1.5 to 4.5 of a head a tile"),
    ForwardRow(128, 128, 1024, True,  0,   2, 128, 2, 2, True,  False, 2, 1, 0, "1.01 to 1.02 of the row below"),
    ForwardRow(128, 128, 2048, None,  2,   2, 128, 2, 2, False, False, 2, 1, 0, "0.96 to 1.07; clusters 0.99"),
    ForwardRow(128, 128, None, None,  2,   2, 128, 2, 2, False, False, 2, 2, 0, "1.00 to 1.12 of no clusters"),
    ForwardRow(128, 128, None, None,  ANY, 2, 128, 2, 2, True,  False, 0, 2, 8, "1.08 to 1.12 of no turns, 2/8"),
    ForwardRow(192, 128, None, None,  ANY, 2, 128, 1, 1, False, False, 2, 1, 0, "1.17 to 1.27 of cuDNN"),
    ForwardRow(192, 192, None, None,  1,   2, 112, 1, 0, False, False, 2, 1, 0, "1.09 to 1.18 of cuDNN"),
    ForwardRow(192, 192, None, None,  ANY, 2, 96,  1, 1, False, False, 2, 1, 0, "unmeasured: 112 keys spill"),
    ForwardRow(256, 256, None, True,  ANY, 2, 64,  1, 2, False, True,  1, 1, 0, "1.00 to 1.17"),
    ForwardRow(256, 256, 1024, None,  ANY, 2, 64,  1, 2, False, True,  1, 1, 0, "1.06 at 512; 80 keys: 0.96"),
    ForwardRow(256, 256, None, None,  ANY, 2, 80,  1, 0, True,  True,  2, 2, 0, "1.02 of no clusters, no turns"),
)
BACKWARD = (
    #           D    split  block_m split_groups_from
    BackwardRow(64,  False, 128, None, "0.95 to 1.26"),
    BackwardRow(64,  True,  128, None, "0.93 to 1.02 of cuDNN, for repeatable sums"),
    BackwardRow(128, False, 64,  4096, "0.97 to 1.56; split groups 1.02 to 1.09 of whole ones"),
    BackwardRow(128, True,  64,  None, "0.87 to 1.00 of cuDNN, for repeatable sums"),
    KeysRow(256, 64, "1.24 to 1.48 of cuDNN"),
)
QUERIES = (
    #          D    Dv extras consumers n stages of v
    QueriesRow(64,  64,  2, 2, 128, 2, "0.93 to 1.02 of cuDNN; 96 keys: 0.91 to 1.00"),
    QueriesRow(64,  64,  3, 2, 96,  2, "unmeasured: 128 keys spill"),
    QueriesRow(128, 128, 2, 2, 96,  2, "0.87 to 1.00 of cuDNN; 64 and 80 keys within 1 %"),
    QueriesRow(128, 128, 3, 2, 80,  2, "unmeasured: 96 keys spill"),
    QueriesRow(192, 192, 2, 2, 80,  2, "0.97 of cuDNN at 192/128, 8192 causal"),
    QueriesRow(192, 192, 3, 2, 64,  2, "unmeasured: 80 keys spill"),
    QueriesRow(256, 256, 2, 2, 64,  1, "1.24 to 1.48 of cuDNN; 48 keys, two stages: 1.22 to 1.43"),
    QueriesRow(256, 256, 3, 2, 48,  2, "unmeasured: 64 keys spill"),
)
# fmt: on


def packed_heads(group_size: int, seqlen_q: int, block_m: int) -> int:
    """Choose how many query heads of a group share a tile, so that fewer of its rows are padding.

    ``block_m`` is the block that a tile of one head would have.

    >>> packed_heads(8, 1, 128), packed_heads(6, 40, 128), packed_heads(8, 100, 128), packed_heads(8, 4096, 128)
    (8, 2, 1, 1)
    """

    def rows(heads: int) -> int:
        queries = PACKED_ROWS // heads
        return -(-seqlen_q // queries) * queries

    fewest = min((heads for heads in PACKED_HEADS if group_size % heads == 0), key=rows)
    alone = -(-seqlen_q // block_m) * block_m
    return fewest if rows(fewest) <= PACKING_PAYS * alone else 1


def forward_row(
    head_dim: int, head_dim_v: int, seqlen_q: int, *, causal: bool, extras: int, packed: bool = False
) -> ForwardRow:
    """Choose the first row that serves a problem; ``packed`` insists on tiles that several heads can share.

    >>> forward_row(64, 64, 8192, causal=True, extras=0).num_consumers
    3
    """
    head_dim, head_dim_v = rounded_head_dim(head_dim), rounded_head_dim(head_dim_v)
    return next(
        row
        for row in FORWARD
        if head_dim <= row.head_dim
        and head_dim_v <= row.head_dim_v
        and (row.longest is None or seqlen_q <= row.longest)
        and row.causal in (None, causal)
        and extras <= row.extras
        and (row.block_m == PACKED_ROWS or not packed)
    )


def backward_row(head_dim: int, head_dim_v: int, *, split: bool) -> BackwardRow | KeysRow:
    """Choose the first row that serves a problem; ``split`` insists on one that leaves dq to a kernel of its own.

    >>> backward_row(96, 64, split=False).head_dim
    128
    """
    return next(row for row in BACKWARD if max(head_dim, head_dim_v) <= row.head_dim and (row.split or not split))


def queries_row(head_dim: int, head_dim_v: int, *, extras: int) -> QueriesRow:
    """Choose the first row that serves a problem.

    >>> queries_row(192, 128, extras=0).block_n
    80
    """
    return next(
        row for row in QUERIES if head_dim <= row.head_dim and head_dim_v <= row.head_dim_v and extras <= row.extras
    )
