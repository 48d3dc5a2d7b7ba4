"""Hopper's tile table: every problem finds the row that was measured for it, and every row fits."""

from __future__ import annotations

import itertools

import pytest

from cuflash.device import KB, DeviceInfo
from cuflash.tiles import HEAD_DIM_STEP
from cuflash.tiles_sm90 import (
    BACKWARD,
    FORWARD,
    PACKED_ROWS,
    QUERIES,
    WARPGROUP_THREADS,
    KeysRow,
    backward_row,
    forward_row,
    packed_heads,
    queries_row,
)

HEAD_DIMS = range(HEAD_DIM_STEP, 257, HEAD_DIM_STEP)
PAIRS = list(itertools.product(HEAD_DIMS, HEAD_DIMS))
SHARED = 227 * KB
LONGEST_BOX = 256  # rows that the copy engine moves at once


def row_id(row) -> str:
    serves = f"{row.head_dim}x{row.head_dim_v}-{row.longest or 'any'}-{row.causal}-{row.extras}"
    return f"{serves}-{row.block_m}x{row.block_n}"


rows = pytest.mark.parametrize("row", FORWARD, ids=row_id)


@pytest.mark.parametrize("extras", range(6))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [0, 1, 512, 513, 1024, 1025, 1 << 29])
def test_every_problem_has_a_row_that_fits(seqlen_q, causal, extras):
    for head_dim, head_dim_v in PAIRS:
        row = forward_row(head_dim, head_dim_v, seqlen_q, causal=causal, extras=extras)
        assert row.shared_bytes(head_dim, head_dim_v) <= SHARED
        assert row.head_dim >= head_dim and row.head_dim_v >= head_dim_v
        assert row.extras >= extras
        packed = forward_row(head_dim, head_dim_v, seqlen_q, causal=causal, extras=extras, packed=True)
        assert packed.block_m == PACKED_ROWS


@pytest.mark.parametrize("block_m", [128, 192])
def test_packed_heads_compute_fewer_rows(block_m):
    for group_size, seqlen_q in itertools.product(range(1, 65), (1, 2, 16, 17, 32, 33, 64, 65, 100, 130, 200, 1000)):
        heads = packed_heads(group_size, seqlen_q, block_m)
        queries = PACKED_ROWS // heads
        assert group_size % heads == 0
        assert queries % 16 == 0, "a slab belongs to one head"
        if heads > 1:
            assert -(-seqlen_q // queries) * queries < -(-seqlen_q // block_m) * block_m
    assert packed_heads(64, 1, block_m) == 8


@rows
def test_row_fits_every_head_dim_that_it_serves(row):
    assert DeviceInfo.named("sm_90a").shared_per_block == SHARED
    for head_dim, head_dim_v in PAIRS:
        if head_dim <= row.head_dim and head_dim_v <= row.head_dim_v:
            assert row.shared_bytes(head_dim, head_dim_v) <= SHARED, (head_dim, head_dim_v)


@rows
def test_row_is_one_that_the_kernel_can_be_compiled_for(row):
    assert row.num_consumers in (2, 3), "the kernel knows how to divide the registers among three or four warpgroups"
    assert row.threads == WARPGROUP_THREADS * (row.num_consumers + 1)
    assert row.block_m == 64 * row.num_consumers
    assert row.block_n % 16 == 0, "a product contracts 16 keys"
    assert max(row.block_m, row.block_n) <= LONGEST_BOX
    assert 0 <= row.eighths_before_wait < 8
    scores_and_out = row.block_n // 2 + row.block_n // 4 + row.head_dim_v // 2
    assert scores_and_out < {2: 232, 3: 160}[row.num_consumers], "scores, probabilities and output stay in registers"


@rows
def test_row_is_reached(row):
    seqlen_q = row.longest or 1 << 20
    causals = (False, True) if row.causal is None else (row.causal,)
    sizes = (row.head_dim, row.head_dim_v, seqlen_q)
    demands = itertools.product(causals, range(6), (False, True))
    keywords = (dict(zip(("causal", "extras", "packed"), demand, strict=True)) for demand in demands)
    assert row in {forward_row(*sizes, **demand) for demand in keywords}


def backward_id(row) -> str:
    return f"{row.entry}-{row.head_dim}{'-split' * row.split}"


@pytest.mark.parametrize("row", BACKWARD, ids=backward_id)
def test_backward_row_is_one_that_the_kernel_can_be_compiled_for(row):
    assert row.threads == WARPGROUP_THREADS * 3
    assert row.reason[:1].isdigit() or row.reason.startswith("unmeasured: ")
    if isinstance(row, KeysRow):
        assert row.block_m % 16 == 0, "a product contracts 16 queries"
        return
    assert (row.head_dim, row.block_m) in ((64, 128), (128, 64)), "halves of a dq tile are 64 columns or rows"
    assert row.split_groups_from is None or not row.split, "sums of dk and dv are added to beside those of dq"


@pytest.mark.parametrize("row", QUERIES, ids=lambda row: f"{row.head_dim}x{row.head_dim_v}-{row.extras}")
def test_row_of_dq_is_one_that_the_kernel_can_be_compiled_for(row):
    assert row.num_consumers in (2, 3), "the kernel knows how to divide the registers among three or four warpgroups"
    assert row.threads == WARPGROUP_THREADS * (row.num_consumers + 1)
    assert row.block_m == 64 * row.num_consumers
    assert row.block_n % 16 == 0, "a product contracts 16 keys"
    assert row.value_stages in (1, 2)
    assert row.reason[:1].isdigit() or row.reason.startswith("unmeasured: ")
    in_registers = row.head_dim // 2 + row.block_n // 2 + row.block_n // 2 + row.block_n // 4
    assert in_registers < {2: 240, 3: 160}[row.num_consumers], "dq, scores, dP and dS stay in registers"


@pytest.mark.parametrize("split", [False, True])
def test_every_backward_has_rows_that_fit(split):
    for head_dim, head_dim_v in PAIRS:
        row = backward_row(head_dim, head_dim_v, split=split)
        assert row.head_dim >= max(head_dim, head_dim_v)
        assert row.split or not split
        assert row.shared_bytes(row.columns(head_dim), row.columns(head_dim_v)) <= SHARED
        for extras in range(4):
            row_of_dq = queries_row(head_dim, head_dim_v, extras=extras)
            assert row_of_dq.head_dim >= head_dim and row_of_dq.head_dim_v >= head_dim_v
            assert row_of_dq.extras >= extras
            assert row_of_dq.shared_bytes(head_dim, head_dim_v) <= SHARED


@pytest.mark.parametrize(
    ("head_dims", "split", "found"),
    [
        ((1, 64), False, ("backward_sm90", 64, False)),
        ((1, 64), True, ("backward_sm90", 64, True)),
        ((65, 1), False, ("backward_sm90", 128, False)),
        ((64, 128), True, ("backward_sm90", 128, True)),
        ((129, 64), False, ("backward_keys_sm90", 256, True)),
        ((64, 256), True, ("backward_keys_sm90", 256, True)),
    ],
)
def test_backward_row_choice(head_dims, split, found):
    row = backward_row(*head_dims, split=split)
    assert (row.entry, row.head_dim, row.split) == found


@pytest.mark.parametrize(
    ("head_dims", "extras", "rows_and_keys"),
    [
        ((64, 64), 2, (128, 128)),
        ((64, 64), 3, (128, 96)),
        ((64, 65), 0, (128, 96)),
        ((192, 128), 0, (128, 80)),
        ((129, 1), 3, (128, 64)),
        ((1, 256), 0, (128, 64)),
        ((256, 256), 3, (128, 48)),
    ],
)
def test_row_of_dq_choice(head_dims, extras, rows_and_keys):
    row = queries_row(*head_dims, extras=extras)
    assert (row.block_m, row.block_n) == rows_and_keys


@rows
def test_reason_is_a_measured_ratio_or_says_that_it_is_none(row):
    assert row.reason[:1].isdigit() or row.reason.startswith("unmeasured: ")


@pytest.mark.parametrize(
    ("head_dims", "seqlen_q", "causal", "extras", "rows_and_keys"),
    [
        ((64, 64), 4096, False, 0, (192, 128)),
        ((64, 64), 4096, True, 0, (192, 128)),
        ((64, 64), 1024, False, 1, (192, 128)),
        ((64, 64), 1024, True, 2, (192, 96)),
        ((64, 64), 4096, False, 4, (192, 96)),
        ((33, 64), 4096, False, 0, (192, 128)),
        ((64, 65), 4096, False, 0, (128, 128)),
        ((128, 128), 4096, True, 4, (128, 128)),
        ((192, 128), 4096, True, 0, (128, 128)),
        ((129, 32), 4096, True, 0, (128, 128)),
        ((192, 192), 4096, True, 0, (128, 112)),
        ((128, 192), 4096, True, 0, (128, 112)),
        ((256, 256), 4096, True, 0, (128, 64)),
        ((256, 256), 1024, False, 0, (128, 64)),
        ((256, 256), 1025, False, 0, (128, 80)),
        ((193, 64), 4096, False, 4, (128, 80)),
    ],
)
def test_row_choice(head_dims, seqlen_q, causal, extras, rows_and_keys):
    row = forward_row(*head_dims, seqlen_q, causal=causal, extras=extras)
    assert (row.block_m, row.block_n) == rows_and_keys


def test_out_has_shared_memory_of_its_own_or_that_of_q():
    own, shared = forward_row(128, 128, 4096, causal=True, extras=0), FORWARD[-1]
    assert (own.out_chunks, shared.out_chunks) == (2, 0)
    tile, k_and_v, rest = 128 * 128 * 2, 2 * 2 * 128 * 128 * 2, 2 * 4 * 8 + 48
    assert own.shared_bytes(128, 128) == 2 * tile + tile + k_and_v + rest + 2 * 2 * 8
    assert shared.shared_bytes(64, 256) == 128 * 256 * 2 + 2 * 80 * (64 + 256) * 2 + rest + 2 * 8
