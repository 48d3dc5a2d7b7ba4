from __future__ import annotations

import math

import numpy as np
import pytest

from cuflash.modifiers import Modifiers

SCORES = np.random.default_rng(0).normal(scale=20, size=(2, 5, 7))
DISTANCE = np.arange(7) - np.arange(5)[:, None]
SLOPES = np.array([0.5, 0.25])[:, None, None]
ALL = [Modifiers(), Modifiers(softcap=15.0), Modifiers(alibi=True), Modifiers(softcap=15.0, alibi=True)]


def test_softcap_then_alibi():
    modified = Modifiers(softcap=15.0, alibi=True).apply(SCORES, SLOPES, DISTANCE)
    for h, i, j in np.ndindex(SCORES.shape):
        capped = 15.0 * math.tanh(SCORES[h, i, j] / 15.0)
        assert modified[h, i, j] == pytest.approx(capped - SLOPES[h, 0, 0] * abs(i - j), rel=1e-14)


def test_no_modifiers_leave_scores_alone():
    np.testing.assert_array_equal(Modifiers().apply(SCORES), SCORES)


@pytest.mark.parametrize("modifiers", ALL, ids=str)
def test_derivative_is_that_of_apply(modifiers):
    step = 1e-5
    above, below = (modifiers.apply(SCORES + shift, SLOPES, DISTANCE) for shift in (step, -step))
    slope = np.broadcast_to(modifiers.derivative(SCORES), SCORES.shape)
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("modifiers", ALL, ids=str)
def test_scores_are_not_written_and_keep_their_dtype(modifiers):
    scores = SCORES.astype(np.float32)
    scores.flags.writeable = False
    assert modifiers.apply(scores, SLOPES.astype(np.float32), DISTANCE).dtype == np.float32
    assert np.asarray(scores * modifiers.derivative(scores)).dtype == np.float32


def test_softcap_saturates_without_overflow():
    scores = np.array([-1e30, 1e30], np.float32)
    np.testing.assert_array_equal(Modifiers(softcap=30.0).apply(scores), [-30, 30])
    np.testing.assert_array_equal(Modifiers(softcap=30.0).derivative(scores), [0, 0])
