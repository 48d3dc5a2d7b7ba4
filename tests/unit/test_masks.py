"""Masks against the sentence that defines them, one pair of query and key at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.masks import Band, Mask

LENGTHS = [(1, 1), (1, 7), (7, 1), (5, 5), (4, 9), (9, 4), (0, 3), (3, 0), (0, 0)]
MASKS = [
    Mask.resolve(causal, window)
    for causal, window in itertools.product(
        (False, True, "top_left"), (None, (0, 0), (2, 1), (-1, 1), (3, None), (100, 100))
    )
]


def visible_by_definition(mask: Mask, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    offset = 0 if mask.top_left else seqlen_k - seqlen_q
    visible = np.zeros((seqlen_q, seqlen_k), bool)
    for i, j in np.ndindex(visible.shape):
        reaches_left = mask.left is None or j >= i + offset - mask.left
        reaches_right = mask.right is None or j <= i + offset + mask.right
        visible[i, j] = reaches_left and reaches_right
    return visible


@st.composite
def bands(draw) -> tuple[Band, np.ndarray]:
    side = st.none() | st.integers(0, 12)
    mask = Mask(draw(side), draw(side), draw(st.booleans()))
    lengths = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return mask.band(*lengths), visible_by_definition(mask, *lengths)


@st.composite
def tiles(draw, length: int) -> tuple[int, int]:
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", LENGTHS)
def test_visible_pairs_are_those_of_the_definition(mask, seqlen_q, seqlen_k):
    expected = visible_by_definition(mask, seqlen_q, seqlen_k)
    band = mask.band(seqlen_q, seqlen_k)
    np.testing.assert_array_equal(band.visible(np.arange(seqlen_q), np.arange(seqlen_k)), expected)
    assert band.num_pairs() == expected.sum()


@given(st.data())
def test_key_and_query_ranges_are_tight(data):
    band, visible = data.draw(bands())
    row_start, row_end = data.draw(tiles(band.seqlen_q))
    key_start, key_end = data.draw(tiles(band.seqlen_k))
    seen_keys = np.flatnonzero(visible[row_start:row_end].any(axis=0))
    seeing_rows = np.flatnonzero(visible[:, key_start:key_end].any(axis=1))
    assert list(range(*band.key_range(row_start, row_end))) == seen_keys.tolist()
    assert list(range(*band.query_range(key_start, key_end))) == seeing_rows.tolist()
    assert len(seeing_rows) <= band.most_queries(key_end - key_start) <= band.seqlen_q


@given(st.data())
def test_a_covered_tile_needs_no_mask(data):
    band, visible = data.draw(bands())
    rows, keys = data.draw(tiles(band.seqlen_q)), data.draw(tiles(band.seqlen_k))
    assert band.covers(*rows, *keys) == visible[slice(*rows), slice(*keys)].all()


@pytest.mark.parametrize(
    "causal, window_size, expected",
    [
        (False, None, Mask()),
        (True, None, Mask(right=0)),
        ("top_left", None, Mask(right=0, top_left=True)),
        (False, (-1, 5), Mask(right=5)),
        (False, (None, -1), Mask()),
        (True, (7, 9), Mask(left=7, right=0)),
    ],
)
def test_resolve(causal, window_size, expected):
    assert Mask.resolve(causal, window_size) == expected


def test_the_diagonal_ends_at_the_last_query_and_the_last_key():
    causal = Mask(right=0)
    assert causal.band(3, 1000).visible(np.array([2]), np.array([999])).all()
    assert causal.offset(3, 1000) == 997
    assert causal.offset(1000, 3) == -997
    assert Mask(right=0, top_left=True).offset(3, 1000) == 0


def test_num_pairs_of_lengths_whose_product_needs_64_bits():
    assert Mask().band(1 << 20, 1 << 20).num_pairs() == 1 << 40
    assert Mask(right=0).band(1 << 20, 1 << 20).num_pairs() == (1 << 39) + (1 << 19)
