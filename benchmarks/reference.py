"""The correctness gate: a provider's outputs against float64 on a sample of heads, before any of its time counts.

The reference walks over blocks of query rows, so that it fits in memory at every length; on the same device and from
the same arrays as what it checks. The bound is the one that the tests use (``cuflash.testing``): twice the error of
the dense formula in the problem's own precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.workloads import DROPOUT_SEED, Cell
from cuflash.dropout import Dropout, keep_mask

ROWS = 2048  # query rows of a block
GATE_PAIRS = 1 << 29  # (query, key) pairs that a gate looks at before it looks at fewer heads
DRAWN_PAIRS = 1 << 26  # the same where a dropout mask is drawn, which the host does: seconds at long lengths
MAX_FACTOR, MEAN_FACTOR, TINY_FACTOR = 2.0, 1.5, 8.0  # semantics.md, "Accuracy"


@dataclass(frozen=True, slots=True)
class Precision:
    """How exactly a formula is evaluated: the type that accumulates and the rounding of what is stored."""

    accumulator: type
    round: Callable

    @classmethod
    def exact(cls) -> Precision:
        return cls(np.float64, lambda x: x)

    @classmethod
    def low(cls, dtype) -> Precision:
        accumulator = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        return cls(accumulator, lambda x: x.astype(dtype).astype(accumulator))


def namespace(array):
    """NumPy or CuPy, whichever the array belongs to."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy


def head_reference(cell: Cell, arrays: dict, batch: int, kv_head: int, precision: Precision, backward: bool) -> dict:
    """Outputs of one key/value head and its group of query heads: out, and dq, dk, dv where asked.

    ``arrays`` holds canonical q, k, v, dout, and alibi_slopes or sinks where the cell has them.
    """
    xp = namespace(arrays["q"])
    group = cell.num_heads // cell.num_kv_heads
    wide = precision.accumulator
    k, v = (arrays[name][batch, :, kv_head].astype(wide) for name in ("k", "v"))  # (seqlen_k, head_dim)
    found: dict[str, list] = {"out": [], "dq": []}
    dk, dv = xp.zeros_like(k), xp.zeros_like(v)
    for head in range(kv_head * group, (kv_head + 1) * group):
        outs, dqs = [], []
        for start in range(0, cell.seqlen_q, ROWS):
            rows = slice(start, min(start + ROWS, cell.seqlen_q))
            q = arrays["q"][batch, rows, head].astype(wide)
            scores, slope = _scores(xp, cell, arrays, q, k, head, rows, wide)
            probs = _softmax(xp, arrays, scores, head)
            dropped = _dropout_scale(xp, cell, batch, head, rows, wide) if cell.dropout_p else 1
            kept = precision.round(probs) * dropped
            out = kept @ v
            outs.append(precision.round(out))
            if backward:
                dout = arrays["dout"][batch, rows, head].astype(wide)
                dprobs = dropped * (dout @ v.T)
                delta = (dout * outs[-1]).sum(axis=-1, keepdims=True)
                dscores = precision.round(probs * (dprobs - delta) * slope)
                dqs.append(precision.round(dscores @ k * wide(cell.softmax_scale)))
                dv += kept.T @ dout
                dk += dscores.T @ q * wide(cell.softmax_scale)
        found["out"].append(xp.concatenate(outs))
        if backward:
            found["dq"].append(xp.concatenate(dqs))
    results = {"out": xp.stack(found["out"], axis=1)}  # (seqlen_q, group, head_dim_v)
    if backward:
        results |= {"dq": xp.stack(found["dq"], axis=1), "dk": precision.round(dk), "dv": precision.round(dv)}
    return results


def _scores(xp, cell: Cell, arrays: dict, q, k, head: int, rows: slice, wide):
    """Masked scores of a block of rows, and their slope with respect to scale * q.k (1 without a softcap)."""
    scores = q @ k.T * wide(cell.softmax_scale)
    slope = 1
    if cell.softcap:
        capped = xp.tanh(scores / wide(cell.softcap))
        scores, slope = capped * wide(cell.softcap), 1 - capped * capped
    # Column of the diagonal in each row: bottom-right aligned.
    diagonal = xp.arange(rows.start, rows.stop)[:, None] + (cell.seqlen_k - cell.seqlen_q)
    distance = diagonal - xp.arange(cell.seqlen_k)[None, :]
    if "alibi_slopes" in arrays:
        scores = scores - arrays["alibi_slopes"][head].astype(wide) * abs(distance)
    if cell.causal:
        scores = xp.where(distance >= 0, scores, -np.inf)
    if cell.window_left is not None:
        scores = xp.where(distance <= cell.window_left, scores, -np.inf)
    return scores, slope


def _softmax(xp, arrays: dict, scores, head: int):
    row_max = scores.max(axis=-1, keepdims=True)
    if "sinks" in arrays:
        row_max = xp.maximum(row_max, arrays["sinks"][head])
    row_max = xp.where(xp.isneginf(row_max), 0, row_max)  # a row without visible keys
    probs = xp.exp(scores - row_max)
    row_sum = probs.sum(axis=-1, keepdims=True)
    if "sinks" in arrays:
        row_sum = row_sum + xp.exp(arrays["sinks"][head].astype(scores.dtype) - row_max)
    return xp.where(row_sum > 0, probs / xp.where(row_sum > 0, row_sum, 1), 0)


def _dropout_scale(xp, cell: Cell, batch: int, head: int, rows: slice, wide):
    """keep / realised keep probability for a block of rows."""
    keep = _keep_mask(cell.dropout_p, batch, head, cell.seqlen_q, cell.seqlen_k)[rows]
    return xp.asarray(keep).astype(wide) * wide(Dropout(cell.dropout_p, DROPOUT_SEED).scale)


@functools.lru_cache(maxsize=8)
def _keep_mask(dropout_p: float, batch: int, head: int, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    return keep_mask(Dropout(dropout_p, DROPOUT_SEED), batch, head, np.arange(seqlen_q), np.arange(seqlen_k))


def sampled_heads(cell: Cell, count: int) -> list[tuple[int, int]]:
    """At most ``count`` (batch, kv_head) pairs to check: the first, the last, and others spread evenly between them.

    Fewer where heads are long, so that the gate takes less time than what it guards.
    """
    total = cell.batch * cell.num_kv_heads
    pairs = cell.num_heads // cell.num_kv_heads * cell.seqlen_q * cell.seqlen_k
    affordable = max(1, DRAWN_PAIRS // pairs) if cell.dropout_p else max(2, GATE_PAIRS // pairs)
    picks = np.unique(np.linspace(0, total - 1, min(count, affordable, total)).round().astype(int))
    return [divmod(int(pick), cell.num_kv_heads) for pick in picks]


class Gate:
    """References of a cell, computed once and used for every provider."""

    def __init__(self, cell: Cell, arrays: dict, heads: int = 4, backward: bool = True):
        self._cell = cell
        self._group = cell.num_heads // cell.num_kv_heads
        low = Precision.low(arrays["q"].dtype)
        self._references = {}
        for batch, kv_head in sampled_heads(cell, heads):
            exact = head_reference(cell, arrays, batch, kv_head, Precision.exact(), backward)
            rounded = head_reference(cell, arrays, batch, kv_head, low, backward)
            tiny = TINY_FACTOR * np.finfo(low.accumulator).eps * cell.seqlen_k**0.5
            bounds = {name: _bounds(exact[name], rounded[name], tiny) for name in exact}
            self._references[batch, kv_head] = exact, bounds

    def error_ratio(self, results: dict) -> float:
        """Largest error over its bound among ``results`` (canonical arrays by name); inf where one is not finite."""
        worst = 0.0
        for name, array in results.items():
            if not bool(namespace(array).isfinite(array).all()):
                return float("inf")
            for (batch, kv_head), (exact, bounds) in self._references.items():
                heads = kv_head if name in ("dk", "dv") else self._query_heads(kv_head)
                error = abs(array[batch, :, heads].astype(np.float64) - exact[name])
                max_bound, mean_bound = bounds[name]
                worst = max(worst, float(error.max()) / max_bound, float(error.mean()) / mean_bound)
        return worst

    def _query_heads(self, kv_head: int) -> slice:
        return slice(kv_head * self._group, (kv_head + 1) * self._group)


def _bounds(exact, rounded, tiny: float) -> tuple[float, float]:
    """Largest allowed maximum and mean error of one output."""
    error = abs(rounded.astype(np.float64) - exact)
    tiny = tiny * (1 + float(abs(exact).max()))
    return MAX_FACTOR * float(error.max()) + tiny, MEAN_FACTOR * float(error.mean()) + tiny
