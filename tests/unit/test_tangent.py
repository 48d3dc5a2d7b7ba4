"""The hyperbolic tangent of the softcap (kernels_cu/tile/modifier.cuh), in float32 arithmetic as the kernels do it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

SOURCE = (Path(__file__).parents[2] / "kernels_cu/tile/modifier.cuh").read_text()
ALLOWED = 2e-6  # absolute: a score capped at 50 errs by 1e-4


def constant(name: str) -> np.float32:
    return np.float32(re.search(rf"\b{name} = (-?[0-9.e-]+)f", SOURCE)[1])


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once, but for rare double rounding."""
    return (np.float64(a) * b + c).astype(np.float32)


def polynomial(scores: np.ndarray, scale: np.float32) -> np.ndarray:
    coefficients = [constant(f"c{power}") * scale ** np.float32(power) for power in (1, 3, 5, 7)]
    square, sum_ = scores * scores, coefficients[3]
    for coefficient in coefficients[2::-1]:
        sum_ = fused(sum_, square, coefficient)
    return scores * sum_


def exponential(scores: np.ndarray, scale: np.float32) -> np.ndarray:
    with np.errstate(over="ignore"):
        power = np.exp2(scores * (scale * np.float32(2 / np.log(2))))
    return fused(np.float32(-2), 1 / (1 + power), np.float32(1))


def error(tangents: np.ndarray, scores: np.ndarray, scale: np.float32) -> float:
    assert tangents.dtype == np.float32
    return np.abs(tangents - np.tanh(np.float64(scores) * scale)).max()


def test_polynomial_of_scores_well_below_the_cap():
    near_zero = constant("kNearZero")
    for scale in np.float32([constant("kFlat"), 0.125 / 50, -0.3, 1, constant("kSteep")]):
        scores = np.linspace(-near_zero, near_zero, 200_001, dtype=np.float32) / scale
        assert error(polynomial(scores, scale), scores, scale) < ALLOWED
    scores = np.float32([near_zero * 1.05])
    assert error(polynomial(scores, np.float32(1)), scores, np.float32(1)) > ALLOWED, "the range could be wider"


def test_exponential_of_all_scores():
    scores = np.concatenate([np.linspace(-20, 20, 200_001), [-np.inf, -1e30, 1e30, np.inf]]).astype(np.float32)
    assert error(exponential(scores, np.float32(1)), scores, np.float32(1)) < 3e-7
