"""Attention over keys in parts: combine what each part of the keys gave into what all of them give."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from cuflash.layouts import CANONICAL_AXES

Array = Any  # of NumPy, CuPy, PyTorch or JAX


def merge(
    outs: Sequence[Array], lses: Sequence[Array], *, sinks: Array | None = None, layout: str = "bshd"
) -> tuple[Array, Array]:
    """Merge attention outputs over disjoint sets of keys into the output over all of them.

    Each part weighs as much as its share of the softmax denominator, which its lse is the logarithm of.

    Parameters
    ----------
    outs : sequence of array
        Outputs of the parts, axes as ``layout`` says; arrays of one library on one device.
    lses : sequence of array
        Their lse, ``(batch, num_heads, seqlen_q)``. -inf marks rows that see no key of that part.
    sinks : array, optional
        ``(num_heads,)`` extra logits, added once: the parts themselves are computed without sinks.
    layout : {"bshd", "bhsd"}, optional
        Order of the axes batch, seqlen, heads and head_dim of ``outs``.

    Returns
    -------
    out, lse : array
        As attention over all keys returns them: a row without any key has out 0 and lse -inf, or its sink's logit.

    Examples
    --------
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 64, 2, 16)).astype(np.float32)
    >>> parts = [cuflash.attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (slice(40), slice(40, 64))]
    >>> out, lse = merge(*zip(*parts))
    >>> bool(np.allclose(out, cuflash.attention(q, k, v), atol=1e-6))
    True
    """
    outs, lses = list(outs), list(lses)
    _check(outs, lses, sinks, layout)
    xp = _namespace(outs + lses + ([] if sinks is None else [sinks]))

    logits = lses if sinks is None else [*lses, xp.zeros_like(lses[0]) + xp.astype(sinks, lses[0].dtype)[:, None]]
    logits = xp.stack(logits)  # (parts, batch, num_heads, seqlen_q), the sink being a part without an output
    largest = xp.max(logits, axis=0)
    shift = xp.where(largest == -xp.inf, xp.zeros_like(largest), largest)
    weights = xp.exp(logits - shift)
    total = xp.sum(weights, axis=0)
    is_empty = total == 0
    total = xp.where(is_empty, xp.ones_like(total), total)
    lse = xp.where(is_empty, largest, shift + xp.log(total))
    weights = weights / total

    out = 0
    for part, weight in zip(outs, weights, strict=False):
        weight = weight if layout == "bhsd" else xp.permute_dims(weight, (0, 2, 1))
        out = out + xp.astype(part, lse.dtype) * weight[..., None]
    return xp.astype(out, outs[0].dtype), lse


def _check(outs: list[Array], lses: list[Array], sinks: Array | None, layout: str) -> None:
    if layout not in CANONICAL_AXES:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(map(repr, CANONICAL_AXES))}")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts and lses {len(lses)}; they must have the same number, at least 1")
    shape = tuple(outs[0].shape)
    if len(shape) != 4:
        raise ValueError(f"outs[0] has shape {shape}; it must have four axes")
    batch, seqlen_q, num_heads, _ = (shape[axis] for axis in CANONICAL_AXES[layout])
    expected = {"outs": shape, "lses": (batch, num_heads, seqlen_q)}
    for name, parts in (("outs", outs), ("lses", lses)):
        for index, part in enumerate(parts):
            if tuple(part.shape) != expected[name]:
                raise ValueError(f"{name}[{index}] has shape {tuple(part.shape)}; it must be {expected[name]}")
    if sinks is not None and tuple(sinks.shape) != (num_heads,):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}; it must be (num_heads,) = ({num_heads},)")


def _namespace(arrays: list[Array]) -> ModuleType:
    """The array API of the arrays' library; NumPy's own namespace is one."""
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np
    import array_api_compat

    return array_api_compat.array_namespace(*arrays)
