"""When a Hopper GPU runs its own backward, in which steps, and what sends it to the portable kernels."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest

from cuflash.device import KB, DeviceInfo
from cuflash.plan_sm90 import hopper_backward_obstacle, hopper_obstacle
from cuflash.planner import plan_backward, plan_forward, plan_passes
from cuflash.problem import Problem, View
from cuflash.tiles_sm90 import BACKWARD

HOPPER = DeviceInfo.named("sm_90a")
FUSED = [row for row in BACKWARD if not row.split]  # one kernel for dq, dk and dv
SHARED = 227 * KB
BATCH, HEADS, KV_HEADS = 2, 8, 4
SHAPE = (BATCH, 1000, HEADS, 64)
LENGTHS = View.of((BATCH,), "int32")
SINKS = {"sinks": View.of((HEADS,), "float32")}
SLOPES = {"alibi_slopes": View.of((HEADS,), "float32")}


def strided(*strides: int, shape: tuple[int, ...] = SHAPE, pointer: int = 0) -> View:
    return View(pointer, shape, strides, "bfloat16")


def problem_of(
    head_dim: int = 64,
    head_dim_v: int = 64,
    *,
    seqlen_q: int = 1000,
    seqlen_k: int = 1000,
    batch: int = BATCH,
    kv_heads: int = HEADS,
    dtype: str = "bfloat16",
    operands: dict[str, View] | None = None,
    **keywords: object,
) -> Problem:
    views = {
        "q": View.of((batch, seqlen_q, HEADS, head_dim), dtype),
        "k": View.of((batch, seqlen_k, kv_heads, head_dim), dtype),
        "v": View.of((batch, seqlen_k, kv_heads, head_dim_v), dtype),
    }
    return Problem.build(views | (operands or {}), **keywords)


def config_of(step) -> dict[str, object]:
    return {name: value for name, _, value in step.spec.config}


def entries(plan) -> list[str]:
    return [step.spec.entry for step in plan.steps]


@pytest.mark.parametrize("head_dim", range(1, 129))
def test_every_head_dim_up_to_128_has_steps_that_fit(head_dim):
    """All pairs: Hopper's kernels run the multiples of 8, the portable ones the others."""
    for head_dim_v in range(1, 129):
        plan = plan_backward(problem_of(head_dim, head_dim_v), HOPPER)
        for step in plan.steps:
            assert step.grid > 0
            assert step.shared_bytes <= SHARED
            assert step.threads <= 1024
        if head_dim % 8 or head_dim_v % 8:
            assert plan.main_entry == "backward_sm80"
            continue
        wide = max(head_dim, head_dim_v) > 64
        columns, block_m = (128, 64) if wide else (64, 128)
        blocks = -(-1000 // block_m)
        prepare, main = plan.steps
        assert entries(plan) == ["backward_prepare", "backward_sm90"]
        assert [step.grid for step in plan.steps] == [blocks * HEADS * BATCH, 8 * HEADS * BATCH]
        assert [step.threads for step in plan.steps] == [256, 384]
        assert prepare.shared_bytes == 0
        assert {step.min_blocks for step in plan.steps} == {1}
        assert config_of(main)["head_dim"] == config_of(main)["head_dim_v"] == columns
        assert config_of(main)["block_m"] == block_m


@pytest.mark.parametrize("row", FUSED, ids=lambda row: str(row.head_dim))
def test_shared_memory_is_what_the_kernel_lays_out(row):
    """The layout at the top of backward_sm90.cu, counted by hand."""
    key_value_and_out = 3 * 128 * row.head_dim * 2
    query_stages = 2 * (row.block_m * row.head_dim * 2 + row.block_m * 4)
    ds, dq = 2 * row.block_m * 128 * 2, row.block_m * row.head_dim * 4
    barriers, queue = 8 * (2 * (1 + 1 + 2 + 2) + 1), 48
    sizes, without = (row.head_dim, row.head_dim), key_value_and_out + 2 * query_stages + barriers + queue
    assert replace(row, split=True).shared_bytes(*sizes) == without
    assert row.shared_bytes(*sizes) == without + ds + dq <= SHARED
    assert HOPPER.blocks_per_sm(row.threads, without, 168) == 1


@pytest.mark.parametrize(
    ("head_dim", "seqlen_q", "padded"), [(64, 1, 128), (64, 128, 128), (64, 129, 256), (128, 64, 64), (128, 1000, 1024)]
)
def test_workspace(head_dim, seqlen_q, padded):
    """Float32 dq of a padded head_dim, and two values per padded row."""
    plan = plan_backward(problem_of(head_dim - 8, head_dim, seqlen_q=seqlen_q), HOPPER)
    rows = (BATCH, HEADS, padded)
    assert plan.padded_seqlen_q == padded
    assert plan.workspace == {
        "row_lse": (rows, "float32"),
        "row_delta": (rows, "float32"),
        "dq_accum": ((*rows, head_dim), "float32"),
        "dq_done": ((1 + BATCH * HEADS,), "int32"),
        "dq_turn": ((*rows[:2], padded // plan.tile.block_m), "int32"),
    }


@pytest.mark.parametrize(
    ("keywords", "first_stores"),
    [
        ({"seqlen_q": 4096}, True),
        ({"seqlen_q": 4097}, False),
        ({"seqlen_q": 1024, "kv_heads": 1}, True),
        ({"seqlen_q": 1025, "kv_heads": 1}, False),
        ({"seqlen_q": 2048, "kv_heads": 1, "causal": True}, True),
        ({"seqlen_q": 2049, "kv_heads": 1, "causal": True}, False),
        ({"seqlen_q": 4096, "kv_heads": 1, "causal": True}, True),  # whose groups are split
        ({"seqlen_q": 99999, "window_size": (1024, 0)}, True),
        ({"seqlen_q": 99999, "window_size": (1024, None)}, False),
        ({"seqlen_q": 9999, "window_size": (3960, 9)}, False),
        ({"seqlen_q": 512, "deterministic": True}, False),
    ],
)
def test_first_key_block_stores_where_tiles_are_short(keywords, first_stores):
    plan = plan_backward(problem_of(128, 128, **keywords), HOPPER)
    assert ("dq_turn" in plan.workspace) is first_stores
    assert {config_of(step).get("first_stores", first_stores) for step in plan.steps} == {first_stores}
    assert "first_stores" in config_of(plan.steps[0])


@pytest.mark.parametrize(("seqlen_k", "key_blocks"), [(1, 1), (128, 1), (129, 2), (4096, 32)])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_key_blocks_serve_the_query_heads_of_a_group(kv_heads, seqlen_k, key_blocks):
    """A block takes 128 keys of one key/value head, whatever the number of query heads."""
    plan = plan_backward(problem_of(128, 128, seqlen_k=seqlen_k, kv_heads=kv_heads), HOPPER)
    prepare, main = plan.steps
    assert plan.key_tiles == key_blocks * kv_heads * BATCH
    assert main.grid == min(plan.key_tiles, HOPPER.sm_count)
    assert prepare.grid == 16 * HEADS * BATCH


@pytest.mark.parametrize(
    ("seqlen_q", "kv_heads", "mask", "splits"),
    [
        (4095, 2, {"causal": True}, False),
        (4096, 2, {"causal": True}, True),
        (4096, HEADS, {"causal": True}, False),
        (4096, 2, {}, False),
        (4096, 2, {"window_size": (None, 50)}, True),
    ],
)
def test_long_groups_are_split_where_tiles_differ_in_length(seqlen_q, kv_heads, mask, splits):
    """A tile takes one query head then; the sums of dk and dv are as long as whole blocks of keys."""
    problem = problem_of(128, 96, seqlen_q=seqlen_q, seqlen_k=1000, kv_heads=kv_heads, **mask)
    plan = plan_backward(problem, HOPPER)
    assert plan.split_groups is splits
    assert entries(plan)[2:] == ["backward_finish_groups"] * splits
    assert config_of(plan.steps[0])["split_groups"] is config_of(plan.steps[1])["split_groups"] is splits
    heads = HEADS if splits else kv_heads
    assert plan.key_tiles == 8 * heads * BATCH
    assert plan.workspace.get("dkv_accum") == (((BATCH, kv_heads, 1024, 256), "float32") if splits else None)
    if splits:
        assert plan.steps[2].grid == 8 * kv_heads * BATCH
        assert "a tile takes one query head" in plan.explain()


def test_rows_without_registers_split_no_groups():
    """Of 64 columns, of the kernels that leave dq to another, and of head dims above 128."""
    for head_dim, keywords in ((64, {}), (128, {"deterministic": True}), (256, {})):
        plan = plan_backward(problem_of(head_dim, head_dim, seqlen_q=8192, kv_heads=1, causal=True, **keywords), HOPPER)
        assert not plan.split_groups


def test_sinks_take_a_step_of_their_own():
    plan = plan_backward(problem_of(operands=SINKS), HOPPER)
    *_, sinks = plan.steps
    assert entries(plan) == ["backward_prepare", "backward_sm90", "backward_sinks"]
    assert (sinks.grid, sinks.threads, sinks.shared_bytes) == (HEADS, 256, 32)
    assert plan.steps[:2] == plan_backward(problem_of(), HOPPER).steps


def test_only_the_main_kernel_is_hopper_code():
    """The others use nothing that a portable kernel lacks, and count no tiles of dq without being told."""
    prepare, main, sinks = plan_backward(problem_of(operands=SINKS), HOPPER).steps
    assert main.spec.arch == "sm_90a"
    assert {step.spec.arch for step in (prepare, sinks)} == {"sm_90"}
    for others in ({"kernels": "sm80"}, {"deterministic": True}):
        assert "dq_done" not in plan_backward(problem_of(**others), HOPPER).workspace


@pytest.mark.parametrize("row", FUSED, ids=lambda row: str(row.head_dim))
def test_all_steps_agree_about_the_accumulator(row):
    steps = plan_backward(problem_of(row.head_dim - 24, row.head_dim - 8), HOPPER).steps
    for name, value in {"head_dim": row.head_dim, "block_m": row.block_m}.items():
        assert {config_of(step)[name] for step in steps} == {value}
    assert (config_of(steps[0])["num_warps"], config_of(steps[0])["block_n"]) == (8, 128)


FLAGS = ("window_left", "window_right", "scale_first", "softcap", "alibi", "dropout", "used_queries", "used_keys")


@pytest.mark.parametrize(
    ("keywords", "on"),
    [
        ({}, set()),
        ({"causal": True}, {"window_right"}),
        ({"window_size": (5, None)}, {"window_left"}),
        ({"window_size": (5, 7)}, {"window_left", "window_right"}),
        ({"softmax_scale": -1.0}, {"scale_first"}),
        ({"operands": SLOPES}, {"alibi", "scale_first"}),
        ({"softcap": 5.0}, {"softcap", "scale_first"}),
        ({"dropout_p": 0.1}, {"dropout"}),
        ({"operands": SINKS}, set()),
        ({"operands": {"seqused_q": LENGTHS}}, {"used_queries"}),
        ({"operands": {"seqused_k": LENGTHS}}, {"used_keys"}),
    ],
)
def test_features_are_compiled_in(keywords, on):
    plan = plan_backward(problem_of(**keywords), HOPPER)
    assert plan.main_entry == "backward_sm90"
    config = config_of(plan.steps[1])
    assert {name for name in FLAGS if config[name]} == on


def test_values_and_sizes_are_not_compiled_in():
    problems = [
        problem_of(causal=True),
        problem_of(32, 40, causal=True),
        problem_of(seqlen_q=1, seqlen_k=9999, kv_heads=1, window_size=(None, 3), softmax_scale=0.3),
        problem_of(causal=True, operands={"dout": strided(512_000, 64, 64_000, 1)}),
    ]
    assert len({plan_backward(problem, HOPPER).steps[1].spec for problem in problems}) == 1


def test_rows_are_read_by_16_bytes():
    """Every array that the Hopper backward runs has rows of whole 16 bytes."""
    for problem in (problem_of(), problem_of(72, 8), problem_of(8, 120)):
        assert config_of(plan_backward(problem, HOPPER).steps[0])["load_bytes"] == 16


ALIGNMENT = "address or strides are not multiples of 16 bytes"
NO_EMPTY = "the copy engine knows no empty arrays"
OF_THE_FORWARD = {
    "address of q": (problem_of(operands={"q": strided(512_000, 512, 64, 1, pointer=8)}), f"q's {ALIGNMENT}"),
    "address of out": (problem_of(operands={"out": strided(512_000, 512, 64, 1, pointer=2)}), f"out's {ALIGNMENT}"),
    "stride of k": (problem_of(operands={"k": strided(512_004, 512, 64, 1)}), f"k's {ALIGNMENT}"),
    "narrow rows": (problem_of(60), f"q's {ALIGNMENT}"),
    "narrow values": (problem_of(64, 60), f"v's {ALIGNMENT}"),
    "reversed": (
        problem_of(operands={"k": strided(512_000, -512, 64, 1)}),
        "k has strides (512000, -512, 64, 1); the copy engine needs positive ones",
    ),
    "broadcast": (
        problem_of(operands={"v": strided(0, 512, 64, 1)}),
        "v has strides (0, 512, 64, 1); the copy engine needs positive ones",
    ),
    "no queries": (problem_of(seqlen_q=0), f"q has shape (2, 0, 8, 64); {NO_EMPTY}"),
    "no keys": (problem_of(seqlen_k=0), f"k has shape (2, 0, 8, 64); {NO_EMPTY}"),
    "no batch": (problem_of(batch=0), f"q has shape (0, 1000, 8, 64); {NO_EMPTY}"),
}
ROWS_OF_60 = (BATCH, 1000, HEADS, 60)
ITS_OWN = {
    "rows of dk": (
        problem_of(operands={name: strided(512_000, 512, 64, 1, shape=ROWS_OF_60) for name in "qk"}),
        "head_dim is 60; rows of dk are no multiples of 16 bytes",
    ),
    "rows of dv": (
        problem_of(operands={name: strided(512_000, 512, 64, 1, shape=ROWS_OF_60) for name in ("v", "out", "dout")}),
        "head_dim_v is 60; rows of dv are no multiples of 16 bytes",
    ),
    "address of dout": (problem_of(operands={"dout": strided(512_000, 512, 64, 1, pointer=8)}), f"dout's {ALIGNMENT}"),
    "stride of dout": (problem_of(operands={"dout": strided(512_004, 512, 64, 1)}), f"dout's {ALIGNMENT}"),
    "reversed dout": (
        problem_of(operands={"dout": strided(512_000, -512, 64, 1)}),
        "dout has strides (512000, -512, 64, 1); the copy engine needs positive ones",
    ),
    "gradient of a sum over queries": (
        problem_of(operands={"dout": strided(512, 0, 64, 1)}),
        "dout has strides (512, 0, 64, 1); the copy engine needs positive ones",
    ),
}
OBSTACLES = OF_THE_FORWARD | ITS_OWN


@pytest.mark.parametrize("name", OBSTACLES)
def test_portable_kernels_run_what_the_hopper_backward_cannot(name):
    problem, reason = OBSTACLES[name]
    plan = plan_backward(problem, HOPPER)
    assert hopper_backward_obstacle(problem, HOPPER) == reason
    assert plan.main_entry == "backward_sm80"
    assert "backward_sm90" not in entries(plan)
    assert {step.spec.arch for step in plan.steps} <= {"sm_90"}
    assert plan.note == f"portable kernels: {reason}"
    assert f"\n  portable kernels: {reason}\n" in plan.explain()


@pytest.mark.parametrize("name", OBSTACLES)
def test_insisting_on_hopper_kernels_says_what_they_cannot_do(name):
    problem, reason = OBSTACLES[name]
    message = f"^backend is 'sm90', but {re.escape(reason)}; None or 'sm80' runs it$"
    with pytest.raises(NotImplementedError, match=message):
        plan_backward(replace(problem, kernels="sm90"), HOPPER)


@pytest.mark.parametrize("name", ITS_OWN)
def test_obstacles_of_the_backward_leave_the_forward_alone(name):
    """A call that insists on Hopper kernels is planned without a backward where only that one is missing."""
    problem, _ = ITS_OWN[name]
    problem = replace(problem, dout=None) if problem.dout is not None and "rows" not in name else problem
    assert hopper_obstacle(problem, HOPPER) is None
    assert plan_forward(problem, HOPPER).main_entry == "forward_sm90"
    planned = [plan.main_entry for plan in plan_passes(replace(problem, kernels="sm90"), HOPPER)]
    missing = hopper_backward_obstacle(problem, HOPPER) is not None
    assert planned == (["forward_sm90"] if missing else ["forward_sm90", "backward_sm90"])


@pytest.mark.parametrize(
    ("kernels", "passes"),
    [
        (None, ["forward_sm90", "backward_sm90"]),
        ("sm90", ["forward_sm90", "backward_sm90"]),
        ("sm80", ["forward_sm80", "backward_sm80"]),
    ],
)
def test_kernels_keyword_chooses_both_passes(kernels, passes):
    plans = plan_passes(problem_of(kernels=kernels), HOPPER)
    assert [plan.main_entry for plan in plans] == passes
    assert [plan.note for plan in plans] == [None, None]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_other_devices_have_no_hopper_backward(arch):
    device = DeviceInfo.named(arch)
    plan = plan_backward(problem_of(), device)
    assert (plan.main_entry, plan.note) == ("backward_sm80", None)
    message = f"^backend is 'sm90', but {device.name} is {arch}, not sm_90a; None or 'sm80' runs it$"
    with pytest.raises(NotImplementedError, match=message):
        plan_backward(problem_of(kernels="sm90"), device)


def test_aligned_dout_of_any_positive_strides_is_addressed():
    for strides in ((512_000, 512, 64, 1), (512_000, 64, 64_000, 1), (1_024_000, 1024, 128, 1)):
        problem = problem_of(kernels="sm90", operands={"dout": strided(*strides)})
        assert plan_backward(problem, HOPPER).main_entry == "backward_sm90"


@pytest.mark.parametrize("row", FUSED, ids=lambda row: str(row.head_dim))
def test_explain_shows_the_row_and_its_reason(row):
    plan = plan_backward(problem_of(row.head_dim, row.head_dim, causal=True), HOPPER)
    assert plan.tile == row
    text = plan.explain({"backward_sm90": 168})
    assert f"tile {row.block_m}x128, 2 consumer warpgroups, head_dim {row.head_dim}: {row.reason}\n" in text
    shared = row.shared_bytes(row.head_dim, row.head_dim)
    line = f"backward_sm90 [sm_90a]: grid {plan.steps[1].grid}, 384 threads, {shared} B shared, 168 registers"
    assert f"{line}, 1 blocks per SM\n" in text
    assert "portable" not in text


def test_floor_counts_five_products_and_the_workspace():
    problem = problem_of(128, 128)
    plan = plan_backward(problem, HOPPER)
    assert plan.flops == 2.5 * plan_forward(problem, HOPPER).flops
    rows = BATCH * HEADS * 1024
    operands = 2 * 4 * 2 * math.prod((BATCH, 1000, HEADS, 128))
    counts = BATCH * HEADS * 16 + (1 + BATCH * HEADS)  # blocks that are begun, tiles that are done
    assert plan.bytes == operands + 4 * BATCH * HEADS * 1000 + 2 * 4 * (rows * 128 + 2 * rows + counts)


def test_plans_are_values():
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        first, second = (plan_backward(problem_of(head_dim, 64, causal=causal), HOPPER) for _ in range(2))
        assert first == second
