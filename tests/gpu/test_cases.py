"""Every shared case on the device, forward and backward, against the float64 oracle: all elements, all bands."""

from __future__ import annotations

import cupy
import numpy as np
import pytest
from cases import CASES, Case, poison_unused
from gpu.calls import both_passes, device_copies
from gpu.device_memory import DeviceCopy, guarded

import cuflash
from cuflash.testing import check

pytestmark = pytest.mark.gpu


_LONG = {"batch": 2, "seqlen_q": 4200, "seqlen_k": 900, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128}
LONG_GROUPS = [  # long enough for tiles of single query heads in the backward
    Case("long-groups-causal", **_LONG, causal=True),
    Case("long-groups-odd", **_LONG | {"head_dim": 96}, head_dim_v=120, dtype="float16", alibi="head", causal=True),
    Case("long-groups-richest", **_LONG, window_size=(700, 20), softcap=2.0, dropout_p=0.2, alibi="batch"),
    Case("long-groups-used", **_LONG, seqused_q=(4200, 65), seqused_k=(640, 900), causal=True, sinks=True),
]


@pytest.mark.parametrize("case", [*CASES, *LONG_GROUPS], ids=str)
def test_matches_the_oracle(case: Case):
    arrays = case.arrays()
    poison_unused(arrays)
    copies = device_copies(arrays)
    with guarded():
        results = both_passes({name: copy.array for name, copy in copies.items()}, **case.keywords)
    for name, copy in copies.items():
        copy.assert_unchanged(name)
    report = check({name: cupy.asnumpy(array) for name, array in results.items()}, case.problem(), arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("strides", ["transposed", "sliced", "odd", "reversed"])
@pytest.mark.parametrize("head_dim", [59, 64])
def test_out_lies_as_the_caller_wants(strides: str, head_dim: int):
    from cases import MEMORY

    case = Case("out", batch=2, seqlen_k=129, head_dim=head_dim, causal=True)
    arrays = case.arrays()
    copies = device_copies(arrays)
    q, k, v = (copies[name].array for name in ("q", "k", "v"))
    out = DeviceCopy(MEMORY[strides](np.zeros(arrays.q.shape, arrays.q.dtype)))
    expected = cuflash.attention(q, k, v, causal=True)
    assert cuflash.attention(q, k, v, causal=True, out=out.array) is out.array
    assert bool((out.array == expected).all())
    out.array[...] = 0
    out.assert_unchanged("memory around out")


def test_in_place():
    case = Case("in-place", batch=2, seqlen_q=203, seqlen_k=203, causal=True)
    q, k, v = (copy.array for copy in list(device_copies(case.arrays()).values())[:3])
    expected = cuflash.attention(q, k, v, causal=True)
    assert cuflash.attention(q, k, v, causal=True, out=q) is q
    assert bool((q == expected).all())


def test_layout_bhsd_is_the_same_numbers():
    case = Case("bhsd", batch=2, num_heads=4, num_kv_heads=2, seqlen_k=143)
    q, k, v = (copy.array for copy in list(device_copies(case.arrays()).values())[:3])
    expected = cuflash.attention(q, k, v)
    swapped = cuflash.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="bhsd")
    assert bool((swapped.swapaxes(1, 2) == expected).all())
