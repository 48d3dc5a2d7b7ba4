"""What rows of Hopper's tiles turn on for long sequences works on small ones too, and changes no bits."""

from __future__ import annotations

from dataclasses import replace

import cupy
import pytest
from cases import IN_CLUSTERS, Case, poison_unused
from gpu.calls import device_copies, forward, random_operands
from gpu.device_memory import guarded, same_bits

from benchmarks.variants import Change
from cuflash.device import DeviceInfo
from cuflash.testing import check

pytestmark = pytest.mark.gpu

REPEATS = 50
LONG = Case("long", batch=2, seqlen_q=2048, seqlen_k=2048, num_heads=16, num_kv_heads=8, head_dim=128)
DROPPED = Case("dropped", batch=2, seqlen_q=700, seqlen_k=900, head_dim=128, causal=True, dropout_p=0.2)


def forward_rows(**fields: int) -> Change:
    return Change(rows={"forward_row": fields})


@pytest.fixture(autouse=True)
def on_hopper():
    if not DeviceInfo.current(0).has_wgmma:
        pytest.skip("clusters are Hopper's")


@pytest.mark.parametrize("name", IN_CLUSTERS)
def test_clusters_match_the_oracle(name: str):
    case = IN_CLUSTERS[name]
    arrays = case.arrays()
    poison_unused(arrays)
    operands = {name: copy.array for name, copy in device_copies(arrays).items()}
    with forward_rows(cluster_size=2).applied({}, {}, {}), guarded():
        results = forward(operands, **case.keywords)
    report = check({name: cupy.asnumpy(array) for name, array in results.items()}, case.problem(), arrays)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_clusters_repeat(head_dim: int):
    """Many clusters, drawn in any order: a tile that came late or to the wrong place would move bits."""
    operands = random_operands(replace(LONG, head_dim=head_dim))
    with forward_rows(cluster_size=1).applied({}, {}, {}):
        expected = forward(operands)
    same = {name: cupy.ones((), bool) for name in expected}
    with forward_rows(cluster_size=2).applied({}, {}, {}):
        for _ in range(REPEATS):
            results = forward(operands)
            for name in same:
                same[name] &= same_bits(results[name], expected[name])
    assert all(bool(flag) for flag in same.values()), same


def test_dropout_drawn_early_is_the_same():
    operands = random_operands(DROPPED)
    found = []
    for draws in (0, 8):
        with forward_rows(early_draws=draws).applied({}, {}, {}):
            found.append(forward(operands, **DROPPED.keywords))
    assert all(bool(same_bits(found[0][name], found[1][name])) for name in ("out", "lse"))
