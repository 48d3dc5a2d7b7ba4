"""The backward kernels on the host twin: every gradient against the oracle, under many schedules."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from cases import Case, poison_unused, select
from cuflash.backends import numpy_backend
from cuflash.dropout import keep_mask
from cuflash.problem import Problem
from cuflash.testing import Arrays, check, error_bound
from emulated.emulation import Emulation, Schedule, backward, problem_of
from emulated.test_forward import BY_ID, emulation_of

SMALL_TILES = {
    "16 keys a warp": (("block_m", 32), ("block_n", 32), ("num_warps", 2), ("num_stages", 2), ("split_d", 1)),
    "32 keys a warp": (("block_m", 32), ("block_n", 64), ("num_warps", 2), ("num_stages", 1), ("split_d", 1)),
    "warps share keys": (("block_m", 32), ("block_n", 32), ("num_warps", 4), ("num_stages", 1), ("split_d", 2)),
}

QUICK = """
    length-1 length-65 length-203x113-full length-1x203-causal length-511x2-causal-top-left length-129x63-causal
    length-zero-queries length-zero-keys-sinks length-zero-batch
    head-dim-1-1-bfloat16 head-dim-40-59-float16 head-dim-128-128-float16 head-dim-192-128-bfloat16
    head-dim-256-256-float16 heads-6-2 window-5-0-65x203 window--1-3-203x65 window-top-left-empty-tail
    softcap-float16 alibi-float16 sinks+dlse dropout-float16 gqa used softcap+dropout
    softmax-scale-negative empty-rows-sinks used-zero deterministic richest-64-bfloat16
    strides-transposed-64 strides-sliced-40 strides-odd-59 strides-reversed-64
""".split()


# Every feature at once, small enough for many schedules. In float16, because bfloat16 rounds most orders of a sum to
# the same bits.
SCHEDULED = replace(
    BY_ID["richest-64-bfloat16"],
    id="scheduled",
    dtype="float16",
    batch=1,
    seqlen_k=230,
    seqused_q=(101,),
    seqused_k=(227,),
    window_size=None,
)


def sources_of(case: Case | None = None, **others: object) -> list[tuple[str, tuple[str, ...]]]:
    if case is None:
        return []
    emulation = emulation_of(case)
    return emulation.sources(emulation.plan_backward(problem_of(case.problem(), case.arrays())))


def operands(case: Case) -> tuple[Problem, Arrays, np.ndarray, np.ndarray]:
    """A case with what a forward left behind; only what takes part is finite."""
    arrays = case.arrays()
    problem = problem_of(case.problem(), arrays)
    out, lse = numpy_backend.forward(problem, arrays.q, arrays.k, arrays.v, **arrays.features)
    poison_unused(arrays, (np.nan, np.inf)[zlib.crc32(case.id.encode()) % 2])
    return problem, arrays, out, lse


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=[] if case.id in QUICK else pytest.mark.slow) for case in select()]
)
def test_case(case: Case) -> None:
    problem, arrays, out, lse = operands(case)
    report = check(backward(problem, arrays, out, lse, emulation_of(case)), problem, arrays)
    assert report.ok, f"\n{report}"


def test_quick_cases_exist() -> None:
    assert set(QUICK) <= {case.id for case in select()}


def bits_under_schedules(case: Case, tile: str) -> dict[str, set[bytes]]:
    """The different bits that six schedules give to each gradient, all of them right."""
    problem, arrays, out, lse = operands(case)
    bounds = error_bound(problem, arrays)
    bits: dict[str, set[bytes]] = {}
    for seed in range(6):
        schedule = Schedule(seed, resident_blocks=1 + 2 * seed)
        gradients = backward(problem, arrays, out, lse, Emulation(tile=SMALL_TILES[tile], schedule=schedule))
        report = check(gradients, problem, arrays, bounds)
        assert report.ok, f"\n{report}"
        for name, gradient in gradients.items():
            bits.setdefault(name, set()).add(gradient.tobytes())
    return bits


@pytest.mark.parametrize("tile", SMALL_TILES)
def test_deterministic_gradients_repeat_bit_for_bit(tile: str) -> None:
    bits = bits_under_schedules(replace(SCHEDULED, deterministic=True), tile)
    assert {name: len(different) for name, different in bits.items()} == {"dq": 1, "dk": 1, "dv": 1, "dsinks": 1}


def test_only_dq_depends_on_the_order_of_blocks() -> None:
    bits = bits_under_schedules(SCHEDULED, "16 keys a warp")
    assert {name for name, different in bits.items() if len(different) > 1} == {"dq"}


@pytest.mark.parametrize("tile", SMALL_TILES)
def test_drops_what_the_documented_counter_drops(tile: str) -> None:
    """With the identity as the gradient of out, dv is the transposed matrix of probabilities with its holes."""
    case = Case("dropout", batch=2, seqlen_q=64, seqlen_k=113, num_heads=3, num_kv_heads=3, dropout_p=0.3)
    problem, arrays, out, lse = operands(case)
    arrays.dout[...] = np.eye(64, dtype=arrays.dout.dtype)[None, :, None]
    dv = backward(problem, arrays, out, lse, Emulation(tile=SMALL_TILES[tile]))["dv"]
    for batch, head in np.ndindex(2, 3):
        keep = keep_mask(problem.dropout, batch, head, np.arange(64), np.arange(113))
        np.testing.assert_array_equal(dv[batch, :, head] != 0, keep.T)
