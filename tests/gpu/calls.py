"""Shared by the GPU tests: operands of a case on the device, and forward and backward of them."""

from __future__ import annotations

import cupy
from cases import Case
from gpu.device_memory import DeviceCopy

import cuflash
from cuflash.testing import Arrays

OPERANDS = ("q", "k", "v")
FEATURES = ("alibi_slopes", "sinks", "seqused_q", "seqused_k")
GRADIENTS = ("dq", "dk", "dv", "dsinks")


def device_copies(arrays: Arrays) -> dict[str, DeviceCopy]:
    names = (*OPERANDS, "dout", "dlse", *FEATURES)
    given = {name: getattr(arrays, name) for name in names}
    return {name: DeviceCopy(array) for name, array in given.items() if array is not None}


def both_passes(operands: dict, **keywords) -> dict:
    """out, lse and gradients by name, from canonical CuPy operands by name."""
    q, k, v = (operands[name] for name in OPERANDS)
    keywords |= {name: operands[name] for name in FEATURES if name in operands}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **keywords)
    gradients = cuflash.attention_backward(
        operands["dout"], q, k, v, out, lse, dlse=operands.get("dlse"), **keywords
    )  # fmt: skip
    found = {"out": out, "lse": lse, **{name: getattr(gradients, name) for name in GRADIENTS}}
    return {name: array for name, array in found.items() if array is not None}


def random_operands(case: Case, seed: int = 0) -> dict:
    """Contiguous CuPy operands of a case."""
    arrays = case.arrays(seed)
    names = (*OPERANDS, "dout", "dlse", *FEATURES)
    return {name: cupy.asarray(getattr(arrays, name)) for name in names if getattr(arrays, name) is not None}
