"""Forward pass on the CPU: online softmax over tiles of keys, memory linear in the sequence length."""

from __future__ import annotations

import numpy as np

from cuflash.backends.numpy_tiles import BLOCK_N, HeadGroup, head_groups, load, rows_per_head, select, tiles
from cuflash.problem import Problem


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def forward(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    out: np.ndarray | None = None,
    block_m: int | None = None,
    block_n: int = BLOCK_N,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention output (batch, seqlen_q, num_heads, head_dim_v) and lse (batch, num_heads, seqlen_q).

    ``out`` may be ``q``: every row tile is read before it is written. lse has the accumulator's dtype.
    """
    dtype = np.dtype(problem.accumulator)
    block_m = block_m or rows_per_head(problem)
    if out is None:
        out = np.empty(problem.out_shape, q.dtype)
    lse = np.full(problem.lse_shape, -np.inf, dtype)

    for group in head_groups(problem, alibi_slopes, seqused_q, seqused_k):
        sink = None if sinks is None else sinks[group.heads].astype(dtype)[:, None, None]  # (group, 1, 1)
        out[group.batch, group.band.seqlen_q :, group.heads] = 0
        for rows in tiles(0, group.band.seqlen_q, block_m):
            q_tile = load(q, group.batch, rows, group.heads, dtype)
            out_tile, lse_tile = _attend(group, rows, q_tile, k, v, sink, block_n)
            out[group.batch, rows, group.heads] = out_tile.swapaxes(0, 1)
            lse[group.batch, group.heads, rows] = lse_tile
    return out, lse


def _attend(
    group: HeadGroup,
    rows: slice,
    q_tile: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sink: np.ndarray | None,
    block_n: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One row tile against all its visible keys: out (group, block_m, head_dim_v) and lse (group, block_m)."""
    dtype = q_tile.dtype
    q_tile = q_tile * dtype.type(group.problem.softmax_scale)
    q_indices = np.arange(rows.start, rows.stop)
    acc = np.zeros((*q_tile.shape[:2], group.problem.head_dim_v), dtype)  # (group, block_m, head_dim_v)
    row_max = np.full((*q_tile.shape[:2], 1), -np.inf, dtype)
    row_sum = np.zeros_like(row_max)
    if sink is not None:  # a key without a value, seen by every row
        row_max[:] = sink
        row_sum[:] = 1

    for keys in tiles(*group.band.key_range(rows.start, rows.stop), block_n):
        kv_indices = np.arange(keys.start, keys.stop)
        k_tile = load(k, group.batch, keys, group.kv_head, dtype)  # (block_n, head_dim)
        v_tile = load(v, group.batch, keys, group.kv_head, dtype)  # (block_n, head_dim_v)

        s = group.modified(q_tile @ k_tile.T, q_indices, kv_indices)  # (group, block_m, block_n)
        s = select(group.visible(q_indices, kv_indices), s, -np.inf)

        new_max = np.maximum(row_max, s.max(axis=-1, keepdims=True))
        shift = np.where(new_max == -np.inf, dtype.type(0), new_max)  # a row that has seen no key yet: exp(-inf) is 0
        rescale = np.exp(row_max - shift)
        p = np.exp(np.subtract(s, shift, out=s), out=s)
        row_max = new_max
        row_sum = row_sum * rescale + p.sum(axis=-1, keepdims=True)
        acc = acc * rescale + select(group.kept(q_indices, kv_indices), p, 0) @ v_tile

    empty = row_sum == 0
    out_tile = acc * (group.dropout_scale / np.where(empty, 1, row_sum)).astype(dtype)
    lse_tile = np.where(empty, -np.inf, row_max + np.log(row_sum))
    return out_tile, lse_tile[..., 0]
