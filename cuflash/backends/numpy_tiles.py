"""What the two passes of the NumPy backend share: who works on what, and the scores of one tile.

The unit of work is a head group: the query heads that share one key/value head of one sequence. A tile of it is
``(group, block_m, block_n)``, so one matrix product serves all query heads of a GQA group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuflash.dropout import keep_mask
from cuflash.masks import Band
from cuflash.problem import Problem

# Rows of a tile (all heads of the group together) and its keys: its float32 scores stay inside a level-2 cache.
ROWS_PER_TILE = 256
BLOCK_N = 256


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """The query heads of one key/value head of one sequence, and the terms of their scores."""

    problem: Problem
    batch: int
    kv_head: int
    heads: slice  # query heads, (group,)
    band: Band  # the mask at this sequence's used lengths
    slopes: np.ndarray | None  # (group, 1, 1)

    def modified(self, scores: np.ndarray, q_indices: np.ndarray, kv_indices: np.ndarray) -> np.ndarray:
        """Softcap and ALiBi on a tile of scaled scores (group, block_m, block_n)."""
        modifiers = self.problem.modifiers
        distance = self.band.distance(q_indices, kv_indices) if modifiers.alibi else None
        return modifiers.apply(scores, self.slopes, distance)

    def visible(self, q_indices: np.ndarray, kv_indices: np.ndarray) -> np.ndarray | None:
        """Visible pairs of a tile (block_m, block_n), or None where it needs no masking."""
        if self.band.covers(q_indices[0], q_indices[-1] + 1, kv_indices[0], kv_indices[-1] + 1):
            return None
        return self.band.visible(q_indices, kv_indices)

    def kept(self, q_indices: np.ndarray, kv_indices: np.ndarray) -> np.ndarray | None:
        """Probabilities of a tile that dropout keeps (group, block_m, block_n), or None without dropout."""
        dropout = self.problem.dropout
        if dropout is None:
            return None
        heads = range(self.heads.start, self.heads.stop)
        return np.stack([keep_mask(dropout, self.batch, head, q_indices, kv_indices) for head in heads])

    @property
    def dropout_scale(self) -> float:
        return 1.0 if self.problem.dropout is None else self.problem.dropout.scale


def head_groups(problem: Problem, alibi_slopes, seqused_q, seqused_k) -> Iterator[HeadGroup]:
    """Every head group of a problem: the CTAs of the NumPy backend, one after the other."""
    for batch in range(problem.layout.batch):
        band = problem.mask.band(*problem.layout.lengths(batch, seqused_q, seqused_k))
        for kv_head in range(problem.num_kv_heads):
            heads = slice(kv_head * problem.group_size, (kv_head + 1) * problem.group_size)
            slopes = None
            if alibi_slopes is not None:
                of_sequence = alibi_slopes[batch] if problem.modifiers.alibi_per_batch else alibi_slopes
                slopes = np.asarray(of_sequence[heads], problem.accumulator)[:, None, None]
            yield HeadGroup(problem, batch, kv_head, heads, band, slopes)


def load(array: np.ndarray, batch: int, rows: slice, heads: slice | int, dtype: np.dtype) -> np.ndarray:
    """Contiguous copy of a tile in the accumulator's dtype: (heads, rows, head_dim), or (rows, head_dim) of one head.

    This is the backend's load to shared memory: strided or low-precision operands are slow in a matrix product.
    """
    tile = array[batch, rows, heads]
    if tile.ndim == 3:
        tile = tile.swapaxes(0, 1)
    return tile.astype(dtype, order="C")


def select(condition: np.ndarray | None, values: np.ndarray, otherwise: float) -> np.ndarray:
    """``values`` where the condition holds (None: everywhere); elsewhere they leave no trace, not even as NaN."""
    return values if condition is None else np.where(condition, values, values.dtype.type(otherwise))


def tiles(start: int, end: int, block: int) -> Iterator[slice]:
    """Consecutive tiles of ``block`` rows or keys; the last one is cut at the end."""
    for first in range(start, end, block):
        yield slice(first, min(first + block, end))


def rows_per_head(problem: Problem) -> int:
    """``block_m`` for tiles of ROWS_PER_TILE rows in all heads of a group together."""
    return max(ROWS_PER_TILE // problem.group_size, 16)
