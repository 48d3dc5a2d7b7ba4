from __future__ import annotations

import numpy as np
import pytest

from cuflash.layouts import CANONICAL_AXES, Dense, to_canonical


@pytest.mark.parametrize("layout", CANONICAL_AXES)
def test_to_canonical_names_the_axes_of_an_array(layout):
    sizes = {"b": 2, "s": 100, "h": 8, "d": 64}
    assert to_canonical(tuple(sizes[axis] for axis in layout), layout) == (2, 100, 8, 64)


@pytest.mark.parametrize("layout", CANONICAL_AXES)
def test_to_canonical_is_its_own_inverse(layout):
    assert to_canonical(to_canonical(("a", "b", "c", "d"), layout), layout) == ("a", "b", "c", "d")


def test_lengths_are_the_used_ones_where_given():
    layout = Dense(batch=2, seqlen_q=10, seqlen_k=20, used_q=True, used_k=True)
    used_q, used_k = np.array([3, 0], np.int32), np.array([20, 7], np.int32)
    assert layout.lengths(0) == (10, 20)
    assert layout.lengths(0, used_q, used_k) == (3, 20)
    assert layout.lengths(1, used_q) == (0, 20)
    assert layout.lengths(1, seqused_k=used_k) == (10, 7)
