"""Races show as bits that move: the same call many times gives the same bits."""

from __future__ import annotations

import cupy
import pytest
from cases import Case
from gpu.calls import both_passes, random_operands
from gpu.device_memory import same_bits

pytestmark = pytest.mark.gpu

REPEATS = 250
SHAPES = [
    Case("d64-causal", batch=2, seqlen_q=1023, seqlen_k=1023, num_heads=8, num_kv_heads=8, causal=True),
    Case("d128-gqa", batch=2, seqlen_q=777, seqlen_k=1111, num_heads=8, num_kv_heads=2, head_dim=128),
    Case("d256-window", seqlen_q=1023, seqlen_k=1023, num_heads=8, num_kv_heads=4, head_dim=256, window_size=(200, 0)),
    Case("d59-dropout", batch=2, seqlen_q=511, seqlen_k=700, num_heads=8, head_dim=59, dropout_p=0.1, num_kv_heads=8),
    Case("d128-sinks", seqlen_q=900, seqlen_k=900, num_heads=8, num_kv_heads=8, head_dim=128, sinks=True, softcap=5.0),
]


def repeat(case: Case, names: tuple[str, ...], **keywords) -> dict[str, bool]:
    """Whether every repetition gave the first one's bits, by output."""
    operands = random_operands(case)
    first = both_passes(operands, **case.keywords | keywords)
    same = {name: cupy.ones((), bool) for name in names if name in first}
    for _ in range(REPEATS):
        results = both_passes(operands, **case.keywords | keywords)
        for name in same:
            same[name] &= same_bits(results[name], first[name])
    return {name: bool(flag) for name, flag in same.items()}


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_results_repeat(case: Case):
    same = repeat(case, ("out", "lse", "dk", "dv"))
    assert all(same.values()), same


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_deterministic_gradients_repeat(case: Case):
    same = repeat(case, ("dq", "dk", "dv", "dsinks"), deterministic=True)
    assert all(same.values()), same
