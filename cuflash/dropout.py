"""Which probabilities are dropped: a Philox counter on global positions, the same on every backend.

The layout is public and fixed. One Philox-4x32 call with 7 rounds serves eight scores of head ``h`` in batch ``b``:
queries ``{i, i + 8}`` by keys ``{j, j + 1, j + 8, j + 9}`` inside a 16 x 16 patch, the set that one thread of a
tensor-core tile holds. For score (b, h, i, j)::

    key     = (seed & 0xffffffff, seed >> 32)
    counter = ((i // 16) * 8 + i % 8,  (j // 16) * 4 + (j % 8) // 2,  h | b << 16,  offset)
    word    = 2 * (j % 2) + (j // 8) % 2          # which of the four 32-bit outputs
    half    = (i // 8) % 2                        # 0: low 16 bits, 1: high 16 bits
    keep    = bits >= threshold,  threshold = min(round(dropout_p * 65536), 65535)

Kept probabilities are scaled by ``65536 / (65536 - threshold)``, the inverse of the realised keep probability.
Philox: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); 7 rounds is the
smallest number for which the paper reports that Philox-4x32 passes BigCrush.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np

RANDOM_RANGE = 1 << 16  # bits per score
PHILOX_ROUNDS = 7

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of probability ``p`` with a 64-bit ``seed`` and a 32-bit ``offset``."""

    p: float
    seed: int
    offset: int = 0

    @property
    def threshold(self) -> int:
        return min(round(self.p * RANDOM_RANGE), RANDOM_RANGE - 1)

    @property
    def scale(self) -> float:
        return RANDOM_RANGE / (RANDOM_RANGE - self.threshold)


def philox_4x32(counter: tuple, key: tuple[int, int], rounds: int = PHILOX_ROUNDS) -> tuple[np.ndarray, ...]:
    """Four random 32-bit words for every counter; the four counter words broadcast against each other.

    >>> [f"{int(word):08x}" for word in philox_4x32((0, 0, 0, 0), key=(0, 0), rounds=10)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint32) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        product0 = c0.astype(np.uint64) * _MULTIPLIERS[0]  # 32 x 32 -> 64 bits
        product1 = c2.astype(np.uint64) * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high(product1) ^ c1 ^ np.uint32(k0),
            product1.astype(np.uint32),
            _high(product0) ^ c3 ^ np.uint32(k1),
            product0.astype(np.uint32),
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _high(product: np.ndarray) -> np.ndarray:
    return (product >> np.uint64(32)).astype(np.uint32)


def keep_mask(dropout: Dropout, batch: int, head: int, q_indices: np.ndarray, kv_indices: np.ndarray) -> np.ndarray:
    """Whether each probability of a tile is kept; bool, (len(q_indices), len(kv_indices)).

    The indices are positions in the whole sequence, in any order, so the answer does not depend on the tiling.
    """
    i, j = np.asarray(q_indices), np.asarray(kv_indices)
    # Eight scores share a counter: draw each distinct pair of row and column words once, then spread the words.
    row_words, row = np.unique((i // 16) * 8 + i % 8, return_inverse=True)
    column_words, column = np.unique((j // 16) * 4 + (j % 8) // 2, return_inverse=True)
    counter = row_words[:, None], column_words, head | batch << 16, dropout.offset
    words = np.stack(philox_4x32(counter, (dropout.seed & _WORD, dropout.seed >> 32)))  # (4, row_words, column_words)
    word = 2 * (j % 2) + (j // 8) % 2
    shift = (16 * (i // 8 % 2)).astype(np.uint32)
    bits = words[word, row[:, None], column] >> shift[:, None] & np.uint32(RANDOM_RANGE - 1)
    return bits >= dropout.threshold


def dropout_mask(shape: tuple[int, int, int, int], dropout_p: float, seed: int, offset: int = 0) -> np.ndarray:
    """The mask that attention with the same ``dropout_p``, ``seed`` and ``offset`` multiplies its probabilities by.

    Parameters
    ----------
    shape : tuple of int
        ``(batch, num_heads, seqlen_q, seqlen_k)``.
    dropout_p : float
        Probability of dropping, ``0 <= dropout_p < 1``; realised as a multiple of 1 / 65536.
    seed : int
        64-bit seed.
    offset : int, optional
        32-bit position in the stream of masks of this seed, such as the number of the training step.

    Returns
    -------
    mask : ndarray of bool
        True where a probability is kept. The mask of a larger shape starts with the mask of a smaller one.

    Examples
    --------
    >>> mask = dropout_mask((1, 2, 256, 256), dropout_p=0.25, seed=42)
    >>> mask.shape, float(mask.mean().round(2))
    ((1, 2, 256, 256), 0.75)
    >>> bool((mask[:, :, :10, :20] == dropout_mask((1, 2, 10, 20), dropout_p=0.25, seed=42)).all())
    True
    """
    batch, num_heads, seqlen_q, seqlen_k = _checked_shape(shape)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p!r}; it must lie in [0, 1)")
    dropout = Dropout(dropout_p, _checked_word("seed", seed, 64), _checked_word("offset", offset, 32))
    mask = np.empty((batch, num_heads, seqlen_q, seqlen_k), bool)
    q_indices, kv_indices = np.arange(seqlen_q), np.arange(seqlen_k)
    for b, h in np.ndindex(batch, num_heads):
        mask[b, h] = keep_mask(dropout, b, h, q_indices, kv_indices)
    return mask


def _checked_shape(shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape is {shape!r}; it must be four whole numbers") from None
    if len(sizes) != 4 or min(sizes) < 0:
        raise ValueError(f"shape is {shape}; it must be (batch, num_heads, seqlen_q, seqlen_k), none negative")
    if max(sizes[:2]) >= 1 << 16:
        raise ValueError(f"shape is {shape}; dropout needs batch and num_heads below {1 << 16}")
    return sizes


def _checked_word(name: str, value: int, bits: int) -> int:
    try:
        word = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number") from None
    if not 0 <= word < 1 << bits:
        raise ValueError(f"{name} is {word}; it must lie in [0, 2**{bits})")
    return word
