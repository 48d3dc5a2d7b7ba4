"""Where the rows of q and of k/v are: dense batches now, variable-length and paged layouts later."""

from __future__ import annotations

from dataclasses import dataclass

# Position of (batch, seqlen, heads, head_dim) in the axes of a caller's array, by name of its layout.
CANONICAL_AXES = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}


@dataclass(frozen=True, slots=True)
class Dense:
    """Every sequence of the batch has the same allocated lengths.

    ``used_q`` and ``used_k`` say whether the call brings per-sequence used lengths (``seqused_q`` and
    ``seqused_k``, key padding): rows past them are absent and alignment uses the used lengths.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    used_q: bool = False
    used_k: bool = False

    def lengths(self, batch: int, seqused_q=None, seqused_k=None) -> tuple[int, int]:
        """Rows and keys of one sequence that take part: the used lengths where the call brings them.

        >>> Dense(batch=2, seqlen_q=100, seqlen_k=100, used_k=True).lengths(1, seqused_k=[100, 37])
        (100, 37)
        """
        seqlen_q = self.seqlen_q if seqused_q is None else int(seqused_q[batch])
        seqlen_k = self.seqlen_k if seqused_k is None else int(seqused_k[batch])
        return seqlen_q, seqlen_k


def to_canonical(values: tuple, layout: str) -> tuple:
    """Reorder shape, strides or axes of a caller's array to (batch, seqlen, heads, head_dim).

    >>> to_canonical((2, 8, 100, 64), "bhsd")
    (2, 100, 8, 64)
    """
    return tuple(values[axis] for axis in CANONICAL_AXES[layout])
