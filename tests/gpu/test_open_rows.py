"""What a row of tiles may turn on and none does yet works on the device, so that it can be timed."""

from __future__ import annotations

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
CLUSTERS = Change(rows={"forward_row": {"cluster_size": 2}})


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
    with CLUSTERS.applied({}, {}, {}), guarded():
        results = forward(operands, **case.keywords)
    report = check({name: cupy.asnumpy(array) for name, array in results.items()}, case.problem(), arrays)
    assert report.ok, f"\n{report}"


LONG = Case("long", batch=2, seqlen_q=2048, seqlen_k=2048, num_heads=16, num_kv_heads=8, head_dim=128, causal=True)


def test_clusters_repeat():
    """Many clusters, drawn in any order: a tile that came late or to the wrong place would move bits."""
    operands = random_operands(LONG)
    expected = forward(operands, **LONG.keywords)
    same = {name: cupy.ones((), bool) for name in ("out", "lse")}
    with CLUSTERS.applied({}, {}, {}):
        for _ in range(REPEATS):
            results = forward(operands, **LONG.keywords)
            for name in same:
                same[name] &= same_bits(results[name], expected[name])
    assert all(bool(flag) for flag in same.values()), same


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dropout_drawn_early_is_the_same(head_dim: int):
    case = Case("drawn", batch=2, seqlen_q=700, seqlen_k=900, head_dim=head_dim, causal=True, dropout_p=0.2)
    operands = random_operands(case)
    expected = forward(operands, **case.keywords)
    with Change(rows={"forward_row": {"early_draws": 4}}).applied({}, {}, {}):
        found = forward(operands, **case.keywords)
    assert bool(same_bits(found["out"], expected["out"])) and bool(same_bits(found["lse"], expected["lse"]))
