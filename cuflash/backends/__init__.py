"""Where a problem is solved: ``numpy_backend`` on the CPU, ``cuda_backend`` on a GPU.

Both take canonical (batch, seqlen, heads, head_dim) operands of any strides and return the same values: rows past
the used lengths have out 0 and lse -inf, and their gradients, like those of absent keys, are 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Gradients(NamedTuple):
    """Gradients of an attention call; ``dsinks`` is None without sinks."""

    dq: Any
    dk: Any
    dv: Any
    dsinks: Any = None
