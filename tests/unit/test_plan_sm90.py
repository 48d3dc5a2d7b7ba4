"""When a Hopper GPU runs its own forward, how, and what sends it to the portable kernels.

Its backward is in test_plan_backward_sm90.py.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from test_tiles_sm90 import row_id

from cuflash.device import DeviceInfo
from cuflash.plan_sm90 import hopper_obstacle
from cuflash.planner import plan_forward
from cuflash.problem import Problem, View
from cuflash.tiles_sm90 import FORWARD

HOPPER = DeviceInfo.named("sm_90a")
ROWS, STRIDES = (2, 1000, 8, 64), (512_000, 512, 64, 1)


def operand(strides: tuple[int, ...] = STRIDES, shape: tuple[int, ...] = ROWS, pointer: int = 0) -> View:
    return View(pointer, shape, strides, "bfloat16")


def contiguous(*shape: int) -> View:
    return View.of(shape, "bfloat16")


def problem_of(operands: dict[str, View] | None = None, **keywords: object) -> Problem:
    return Problem.build({name: operand() for name in "qkv"} | (operands or {}), **keywords)


def sized(seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int, *, batch: int = 2, **keywords) -> Problem:
    shapes = {"q": (seqlen_q, head_dim), "k": (seqlen_k, head_dim), "v": (seqlen_k, head_dim_v)}
    views = {name: contiguous(batch, seqlen, 8, columns) for name, (seqlen, columns) in shapes.items()}
    return Problem.build(views, **keywords)


def entries(plan) -> list[str]:
    return [step.spec.entry for step in plan.steps]


def config_of(plan) -> dict[str, object]:
    return {name: value for name, _, value in plan.steps[0].spec.config}


ALIGNMENT = "address or strides are not multiples of 16 bytes"
LENGTHS = View.of((2,), "int32")
OBSTACLES = {
    "address": (problem_of({"q": operand(pointer=8)}), f"q's {ALIGNMENT}"),
    "odd address": (problem_of({"k": operand(pointer=2)}), f"k's {ALIGNMENT}"),
    "stride": (problem_of({"v": operand((512_004, 512, 64, 1))}), f"v's {ALIGNMENT}"),
    "out": (problem_of({"out": operand(pointer=2)}), f"out's {ALIGNMENT}"),
    "narrow rows": (sized(100, 100, 60, 64), f"q's {ALIGNMENT}"),
    "narrow values": (sized(100, 100, 64, 60), f"v's {ALIGNMENT}"),
    "narrow rows of out": (
        problem_of({"v": operand(shape=(2, 1000, 8, 60))}),
        "head_dim_v is 60; rows of out are no multiples of 16 bytes",
    ),
    "reversed": (
        problem_of({"k": operand((512_000, -512, 64, 1))}),
        "k has strides (512000, -512, 64, 1); the copy engine needs positive ones",
    ),
    "broadcast": (
        problem_of({"v": operand((0, 512, 64, 1))}),
        "v has strides (0, 512, 64, 1); the copy engine needs positive ones",
    ),
    "no queries": (sized(0, 100, 64, 64), "q has shape (2, 0, 8, 64); the copy engine knows no empty arrays"),
    "no keys": (sized(100, 0, 64, 64), "k has shape (2, 0, 8, 64); the copy engine knows no empty arrays"),
    "no batch": (sized(100, 100, 64, 64, batch=0), "q has shape (0, 100, 8, 64); the copy engine knows no empty array"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_portable_kernels_run_what_the_copy_engine_cannot(name):
    problem, reason = OBSTACLES[name]
    plan = plan_forward(problem, HOPPER)
    assert plan.main_entry == "forward_sm80"
    assert set(entries(plan)) <= {"forward_sm80"}
    assert {step.spec.arch for step in plan.steps} <= {"sm_90"}
    assert f"\n  portable kernels: {reason}" in plan.explain()


@pytest.mark.parametrize("name", OBSTACLES)
def test_insisting_on_hopper_kernels_says_what_they_cannot_do(name):
    problem, reason = OBSTACLES[name]
    with pytest.raises(NotImplementedError, match=f"^backend is 'sm90', but {re.escape(reason)}.*; 'sm80' runs it$"):
        plan_forward(replace(problem, kernels="sm90"), HOPPER)


ONE_ROW = (2, 1, 1, 64)


@pytest.mark.parametrize(
    "problem",
    [
        problem_of(),
        problem_of(kernels="sm90"),
        problem_of(causal=True, window_size=(7, 0), softcap=1.0, dropout_p=0.5, softmax_scale=-1.0),
        problem_of({"alibi_slopes": View.of((8,), "float32"), "sinks": View.of((8,), "float32")}),
        problem_of({"seqused_q": LENGTHS, "seqused_k": LENGTHS}, kernels="sm90"),
        problem_of({"q": operand((512_000, 64, 64_000, 1)), "out": operand()}),
        sized(1, 777, 40, 256),
        problem_of({name: operand(shape=(2, 1000, 8, 59)) for name in "qk"}),  # odd rows in steps of 64
        Problem.build({name: operand((64, 0, -3, 1), ONE_ROW) for name in "qkv"}),  # axes that are never stepped along
    ],
    ids=["plain", "insisting", "features", "operands", "used lengths", "strided", "sizes", "padded", "size one"],
)
def test_hopper_runs_its_own_forward(problem):
    assert hopper_obstacle(problem, HOPPER) is None
    plan = plan_forward(problem, HOPPER)
    (step,) = plan.steps
    assert (step.spec.entry, step.spec.source, step.spec.arch) == ("forward_sm90", "forward_sm90.cu", "sm_90a")
    assert plan.main_entry == "forward_sm90"
    assert step.threads == plan.tile.threads
    assert step.shared_bytes <= HOPPER.shared_per_block
    assert plan.note is None
    assert plan == plan_forward(problem, HOPPER)


@pytest.mark.parametrize(("seqlen_q", "grid"), [(1, 16), (128, 16), (129, 32), (16 * 128, 132), (1 << 20, 132)])
def test_blocks_persist(seqlen_q, grid):
    """One block a multiprocessor, and no more of them than there are tiles."""
    assert plan_forward(sized(seqlen_q, 300, 128, 128), HOPPER).steps[0].grid == grid


def grouped(seqlen_q: int, num_heads: int, num_kv_heads: int, head_dim: int = 128, **keywords: object) -> Problem:
    shapes = {"q": (2, seqlen_q, num_heads, head_dim), "k": (2, 300, num_kv_heads, head_dim)}
    views = {name: contiguous(*shapes["q" if name == "q" else "k"]) for name in "qkv"}
    return Problem.build(views, **keywords)


@pytest.mark.parametrize(
    ("seqlen_q", "num_heads", "num_kv_heads", "packed", "grid"),
    [
        (1, 8, 8, 1, 16),
        (1, 8, 1, 8, 2),
        (16, 32, 2, 8, 8),
        (17, 8, 1, 4, 4),
        (40, 6, 1, 2, 6),
        (1, 10, 2, 1, 20),
        (64, 8, 1, 2, 8),
        (65, 8, 1, 8, 10),
        (100, 8, 1, 1, 16),
        (130, 8, 1, 8, 18),
        (4096, 8, 1, 1, 132),
    ],
)
def test_heads_with_few_queries_share_tiles(seqlen_q, num_heads, num_kv_heads, packed, grid):
    """As many heads of a group as leave the fewest rows of padding, where it is a quarter less."""
    plan = plan_forward(grouped(seqlen_q, num_heads, num_kv_heads), HOPPER)
    (step,) = plan.steps
    assert (plan.packed_heads, config_of(plan)["packed_heads"], step.grid) == (packed, packed, grid)
    boxes = dict(step.boxes)
    assert (boxes["q"], boxes["out"]) == (128 // packed, min(64, 128 // packed))
    assert (f"a tile holds the queries of {packed} heads" in plan.explain()) == (packed > 1)


def test_shared_tiles_have_two_consumers():
    """Rows of three consumers do not divide into slabs of every number of heads."""
    alone, packed = (plan_forward(grouped(seqlen_q, 8, 1, 64), HOPPER) for seqlen_q in (4096, 4))
    assert (alone.tile.num_consumers, alone.packed_heads) == (3, 1)
    assert (packed.tile.num_consumers, packed.packed_heads) == (2, 8)


def test_portable_kernels_run_where_they_are_asked_for():
    plan = plan_forward(problem_of(kernels="sm80"), HOPPER)
    assert (entries(plan), plan.note) == (["forward_sm80"], None)
    assert "portable" not in plan.explain()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_other_devices_have_no_hopper_kernels(arch):
    device = DeviceInfo.named(arch)
    plan = plan_forward(problem_of(), device)
    assert (entries(plan), plan.note) == (["forward_sm80"], None)
    message = f"^backend is 'sm90', but {device.name} is {arch}, not sm_90a; 'sm80' runs it$"
    with pytest.raises(NotImplementedError, match=message):
        plan_forward(problem_of(kernels="sm90"), device)


def test_hopper_without_its_compiler_is_a_portable_device():
    """Where NVRTC is too old, `DeviceInfo.current` leaves the letter out."""
    (step,) = plan_forward(problem_of(), replace(HOPPER, arch="sm_90")).steps
    assert (step.spec.entry, step.spec.arch) == ("forward_sm80", "sm_90")


FLAGS = ("window_left", "window_right", "scale_first", "softcap", "alibi", "dropout", "sinks", "used_keys")
SLOPES = {"alibi_slopes": View.of((8,), "float32")}


@pytest.mark.parametrize(
    ("keywords", "on"),
    [
        ({}, set()),
        ({"causal": True}, {"window_right"}),
        ({"window_size": (5, None)}, {"window_left"}),
        ({"softcap": 3.0}, {"softcap", "scale_first"}),
        ({"softmax_scale": 0.0}, {"scale_first"}),
        ({"dropout_p": 0.5}, {"dropout"}),
        ({"operands": SLOPES}, {"alibi", "scale_first"}),
        ({"operands": {"sinks": View.of((8,), "float32")}}, {"sinks"}),
        ({"operands": {"seqused_k": LENGTHS}}, {"used_keys"}),
        ({"operands": {"seqused_q": LENGTHS}}, set()),
    ],
)
def test_features_are_compiled_in(keywords, on):
    config = config_of(plan_forward(problem_of(**keywords), HOPPER))
    assert {name for name in FLAGS if config[name]} == on


def test_sizes_and_schedule_are_compiled_in():
    plan = plan_forward(sized(300, 300, 59 + 5, 130 + 6, causal=True), HOPPER)
    config, tile = config_of(plan), plan.tile
    assert (config["Element"], config["head_dim"], config["head_dim_v"]) == ("Bfloat16", 64, 160)
    schedule = ("query_stages", "out_chunks", "ping_pong", "lazy_rescale", "eighths_before_wait")
    for name in ("block_n", "num_consumers", *schedule):
        assert config[name] == getattr(tile, name)


def test_strides_and_values_are_not_compiled_in():
    problems = [
        problem_of(softmax_scale=0.3, softcap=2.0),
        problem_of({"q": operand((512_000, 64, 64_000, 1))}, softcap=9.0),
        sized(9999, 5, 64, 64, softcap=1.0),
    ]
    assert len({plan_forward(problem, HOPPER).steps[0].spec for problem in problems}) == 1


@pytest.mark.parametrize(
    ("keywords", "block_n"),
    [
        ({}, 128),
        ({"window_size": (9, None)}, 128),
        ({"operands": {"sinks": View.of((8,), "float32")}}, 128),
        ({"softcap": 1.0}, 96),
        ({"dropout_p": 0.1}, 96),
        ({"softmax_scale": -1.0}, 128),
        ({"operands": SLOPES}, 128),
        ({"operands": SLOPES, "softcap": 1.0}, 96),
        ({"operands": SLOPES, "dropout_p": 0.1}, 96),
    ],
)
def test_features_that_need_registers_choose_a_row_that_has_them(keywords, block_n):
    tile = plan_forward(problem_of(**keywords), HOPPER).tile
    assert (tile.num_consumers, tile.block_n) == (3, block_n)


@pytest.mark.parametrize(
    ("seqlen_q", "head_dim", "keywords", "size"),
    [
        (4096, 128, {}, 2),
        (4096, 128, {"dropout_p": 0.1}, 2),
        (2048, 128, {}, 1),
        (4096 - 128, 128, {}, 1),
        (4096, 128, {"causal": True}, 1),
        (4096, 128, {"window_size": (9, None)}, 1),
        (4096, 128, {"window_size": (None, 9)}, 1),
        (4096, 256, {}, 2),
        (4096, 256, {"causal": True}, 1),
        (1024, 256, {}, 1),
        (4096, 64, {}, 1),
    ],
)
def test_query_blocks_share_keys_where_that_pays_and_no_mask_cuts(seqlen_q, head_dim, keywords, size):
    plan = plan_forward(sized(seqlen_q, 4096, head_dim, head_dim, **keywords), HOPPER)
    assert (plan.cluster_size, config_of(plan)["cluster_size"]) == (size, size)
    assert ("clusters of 2 thread blocks" in plan.explain({"forward_sm90": 168})) == (size == 2)


@pytest.mark.parametrize(("sm_count", "grid"), [(131, 130), (132, 132), (1000, 512)])
def test_clusters_are_launched_whole(sm_count, grid):
    plan = plan_forward(sized(4096, 4096, 128, 128), replace(HOPPER, sm_count=sm_count))
    assert (plan.cluster_size, plan.steps[0].grid) == (2, grid)


@pytest.mark.parametrize("row", FORWARD, ids=row_id)
def test_explain_shows_the_row_and_its_reason(row):
    sizes = (row.longest or 4096, 4096, row.head_dim, row.head_dim_v)
    problems = [sized(*sizes, causal=bool(row.causal), dropout_p=dropout_p) for dropout_p in (0.0, 0.1)]
    problems.append(grouped(1, 8, 1, row.head_dim))
    plan = next(plan for plan in (plan_forward(problem, HOPPER) for problem in problems) if plan.tile == row)
    text = plan.explain({"forward_sm90": 168 if row.num_consumers == 2 else 128})
    assert f"tile {64 * row.num_consumers}x{row.block_n}, {row.num_consumers} consumer warpgroups" in text
    assert f": {row.reason}\n" in text
    assert ("own output staging" in text, "ping-pong" in text) == (row.out_chunks > 0, row.ping_pong)
    assert ("lazy rescaling" in text) == row.lazy_rescale
    assert (f"{row.eighths_before_wait}/8 of the exponentials" in text) == (row.eighths_before_wait > 0)
    assert f"forward_sm90 [sm_90a]: grid {plan.steps[0].grid}, {row.threads} threads" in text
    assert "1 blocks per SM" in text
