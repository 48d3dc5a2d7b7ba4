"""Attention, its gradients, and partial results: the functions that users call."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cuflash import dispatch
from cuflash.arrays import Array, common_adapter
from cuflash.backends import cuda_backend, numpy_tiles
from cuflash.device import DeviceInfo
from cuflash.plan import Plan
from cuflash.planner import plan_passes
from cuflash.problem import DTYPES, ITEMSIZE, Problem, check_backend_dtype


class Gradients(NamedTuple):
    """Gradients of an attention call; those of operands that it does not have are None."""

    dq: Array
    dk: Array
    dv: Array
    dsinks: Array | None = None
    dbias: Array | None = None
    captured: dict | None = None


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool | str = False,
    window_size: tuple[int | None, int | None] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    block_mask: object | None = None,
    bias: Array | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    layout: str = "bshd",
    out: Array | None = None,
    copy: bool | None = None,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """Softmax attention ``softmax(scale * q @ k.T) @ v`` in memory linear in the sequence lengths.

    Parameters
    ----------
    q : array
        Queries ``(batch, seqlen_q, num_heads, head_dim)``: NumPy, CuPy, PyTorch, JAX or any array with
        ``__dlpack__``. float16 or bfloat16; on the CPU also float32 and float64. head_dim is at most 256.
    k : array
        Keys ``(batch, seqlen_k, num_kv_heads, head_dim)``. ``num_kv_heads`` divides ``num_heads``: query head h
        reads key/value head ``h // (num_heads // num_kv_heads)``.
    v : array
        Values ``(batch, seqlen_k, num_kv_heads, head_dim_v)``.
    causal : bool or "top_left", optional
        Query i sees keys ``j <= i + seqlen_k - seqlen_q`` (the last query sees every key), or ``j <= i`` for
        "top_left".
    window_size : pair of int or None, optional
        Keys ``(left, right)`` of the diagonal that a query sees, both inclusive; None or -1 is unlimited.
    softmax_scale : float, optional
        Multiplies ``q @ k.T``; ``head_dim ** -0.5`` by default.
    softcap : float, optional
        Replaces scores s by ``softcap * tanh(s / softcap)``; 0 is off.
    alibi_slopes : array, optional
        float32, ``(num_heads,)`` or ``(batch, num_heads)``: adds ``-slope * abs(i + seqlen_k - seqlen_q - j)``.
    sinks : array, optional
        float32, ``(num_heads,)``: one more logit in each row's denominator, without a value.
    score_mod, mask_mod, block_mask, bias : optional
        Not supported yet.
    dropout_p : float, optional
        Probability of dropping a softmax weight, in [0, 1). See `cuflash.dropout_mask`.
    seed : int, optional
        64-bit seed of the dropout; drawn from NumPy's global generator by default, so that ``np.random.seed``
        governs it.
    offset : int, optional
        32-bit position in the seed's stream of dropout masks, such as a training step.
    seqused_q, seqused_k : array, optional
        int32, ``(batch,)``: rows and keys past these lengths are absent (key padding); ``out`` is 0 there.
    deterministic : bool, optional
        Make the backward repeatable bit by bit; the forward always is.
    return_lse : bool, optional
        Also return the logarithm of each row's denominator.
    layout : {"bshd", "bhsd"}, optional
        Order of the axes of q, k, v and out: (batch, seqlen, heads, head_dim), or heads before seqlen.
    out : array, optional
        Where to write the result; ``out=q`` works in place.
    copy : bool, optional
        None copies an operand whose last axis is not contiguous; False refuses it.
    backend : {None, "numpy", "cuda", "sm80", "sm90"}, optional
        None chooses by where the arrays are: "numpy" on the CPU, "cuda" on a GPU. "sm80" insists on the portable
        kernels, which run everything; "sm90" insists on those for Hopper (H100, H200) and raises NotImplementedError
        where they cannot run the call. "cuda" chooses between the two, and `explain` says which and why.

    Returns
    -------
    out : array
        ``(batch, seqlen_q, num_heads, head_dim_v)``, or as ``layout`` says; q's kind, dtype and device. A row that
        sees no key is 0.
    lse : array
        Only with ``return_lse``: ``(batch, num_heads, seqlen_q)``, natural logarithm, float32 (float64 for float64
        operands); -inf where a row sees no key.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 100, 8, 64)).astype(np.float16)
    >>> cuflash.attention(q, k, v, causal=True).shape
    (1, 100, 8, 64)

    Grouped queries, a sliding window of 32 keys, and the row statistics:

    >>> out, lse = cuflash.attention(q, k[:, :, :2], v[:, :, :2], window_size=(31, 0), return_lse=True)
    >>> lse.shape, lse.dtype
    ((1, 8, 100), dtype('float32'))
    """
    call = dispatch.request(
        q, k, v, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask,
        bias, dropout_p, seed, offset, seqused_q, seqused_k, deterministic, return_lse, layout, out, copy, backend,
    )  # fmt: skip
    if _lacks_seed(dropout_p, seed):
        call = call._replace(seed=_draw_seed())
    adapter = common_adapter(call.operands)
    adapter.refuse_autograd(call.operands)
    out, lse = dispatch.forward(adapter, call, want_lse=return_lse)
    return (out, lse) if return_lse else out


def vjp(q: Array, k: Array, v: Array, **keywords) -> tuple[Array | tuple[Array, Array], Callable[..., Gradients]]:
    """Attention and the function that takes gradients of its result back to its operands.

    Parameters
    ----------
    q, k, v, **keywords
        As in `attention`, except that ``out`` must not be q, which the gradients still need.

    Returns
    -------
    out : array or pair of arrays
        What `attention` returns.
    pullback : callable
        ``pullback(dout, dlse=None)`` returns `Gradients`. It keeps q, k, v, out and lse alive, nothing of size
        seqlen_q * seqlen_k, and may be called again. The operands must not change before.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 100, 8, 64)).astype(np.float32)
    >>> out, pullback = cuflash.vjp(q, k, v, causal=True, dropout_p=0.1, seed=7)
    >>> gradients = pullback(np.ones_like(out))
    >>> gradients.dq.shape, gradients.dsinks
    ((1, 100, 8, 64), None)
    """
    if _lacks_seed(keywords.get("dropout_p", 0.0), keywords.get("seed")):
        keywords["seed"] = _draw_seed()
    call = dispatch.request(q, k, v, **keywords)
    out, lse = dispatch.forward(common_adapter(call.operands), call, want_lse=True, keeps_q=True)
    keywords.pop("out", None)

    def pullback(dout: Array, dlse: Array | None = None) -> Gradients:
        return attention_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)

    return ((out, lse) if call.return_lse else out), pullback


def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, *, dlse: Array | None = None, **keywords
) -> Gradients:
    """Gradients of an attention call from its operands and results; `vjp` remembers those for you.

    Parameters
    ----------
    dout : array
        Gradient of ``out``, with any strides.
    q, k, v : array
        Operands of the forward.
    out, lse : array
        Results of the forward, with ``return_lse=True``.
    dlse : array, optional
        Gradient of ``lse``.
    **keywords
        Those of the forward, as in `attention`. With dropout the forward's ``seed`` is needed.

    Returns
    -------
    gradients : Gradients
        ``dq, dk, dv, dsinks, dbias, captured``, the last three None where the call has no such operand.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 1, 64, 2, 32)).astype(np.float32)
    >>> out, lse = cuflash.attention(q, k, v, return_lse=True)
    >>> cuflash.attention_backward(dout, q, k, v, out, lse).dv.shape
    (1, 64, 2, 32)
    """
    call = dispatch.request(q, k, v, **keywords)
    call.operands.update(out=out, lse=lse, dout=dout)
    if dlse is not None:
        call.operands["dlse"] = dlse
    return Gradients(**dispatch.backward(common_adapter(call.operands), call))


class Support(NamedTuple):
    """Whether one feature runs on one backend: for these dtypes, none where it does not exist yet."""

    feature: str
    keyword: str
    backend: str
    dtypes: tuple[str, ...]


FEATURES = {  # by keyword of `attention`; the two without one are facts about q, k and v
    "q, k, v": "grouped and multi-query heads, head_dim 1 to 256, head_dim_v unlike head_dim",
    "strides": "strided and transposed operands, without a copy",
    "causal": "causal masks, bottom-right or top-left aligned",
    "window_size": "sliding windows",
    "softmax_scale": "scale of the scores",
    "softcap": "capped scores",
    "alibi_slopes": "ALiBi, per head or per batch and head",
    "sinks": "attention sinks, with gradients",
    "dropout_p": "dropout, the same mask on every backend",
    "seqused_q": "key padding: used lengths of q",
    "seqused_k": "key padding: used lengths of k and v",
    "deterministic": "gradients repeatable bit by bit",
    "return_lse": "lse, with gradients",
    "layout": "axes as bshd or bhsd",
    "out": "results in a given array, or in place of q",
}
UNLANDED = {  # the nearest choices are in problem.py
    "score_mod": "score functions of the user",
    "mask_mod": "mask functions of the user",
    "block_mask": "block-sparse masks",
    "bias": "additive bias",
}


def supports(
    keyword: str | None = None, *, backend: str | None = None, dtype: str | None = None
) -> tuple[Support, ...]:
    """Rows of the table of features, backends and dtypes, forward and backward; all rows by default.

    Parameters
    ----------
    keyword, backend, dtype : str, optional
        Keep the rows of this keyword of `attention`, on this backend, that run with this dtype.

    Examples
    --------
    >>> import cuflash
    >>> cuflash.supports("sinks", backend="cuda")[0].dtypes
    ('float16', 'bfloat16')
    >>> bool(cuflash.supports("bias", backend="cuda", dtype="float16"))
    False
    """
    table = FEATURES | UNLANDED
    by_backend = {"numpy": DTYPES, "cuda": cuda_backend.DTYPES}
    for name, value, known in (("keyword", keyword, table), ("backend", backend, by_backend), ("dtype", dtype, DTYPES)):
        if value is not None and value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}")
    rows = (
        Support(feature, name, of_backend, dtypes if name in FEATURES else ())
        for name, feature in table.items()
        for of_backend, dtypes in by_backend.items()
    )
    return tuple(
        row
        for row in rows
        if keyword in (None, row.keyword) and backend in (None, row.backend) and (dtype is None or dtype in row.dtypes)
    )


def backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run; "sm90" on a Hopper GPU with a compiler that knows it.

    >>> import cuflash
    >>> "numpy" in cuflash.backends()
    True
    """
    try:
        device = DeviceInfo.current(0)
    except RuntimeError:  # no CuPy, no driver, no device, or one older than Ampere
        return ("numpy",)
    return ("numpy", "cuda", "sm80", "sm90") if device.has_wgmma else ("numpy", "cuda", "sm80")


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """What a call would run; ``print`` it, or read ``problem`` and ``plans`` (empty on the CPU)."""

    problem: Problem
    plans: tuple[Plan, ...]
    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def explain(q: Array, k: Array, v: Array, *, device: str | None = None, **keywords) -> Explanation:
    """Say what a call would run: backend, tiles, thread blocks, memory. Nothing is computed or compiled.

    Parameters
    ----------
    q, k, v, **keywords
        As in `attention`.
    device : str, optional
        Plan for a named GPU, such as "sm_90a", whatever this machine has. Arrays on a GPU are planned for theirs.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = np.zeros((2, 1000, 8, 128), np.float16)
    >>> cuflash.explain(q, q, q, causal=True)
    numpy backend, float16, softmax in float32
      forward and backward: tiles of 256 rows and 256 keys, one head group at a time
      memory: out 4.1 MB, lse 0.1 MB, dq, dk and dv 12.3 MB, nothing of size seqlen_q x seqlen_k
    >>> forward, backward = cuflash.explain(q, q, q, causal=True, device="sm_90a").plans
    >>> forward.main_entry, forward.steps[0].grid
    ('forward_sm90', 128)

    A Hopper GPU runs the portable kernels where its own cannot run the call:

    >>> narrow = np.zeros((2, 1000, 8, 60), np.float16)
    >>> forward, backward = cuflash.explain(narrow, narrow, narrow, device="sm_90a").plans
    >>> forward.main_entry, backward.note
    ('forward_sm80', "portable kernels: q's address or strides are not multiples of 16 bytes")
    """
    prepared = _prepared(q, k, v, keywords)
    problem = prepared.problem
    if device is not None:
        check_backend_dtype(problem.dtype, "cuda", cuda_backend.DTYPES)
        plans = plan_passes(problem, DeviceInfo.named(device))
        return Explanation(problem, plans, "\n".join(plan.explain() for plan in plans))
    if prepared.backend == "numpy":
        return Explanation(problem, (), _explain_host(problem))
    plans = plan_passes(problem, DeviceInfo.current(prepared.device_index))
    return Explanation(problem, plans, cuda_backend.explain(problem, prepared.device_index))


def warmup(q: Array, k: Array, v: Array, **keywords) -> None:
    """Compile and load the kernels of a call and of its backward, before a timed run or the capture of a CUDA graph.

    A captured backward writes to its workspace at every replay, though the memory is given back when the call returns.
    Nothing else may get it: with CuPy arrays, capture under ``cupy.cuda.using_allocator(pool.malloc)``, where ``pool``
    is a ``cupy.cuda.MemoryPool`` that serves nothing else and is kept as long as the graph. PyTorch's graphs keep a
    pool of their own.

    Parameters
    ----------
    q, k, v, **keywords
        As in `attention`. Nothing is computed, and on the CPU nothing has to be done.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = np.zeros((2, 100, 8, 64), np.float16)
    >>> cuflash.warmup(q, q, q, causal=True)
    """
    prepared = _prepared(q, k, v, keywords)
    if prepared.backend != "numpy":
        cuda_backend.warmup(prepared.problem, prepared.device_index)


def _prepared(q: Array, k: Array, v: Array, keywords: dict) -> dispatch.Prepared:
    call = dispatch.request(q, k, v, **keywords)
    _, _, prepared = dispatch.prepare(common_adapter(call.operands), call.operands, call.options)
    return prepared


def _explain_host(problem: Problem) -> str:
    def megabytes(*shapes: tuple[int, ...], itemsize: int) -> str:
        return f"{sum(map(math.prod, shapes)) * itemsize / 1e6:.1f} MB"

    itemsize = ITEMSIZE[problem.dtype]
    rows, keys = numpy_tiles.rows_per_head(problem), numpy_tiles.BLOCK_N
    lines = (
        f"numpy backend, {problem.dtype}, softmax in {problem.accumulator}",
        f"  forward and backward: tiles of {rows * problem.group_size} rows and {keys} keys, one head group at a time",
        f"  memory: out {megabytes(problem.out_shape, itemsize=itemsize)},"
        f" lse {megabytes(problem.lse_shape, itemsize=ITEMSIZE[problem.accumulator])},"
        f" dq, dk and dv {megabytes(problem.q.shape, problem.k.shape, problem.v.shape, itemsize=itemsize)},"
        " nothing of size seqlen_q x seqlen_k",
    )
    return "\n".join(lines)


def _lacks_seed(dropout_p: float, seed: int | None) -> bool:
    # A float is not asked whether it is a Real: an abstract class takes a while to answer.
    return seed is None and (type(dropout_p) is float or isinstance(dropout_p, numbers.Real)) and dropout_p > 0


def _draw_seed() -> int:
    return int(np.random.randint(0, 2**63 - 1, dtype=np.int64))
