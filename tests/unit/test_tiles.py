"""The tile table: every problem finds a row, and every row fits its devices and its kernels."""

from __future__ import annotations

import itertools

import pytest

from cuflash.device import DeviceInfo
from cuflash.tiles import ANY, HEAD_DIM_STEP, TILES, row_for, rounded_head_dim, tile_bytes

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
PASSES = ("forward", "backward")
HEAD_DIMS = range(HEAD_DIM_STEP, 257, HEAD_DIM_STEP)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_has_a_row_that_fits(arch, pass_):
    device = DeviceInfo.named(arch)
    for head_dim, head_dim_v, extras in itertools.product(HEAD_DIMS, HEAD_DIMS, range(ANY + 1)):
        row = row_for(device.tile_family, pass_, head_dim, head_dim_v, extras=extras)
        shared_bytes = row.shared_bytes(head_dim, head_dim_v)
        assert shared_bytes <= device.shared_per_block
        assert device.blocks_per_sm(row.threads, shared_bytes) >= row.min_blocks
        assert row.head_dim >= max(head_dim, head_dim_v)
        assert row.extras >= extras


@pytest.mark.parametrize("row", TILES, ids=lambda row: f"{row.family}-{row.pass_}-{row.head_dim}-{row.extras}")
def test_row_is_one_that_the_kernels_can_be_compiled_for(row):
    assert row.block_n % 16 == 0
    assert row.num_stages in (1, 2)
    assert row.num_warps in (4, 8)
    assert row.min_blocks * row.threads * 128 <= 65536, "fewer than 128 registers a thread spill"
    if row.pass_ == "forward":
        assert row.block_m // (16 * row.num_warps) in (1, 2), "a warp owns one or two slabs of rows"
        assert row.block_m % (16 * row.num_warps) == 0
        assert row.split_d == 1
    else:
        warps = row.num_warps // row.split_d
        assert row.block_n // (16 * warps) in (1, 2), "a warp owns one or two slabs of keys"
        assert row.block_n % (16 * warps) == 0
        assert row.block_m // row.split_d % 16 == 0


def test_buckets_rise_and_end_with_a_row_for_everything():
    for family, pass_ in itertools.product({row.family for row in TILES}, PASSES):
        rows = [row for row in TILES if (row.family, row.pass_) == (family, pass_)]
        order = [(row.head_dim, row.extras) for row in rows]
        assert order == sorted(order)
        assert rows[-1].head_dim == 256
        last_of_bucket = {row.head_dim: row.extras for row in rows}
        assert set(last_of_bucket.values()) == {ANY}


def test_reasons_are_measured_or_say_that_they_are_not():
    for row in TILES:
        assert row.reason.startswith(("H200", "unmeasured: ")), row


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(64, 64, 8192), (64, 65, 16384), (16, 32, 2048), (128, 256, 65536)]
)
def test_tile_bytes(rows, columns, size):
    assert tile_bytes(rows, columns) == size


@pytest.mark.parametrize(("head_dim", "rounded"), [(1, 32), (32, 32), (33, 64), (111, 128), (256, 256)])
def test_rounded_head_dim(head_dim, rounded):
    assert rounded_head_dim(head_dim) == rounded


def test_wider_of_the_two_head_dims_decides():
    assert row_for("sm_90", "forward", 64, 200) == row_for("sm_90", "forward", 200, 64)
