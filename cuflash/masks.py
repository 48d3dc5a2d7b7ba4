"""Which keys a query sees: causal masks and sliding windows, and the alignment of the diagonal.

Both are one band around the diagonal: key ``j`` is visible to query ``i`` iff
``i + offset - left <= j <= i + offset + right``. ``offset`` is defined here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Mask:
    """A band of visible keys around the (aligned) diagonal.

    Attributes
    ----------
    left, right : int or None
        Keys visible to the left and right of the diagonal, the diagonal itself always included; None is unlimited.
    top_left : bool
        Align the diagonal to the first query and first key (offset 0) instead of the last of both.
    """

    left: int | None = None
    right: int | None = None
    top_left: bool = False

    @classmethod
    def resolve(cls, causal: bool | str = False, window_size: tuple[int | None, int | None] | None = None) -> Mask:
        """Combine the public keywords ``causal`` and ``window_size`` (values already checked by problem.py).

        >>> Mask.resolve(causal=True, window_size=(128, 128))
        Mask(left=128, right=0, top_left=False)
        """
        left, right = (None if side is None or side == -1 else int(side) for side in window_size or (None, None))
        if causal:
            right = 0
        return cls(left, right, top_left=causal == "top_left")

    def offset(self, seqlen_q: int, seqlen_k: int) -> int:
        """Column of the diagonal in row 0; every use of causal, window and ALiBi shares it."""
        return 0 if self.top_left else seqlen_k - seqlen_q

    def band(self, seqlen_q: int, seqlen_k: int) -> Band:
        """The mask laid on a matrix of ``seqlen_q`` by ``seqlen_k`` scores (used lengths, where the call has them)."""
        unlimited = seqlen_q + seqlen_k
        return Band(
            seqlen_q,
            seqlen_k,
            self.offset(seqlen_q, seqlen_k),
            left=unlimited if self.left is None else self.left,
            right=unlimited if self.right is None else self.right,
        )


@dataclass(frozen=True, slots=True)
class Band:
    """A mask on a score matrix of known size: every side finite, every answer exact.

    Row and key ranges are half open. Tiles are never empty.

    >>> band = Mask.resolve(causal=True).band(seqlen_q=3, seqlen_k=5)
    >>> band.visible(np.arange(3), np.arange(5)).astype(int)
    array([[1, 1, 1, 0, 0],
           [1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1]])
    >>> band.key_range(0, 2), band.query_range(3, 5), band.num_pairs()
    ((0, 4), (1, 3), 12)
    """

    seqlen_q: int
    seqlen_k: int
    offset: int
    left: int
    right: int

    def distance(self, q_indices: np.ndarray, kv_indices: np.ndarray) -> np.ndarray:
        """Columns from the diagonal to each key, negative to its left; (len(q_indices), len(kv_indices))."""
        return kv_indices - (q_indices[:, None] + self.offset)

    def visible(self, q_indices: np.ndarray, kv_indices: np.ndarray) -> np.ndarray:
        """Whether each query sees each key; bool, (len(q_indices), len(kv_indices))."""
        distance = self.distance(q_indices, kv_indices)
        return (-self.left <= distance) & (distance <= self.right)

    def key_range(self, row_start: int, row_end: int) -> tuple[int, int]:
        """The keys that any of the rows sees, the only ones whose tiles the forward visits."""
        start = row_start + self.offset - self.left
        end = row_end + self.offset + self.right
        return _clip_range(start, end, self.seqlen_k)

    def query_range(self, key_start: int, key_end: int) -> tuple[int, int]:
        """The rows that see any of the keys, the only ones whose tiles the backward visits."""
        start = key_start - self.offset - self.right
        end = key_end - self.offset + self.left
        return _clip_range(start, end, self.seqlen_q)

    def most_queries(self, num_keys: int) -> int:
        """The most rows that see any of ``num_keys`` adjacent keys, wherever these are; at least as many as do.

        >>> Mask.resolve(window_size=(3, 0)).band(100, 100).most_queries(8)
        11
        """
        return max(0, min(self.seqlen_q, self.left + self.right + num_keys))

    def covers(self, row_start: int, row_end: int, key_start: int, key_end: int) -> bool:
        """Whether every row of the tile sees every key of it: such a tile needs no masking."""
        last_row_sees_first_key = row_end - 1 + self.offset - self.left <= key_start
        first_row_sees_last_key = key_end - 1 <= row_start + self.offset + self.right
        return last_row_sees_first_key and first_row_sees_last_key

    def num_pairs(self) -> int:
        """Visible (query, key) pairs: what a count of floating-point operations multiplies."""
        diagonal = np.arange(self.seqlen_q, dtype=np.int64) + self.offset
        start = np.maximum(diagonal - self.left, 0)
        end = np.minimum(diagonal + self.right + 1, self.seqlen_k)
        return int(np.maximum(end - start, 0).sum())


def _clip_range(start: int, end: int, length: int) -> tuple[int, int]:
    start = min(max(start, 0), length)
    return start, min(max(end, start), length)
