"""Shared by the GPU tests: operands of a case on the device, and forward and backward of them."""

from __future__ import annotations

import cupy
from cases import Case
from gpu.device_memory import DeviceCopy

import cuflash
from cuflash.testing import Arrays

OPERANDS = ("q", "k", "v")
FEATURES = ("alibi_slopes", "sinks", "seqused_q", "seqused_k")
INPUTS = (*OPERANDS, "dout", "dlse", *FEATURES)
GRADIENTS = ("dq", "dk", "dv", "dsinks")


def device_copies(arrays: Arrays) -> dict[str, DeviceCopy]:
    given = {name: getattr(arrays, name) for name in INPUTS}
    return {name: DeviceCopy(array) for name, array in given.items() if array is not None}


def forward(operands: dict, **keywords) -> dict:
    """out and lse by name, from canonical CuPy operands by name."""
    out, lse = cuflash.attention(**_given(operands, OPERANDS + FEATURES), return_lse=True, **keywords)
    return {"out": out, "lse": lse}


def both_passes(operands: dict, **keywords) -> dict:
    """The same, and the gradients."""
    results = forward(operands, **keywords)
    gradients = cuflash.attention_backward(**_given(operands, INPUTS), **results, **keywords)
    return results | {name: array for name in GRADIENTS if (array := getattr(gradients, name)) is not None}


def _given(arrays: dict, names: tuple[str, ...]) -> dict:
    return {name: arrays[name] for name in names if name in arrays}


def random_operands(case: Case, seed: int = 0) -> dict:
    """Contiguous CuPy operands of a case."""
    arrays = case.arrays(seed)
    return {name: cupy.asarray(getattr(arrays, name)) for name in INPUTS if getattr(arrays, name) is not None}
