"""Backward pass on the CPU: recomputes the probabilities tile by tile from q, k and lse.

With ``P = exp(S - lse)`` and ``delta = rowsum(dout * out) - dlse``, the gradient of the scores is ``P * (dP - delta)``
and that of a sink is ``-sum(exp(sink - lse) * delta)``, a key whose dP is 0.
"""

from __future__ import annotations

import numpy as np

from cuflash.backends import Gradients
from cuflash.backends.numpy_tiles import BLOCK_N, HeadGroup, head_groups, load, rows_per_head, select, tiles
from cuflash.problem import Problem


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def backward(
    problem: Problem,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    block_m: int | None = None,
    block_n: int = BLOCK_N,
) -> Gradients:
    """Gradients of q, k, v and the sinks for the gradients ``dout`` and ``dlse`` of a forward's two results."""
    dtype = np.dtype(problem.accumulator)
    block_m = block_m or rows_per_head(problem)
    dq, dk, dv = (np.zeros(array.shape, array.dtype) for array in (q, k, v))
    dsinks = None if sinks is None else np.zeros(problem.num_heads, dtype)

    for group in head_groups(problem, alibi_slopes, seqused_q, seqused_k):
        rows = slice(0, group.band.seqlen_q)
        row_lse = lse[group.batch, group.heads, rows, None]  # (group, seqlen_q, 1)
        row_delta = _row_delta(group, dout, out, dlse, dtype)
        dq_acc = np.zeros((problem.group_size, group.band.seqlen_q, problem.head_dim), dtype)
        for keys in tiles(0, group.band.seqlen_k, block_n):
            dk_tile, dv_tile = _key_tile(group, keys, dout, q, k, v, row_lse, row_delta, dq_acc, block_m)
            dk[group.batch, keys, group.kv_head] = dk_tile
            dv[group.batch, keys, group.kv_head] = dv_tile
        dq[group.batch, rows, group.heads] = (dq_acc * dtype.type(problem.softmax_scale)).swapaxes(0, 1)
        if sinks is not None:
            p_sink = np.exp(sinks[group.heads, None, None].astype(dtype) - row_lse)  # (group, seqlen_q, 1)
            p_sink = select(row_lse != -np.inf, p_sink, 0)
            dsinks[group.heads] -= np.sum(p_sink * row_delta, axis=(1, 2))
    return Gradients(dq, dk, dv, dsinks)


def _row_delta(
    group: HeadGroup, dout: np.ndarray, out: np.ndarray, dlse: np.ndarray | None, dtype: np.dtype
) -> np.ndarray:
    """rowsum(dout * out) - dlse of every row; (group, seqlen_q, 1)."""
    rows = slice(0, group.band.seqlen_q)
    dout_rows = load(dout, group.batch, rows, group.heads, dtype)
    out_rows = load(out, group.batch, rows, group.heads, dtype)
    delta = np.einsum("hid,hid->hi", dout_rows, out_rows)[..., None]
    return delta if dlse is None else delta - dlse[group.batch, group.heads, rows, None]


def _key_tile(
    group: HeadGroup,
    keys: slice,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    row_lse: np.ndarray,
    row_delta: np.ndarray,
    dq_acc: np.ndarray,
    block_m: int,
) -> tuple[np.ndarray, np.ndarray]:
    """dk and dv of one key tile, (block_n, head_dim) and (block_n, head_dim_v); adds its part to ``dq_acc``."""
    problem, dtype = group.problem, dq_acc.dtype
    kv_indices = np.arange(keys.start, keys.stop)
    k_tile = load(k, group.batch, keys, group.kv_head, dtype)  # (block_n, head_dim)
    v_tile = load(v, group.batch, keys, group.kv_head, dtype)  # (block_n, head_dim_v)
    dk_tile, dv_tile = np.zeros_like(k_tile), np.zeros_like(v_tile)

    for rows in tiles(*group.band.query_range(keys.start, keys.stop), block_m):
        q_indices = np.arange(rows.start, rows.stop)
        q_tile = load(q, group.batch, rows, group.heads, dtype)  # (group, block_m, head_dim)
        q_tile *= dtype.type(problem.softmax_scale)
        dout_tile = load(dout, group.batch, rows, group.heads, dtype)  # (group, block_m, head_dim_v)
        visible = group.visible(q_indices, kv_indices)
        kept = group.kept(q_indices, kv_indices)

        scores = q_tile @ k_tile.T  # (group, block_m, block_n), as every value until dq
        p = np.exp(group.modified(scores, q_indices, kv_indices) - row_lse[:, rows])
        p = select(visible, p, 0)
        dp = select(kept, dout_tile @ v_tile.T, 0) * dtype.type(group.dropout_scale)
        ds = p * (dp - row_delta[:, rows]) * problem.modifiers.derivative(scores)
        ds = select(visible, ds, 0)

        dv_tile += _fold(select(kept, p, 0)).T @ _fold(dout_tile)
        dk_tile += _fold(ds).T @ _fold(q_tile)
        dq_acc[:, rows] += ds @ k_tile
    return dk_tile, dv_tile * dtype.type(group.dropout_scale)


def _fold(tile: np.ndarray) -> np.ndarray:
    """(group, block_m, n) -> (group * block_m, n): a product over the rows then also sums over the group."""
    return tile.reshape(-1, tile.shape[-1])
