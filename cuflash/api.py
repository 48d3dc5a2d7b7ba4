"""Attention, its gradients, and partial results: the functions that users call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cuflash import dispatch
from cuflash.arrays import Array, common_adapter


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
        None chooses by where the arrays are.

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
        q, k, v, causal, window_size, softmax_scale, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask, bias,
        dropout_p, seed, offset, seqused_q, seqused_k, deterministic, return_lse, layout, out, copy, backend,
    )  # fmt: skip
    _refuse_autograd(call)
    if dropout_p and seed is None:
        call = call._replace(seed=_draw_seed())
    out, lse = dispatch.forward(call, want_lse=return_lse)
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
    if keywords.get("dropout_p") and keywords.get("seed") is None:
        keywords["seed"] = _draw_seed()
    call = dispatch.request(q, k, v, **keywords)
    _check_keeps_q(call)
    out, lse = dispatch.forward(call, want_lse=True)
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
    return Gradients(**dispatch.backward(call))


def _draw_seed() -> int:
    return int(np.random.randint(0, 2**63 - 1, dtype=np.int64))


def _refuse_autograd(call: dispatch.Request) -> None:
    """Lose no gradient silently: results of `attention` are unknown to the arrays' own differentiation."""
    adapter = common_adapter(call.operands)
    for name, array in call.operands.items():
        if adapter.tracks_gradient(array):
            raise NotImplementedError(f"{name} requires grad, which attention does not record; use cuflash.vjp")


def _check_keeps_q(call: dispatch.Request) -> None:
    if call.operands.get("out") is call.operands["q"]:
        raise ValueError("out is q; vjp still needs q for its gradients, so out must be another array")
