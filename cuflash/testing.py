"""Is this attention right? A dense float64 oracle and the error that a dtype excuses.

Every comparison in the tests, the benchmarks and ``python -m cuflash`` goes through `check`, which knows no tolerance:
a result may be off by twice what the dense formula itself is off when it rounds where a kernel has to round.

>>> from cuflash.backends import numpy_backend
>>> from cuflash.problem import Problem, View
>>> problem = Problem.build({name: View.of((1, 33, 2, 16), "float32") for name in "qkv"}, causal=True)
>>> arrays = random_arrays(problem, seed=0)
>>> out, lse = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v)
>>> check({"out": out, "lse": lse}, problem, arrays).ok
True
>>> check({"out": out * 1.001}, problem, arrays).ok
False
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from cuflash.dropout import keep_mask
from cuflash.problem import Problem

MAX_FACTOR = 2.0  # of the low-precision formula's largest error
MEAN_FACTOR = 1.5  # of its mean error


@dataclass(slots=True)
class Arrays:
    """The operands of a problem as NumPy arrays, the first four in canonical (batch, seqlen, heads, head_dim) order."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray | None = None
    dlse: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None
    seqused_q: np.ndarray | None = None
    seqused_k: np.ndarray | None = None

    @property
    def features(self) -> dict[str, np.ndarray | None]:
        """The optional keywords that forward and backward share."""
        names = ("alibi_slopes", "sinks", "seqused_q", "seqused_k")
        return {name: getattr(self, name) for name in names}


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of a problem's dtype; NumPy itself has no bfloat16."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def random_arrays(problem: Problem, seed: int, *, dlse: bool = False) -> Arrays:
    """Contiguous operands of a problem: standard normal, with the slopes of the ALiBi paper and random used lengths.

    Parameters
    ----------
    problem : Problem
        What the operands are for; only the optional operands that it names are made.
    seed : int
        Of the random numbers.
    dlse : bool, optional
        Make a gradient of lse too.
    """
    rng = np.random.default_rng(seed)
    layout, dtype = problem.layout, numpy_dtype(problem.dtype)

    def normal(shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    arrays = Arrays(*(normal(shape, dtype) for shape in (problem.q.shape, problem.k.shape, problem.v.shape)))
    arrays.dout = normal(problem.out_shape, dtype)
    if dlse:
        arrays.dlse = normal(problem.lse_shape, problem.accumulator)
    if problem.modifiers.alibi:
        slopes = 2.0 ** (-8 * np.arange(1, problem.num_heads + 1) / problem.num_heads)
        if problem.modifiers.alibi_per_batch:
            slopes = slopes / np.arange(1, layout.batch + 1)[:, None]
        arrays.alibi_slopes = slopes.astype(np.float32)
    if problem.sinks:
        arrays.sinks = normal((problem.num_heads,), np.float32)
    if layout.used_q:
        arrays.seqused_q = rng.integers(layout.seqlen_q + 1, size=layout.batch, dtype=np.int32)
    if layout.used_k:
        arrays.seqused_k = rng.integers(layout.seqlen_k + 1, size=layout.batch, dtype=np.int32)
    return arrays


def oracle_forward(
    problem: Problem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    dtype: np.dtype | type = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """out (batch, seqlen_q, num_heads, head_dim_v), lse (batch, num_heads, seqlen_q) of the dense formula."""
    arrays = Arrays(q, k, v, None, None, alibi_slopes, sinks, seqused_q, seqused_k)
    outputs = _dense(problem, arrays, np.dtype(dtype), _exactly)
    return outputs["out"], outputs["lse"]


def oracle_backward(
    problem: Problem,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    seqused_q: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    dtype: np.dtype | type = np.float64,
) -> dict[str, np.ndarray | None]:
    """Gradients ``dq``, ``dk``, ``dv`` and ``dsinks`` (None without sinks) of the dense formula."""
    arrays = Arrays(q, k, v, dout, dlse, alibi_slopes, sinks, seqused_q, seqused_k)
    return _gradients(_dense(problem, arrays, np.dtype(dtype), _exactly))


def low_precision_forward(problem: Problem, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The dense formula that rounds P and out to the problem's dtype and accumulates as a kernel does."""
    outputs = _dense(problem, replace(arrays, dout=None), *_low_precision(problem))
    return outputs["out"], outputs["lse"]


def low_precision_backward(problem: Problem, arrays: Arrays) -> dict[str, np.ndarray | None]:
    """The dense gradients that round P, dS, out and results to the problem's dtype and accumulate as a kernel does."""
    return _gradients(_dense(problem, arrays, *_low_precision(problem)))


@dataclass(frozen=True, slots=True)
class Bound:
    """The oracle's value of one output and the errors allowed around it."""

    exact: np.ndarray
    max: float
    mean: float


def error_bound(problem: Problem, arrays: Arrays) -> dict[str, Bound]:
    """What every output should be and how far off it may be; without ``arrays.dout`` of the forward's outputs only.

    For each output: ``max|x - x_64| <= 2 * max|x_low - x_64| + tiny`` and
    ``mean|x - x_64| <= 1.5 * mean|x_low - x_64| + tiny``, where x_64 is the oracle, x_low the low-precision formula and
    ``tiny = 8 * eps(accumulator) * (1 + max|x_64|) * sqrt(seqlen_k)``. The error of dsinks, one number per head, is
    that of its rows, added as independent errors.
    """
    exact = _dense(problem, arrays, np.dtype(np.float64), _exactly)
    low = _dense(problem, arrays, *_low_precision(problem))
    errors = {name: _errors(low[name], exact[name]) for name in exact.keys() - {"dsinks_rows"}}
    if "dsinks" in errors:
        # Errors of thousands of rows may cancel in one formula and not in another: their scatter does not.
        scatter = np.sqrt(np.sum((low["dsinks_rows"] - exact["dsinks_rows"]) ** 2, axis=(0, 2)))
        errors["dsinks"] = float(scatter.max()), float(scatter.mean())

    unit = 8 * np.finfo(problem.accumulator).eps * np.sqrt(max(problem.layout.seqlen_k, 1))
    bounds = {}
    for name, (max_error, mean_error) in errors.items():
        largest = np.abs(exact[name][np.isfinite(exact[name])]).max(initial=0)
        tiny = float(unit * (1 + largest))
        bounds[name] = Bound(exact[name], MAX_FACTOR * max_error + tiny, MEAN_FACTOR * mean_error + tiny)
    return bounds


@dataclass(frozen=True, slots=True)
class OutputError:
    """Error of one output as shares of what is allowed: at most 1 is right."""

    max_error: float
    max_ratio: float
    mean_error: float
    mean_ratio: float

    @property
    def ok(self) -> bool:
        return self.max_ratio <= 1 and self.mean_ratio <= 1


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """Errors of a result by output; ``print`` shows one line for each."""

    outputs: dict[str, OutputError]

    @property
    def ok(self) -> bool:
        return all(error.ok for error in self.outputs.values())

    def __str__(self) -> str:
        return "\n".join(
            f"{name:>6}: max error {error.max_error:.2e}, {error.max_ratio:5.2f} of the bound;"
            f" mean error {error.mean_error:.2e}, {error.mean_ratio:5.2f} of the bound"
            f"{'' if error.ok else '  <-- wrong'}"
            for name, error in self.outputs.items()
        )


def check(
    actual: Mapping[str, np.ndarray | None], problem: Problem, arrays: Arrays, bounds: Mapping[str, Bound] | None = None
) -> ErrorReport:
    """Compare results with the oracle, every element of them.

    Parameters
    ----------
    actual : mapping of str to array
        Any of ``out``, ``lse``, ``dq``, ``dk``, ``dv``, ``dsinks``, canonical axes, on the host.
    problem, arrays
        What was computed.
    bounds : mapping, optional
        An earlier `error_bound` of the same problem and arrays, when several results are checked against it.

    Returns
    -------
    report : ErrorReport
        ``report.ok`` is the verdict; NaN, and an infinity that the oracle does not have, are infinitely wrong.
    """
    given = {name: np.asarray(value) for name, value in actual.items() if value is not None}
    if bounds is None:
        forward_only = given.keys() <= {"out", "lse"}
        bounds = error_bound(problem, replace(arrays, dout=None) if forward_only else arrays)
    outputs = {}
    for name, value in given.items():
        bound = bounds[name]
        if value.shape != bound.exact.shape:
            raise ValueError(f"{name} has shape {value.shape}; it must be {bound.exact.shape}")
        max_error, mean_error = _errors(value, bound.exact)
        outputs[name] = OutputError(max_error, _ratio(max_error, bound.max), mean_error, _ratio(mean_error, bound.mean))
    return ErrorReport(outputs)


def _errors(actual: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Largest and mean absolute error; equal infinities have none, any other non-finite pair an infinite one."""
    actual = actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.where(actual == exact, 0.0, np.abs(actual - exact))
    error = np.where(np.isnan(error), np.inf, error)
    return float(error.max(initial=0)), float(error.mean()) if error.size else 0.0


def _ratio(error: float, bound: float) -> float:
    return 0.0 if error == 0 else float(np.divide(error, bound)) if bound else np.inf


Rounding = Callable[[np.ndarray], np.ndarray]


def _exactly(values: np.ndarray) -> np.ndarray:
    return values


def _low_precision(problem: Problem) -> tuple[np.dtype, Rounding]:
    """The accumulator, and how a kernel rounds what it stores or feeds to a tensor core."""
    accumulator, dtype = np.dtype(problem.accumulator), numpy_dtype(problem.dtype)
    return accumulator, lambda values: values.astype(dtype).astype(accumulator)


@dataclass(slots=True)
class _Head:
    """One query head of one sequence, cut to its used lengths: the dense formula and its intermediate matrices."""

    q: np.ndarray  # (seqlen_q, head_dim)
    k: np.ndarray  # (seqlen_k, head_dim)
    v: np.ndarray  # (seqlen_k, head_dim_v)
    scores: np.ndarray  # softmax_scale * q.k; (seqlen_q, seqlen_k), as the next three
    visible: np.ndarray
    dropped: np.ndarray  # factor of dropout: 0 or 1 / keep probability
    p: np.ndarray  # probabilities before dropout
    p_sink: np.ndarray  # probability of the sink, 0 without; (seqlen_q,)
    out: np.ndarray  # (seqlen_q, head_dim_v)
    lse: np.ndarray  # (seqlen_q,)


def _dense_head(problem: Problem, arrays: Arrays, batch: int, head: int, dtype: np.dtype, rounded: Rounding) -> _Head:
    seqlen_q, seqlen_k = problem.layout.lengths(batch, arrays.seqused_q, arrays.seqused_k)
    kv_head = head // problem.group_size
    q = arrays.q[batch, :seqlen_q, head].astype(dtype)
    k = arrays.k[batch, :seqlen_k, kv_head].astype(dtype)
    v = arrays.v[batch, :seqlen_k, kv_head].astype(dtype)
    i, j = np.arange(seqlen_q), np.arange(seqlen_k)

    band = problem.mask.band(seqlen_q, seqlen_k)
    visible = band.visible(i, j)
    slope = None
    if arrays.alibi_slopes is not None:
        slopes = np.broadcast_to(arrays.alibi_slopes, (problem.layout.batch, problem.num_heads))
        slope = slopes[batch, head].astype(dtype)
    scores = q @ k.T * dtype.type(problem.softmax_scale)
    s = np.where(visible, problem.modifiers.apply(scores, slope, band.distance(i, j)), -np.inf)

    sink = -np.inf if arrays.sinks is None else float(arrays.sinks[head])
    row_max = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    shift = np.where(np.isneginf(row_max), 0, row_max).astype(dtype)
    p = np.exp(s - shift[:, None])
    p_sink = np.exp(dtype.type(sink) - shift)
    row_sum = p.sum(axis=1) + p_sink
    normaliser = np.where(row_sum == 0, 1, row_sum)
    p /= normaliser[:, None]
    p_sink /= normaliser
    with np.errstate(divide="ignore"):
        lse = shift + np.log(row_sum)

    dropped = np.ones_like(p)
    if problem.dropout is not None:
        dropped = keep_mask(problem.dropout, batch, head, i, j) * dtype.type(problem.dropout.scale)
    out = rounded((rounded(p) * dropped) @ v)
    return _Head(q, k, v, scores, visible, dropped, p, p_sink, out, lse)


def _dense(problem: Problem, arrays: Arrays, dtype: np.dtype, rounded: Rounding) -> dict[str, np.ndarray]:
    """All outputs by name, gradients only with ``arrays.dout``; ``dsinks_rows`` is what each row adds to dsinks."""
    with_gradients = arrays.dout is not None
    outputs = {"out": np.zeros(problem.out_shape, dtype), "lse": np.full(problem.lse_shape, -np.inf, dtype)}
    if with_gradients:
        specs = {"dq": problem.q, "dk": problem.k, "dv": problem.v}
        outputs |= {name: np.zeros(spec.shape, dtype) for name, spec in specs.items()}
        if problem.sinks:
            outputs["dsinks_rows"] = np.zeros(problem.lse_shape, dtype)
    for batch, head in np.ndindex(problem.layout.batch, problem.num_heads):
        dense = _dense_head(problem, arrays, batch, head, dtype, rounded)
        outputs["out"][batch, : len(dense.q), head] = dense.out
        outputs["lse"][batch, head, : len(dense.q)] = dense.lse
        if with_gradients:
            _add_gradients(outputs, problem, arrays, dense, batch, head, rounded)
    for name in outputs.keys() & {"dq", "dk", "dv"}:
        outputs[name] = rounded(outputs[name])
    if "dsinks_rows" in outputs:
        outputs["dsinks"] = outputs["dsinks_rows"].sum(axis=(0, 2))
    return outputs


def _add_gradients(
    outputs: dict[str, np.ndarray],
    problem: Problem,
    arrays: Arrays,
    dense: _Head,
    batch: int,
    head: int,
    rounded: Rounding,
) -> None:
    dtype = dense.q.dtype
    rows, keys, kv_head = slice(len(dense.q)), slice(len(dense.k)), head // problem.group_size
    dout = arrays.dout[batch, rows, head].astype(dtype)
    delta = np.sum(dout * dense.out, axis=1)
    if arrays.dlse is not None:
        delta -= arrays.dlse[batch, head, rows].astype(dtype)

    dp = dense.dropped * (dout @ dense.v.T)
    ds = dense.p * (dp - delta[:, None]) * problem.modifiers.derivative(dense.scores)
    ds = rounded(np.where(dense.visible, ds, 0)) * dtype.type(problem.softmax_scale)
    outputs["dq"][batch, rows, head] = ds @ dense.k
    outputs["dk"][batch, keys, kv_head] += ds.T @ dense.q
    outputs["dv"][batch, keys, kv_head] += (rounded(dense.p) * dense.dropped).T @ dout
    if problem.sinks:
        outputs["dsinks_rows"][batch, head, rows] = rounded(dense.p_sink * -delta)  # dS of a key whose dP is 0


def _gradients(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    return {name: outputs.get(name) for name in ("dq", "dk", "dv", "dsinks")}
