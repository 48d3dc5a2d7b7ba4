"""The forward kernel on the host twin: every element against the oracle, under many schedules."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from cases import CASES, Case, select
from cuflash.dropout import keep_mask
from cuflash.testing import check
from emulated.emulation import Emulation, Schedule, forward, problem_of

ARCHES = ("sm_80", "sm_86", "sm_100")  # one of each class of shared memory, which is what tiles depend on
BY_ID = {case.id: case for case in CASES}
SMALL_TILES = {
    "16 rows a warp": (("block_m", 32), ("block_n", 32), ("num_warps", 2), ("num_stages", 2)),
    "32 rows a warp, one stage": (("block_m", 64), ("block_n", 32), ("num_warps", 2), ("num_stages", 1)),
}

# What every run of the tests takes: each feature, each kind of memory, the edges of lengths and head dimensions.
QUICK = """
    length-1 length-65 length-203 length-1x203-causal length-511x2-causal-top-left length-129x63-causal
    length-113x203-causal length-zero-queries length-zero-keys-sinks length-zero-batch
    head-dim-1-1-bfloat16 head-dim-40-40-float16 head-dim-111-111-bfloat16 head-dim-128-128-float16
    head-dim-192-128-bfloat16 head-dim-256-256-float16 head-dim-64-256-bfloat16 head-dim-256-1-bfloat16
    heads-6-2 heads-8-1 window-5-0-65x203 window-64-64-203x203 window--1-3-203x65 window-top-left-empty-tail
    causal softcap-float16 alibi-float16 sinks dropout-float16 gqa used causal+used window+alibi softcap+dropout
    softmax-scale-negative alibi-batch alibi-top-left empty-rows-sinks used-zero used-k-tile-edges
    richest-64-bfloat16 richest-59-float16 strides-transposed-64 strides-sliced-40 strides-odd-59 strides-reversed-64
""".split()


def emulation_of(case: Case) -> Emulation:
    """Spread devices and schedules over the cases, the same ones in every run."""
    number = zlib.crc32(case.id.encode())
    return Emulation(ARCHES[number % 3], schedule=Schedule(number, resident_blocks=1 + number % 4))


def sources_of(case: Case | None = None, **others: object) -> list[tuple[str, tuple[str, ...]]]:
    if case is None:
        return []
    emulation = emulation_of(case)
    return emulation.sources(emulation.plan_forward(problem_of(case.problem(), case.arrays())))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[] if case.id in QUICK else pytest.mark.slow) for case in select()]
)
def test_case(case: Case) -> None:
    arrays = case.arrays()
    problem = problem_of(case.problem(), arrays)
    report = check(forward(problem, arrays, emulation_of(case)), problem, arrays)
    assert report.ok, f"\n{report}"


def test_quick_cases_exist() -> None:
    assert set(QUICK) <= {case.id for case in select()}


@pytest.mark.parametrize("tile", SMALL_TILES)
@pytest.mark.parametrize("name", ["causal+dropout", "richest-64-bfloat16"])
def test_same_bits_under_every_schedule(name: str, tile: str) -> None:
    case = BY_ID[name]
    arrays = case.arrays()
    problem = problem_of(case.problem(), arrays)
    results = []
    for seed in range(6):
        schedule = Schedule(seed, resident_blocks=1 + seed)
        results.append(forward(problem, arrays, Emulation(tile=SMALL_TILES[tile], schedule=schedule)))
    report = check(results[0], problem, arrays)
    assert report.ok, f"\n{report}"
    assert all(result[key].tobytes() == results[0][key].tobytes() for result in results for key in ("out", "lse"))


@pytest.mark.parametrize("tile", SMALL_TILES)
def test_drops_what_the_documented_counter_drops(tile: str) -> None:
    """With the identity as v, the output is the matrix of probabilities with its holes."""
    shape = {"batch": 2, "seqlen_q": 65, "seqlen_k": 128, "num_heads": 3, "num_kv_heads": 1, "head_dim_v": 128}
    case = Case("dropout", **shape, dropout_p=0.3)
    arrays = case.arrays()
    arrays.v[...] = np.eye(128, dtype=arrays.v.dtype)[None, :, None]
    problem = problem_of(case.problem(), arrays)
    out = forward(problem, arrays, Emulation(tile=SMALL_TILES[tile]))["out"]
    for batch, head in np.ndindex(2, 3):
        keep = keep_mask(problem.dropout, batch, head, np.arange(65), np.arange(128))
        np.testing.assert_array_equal(out[batch, :, head] != 0, keep)
