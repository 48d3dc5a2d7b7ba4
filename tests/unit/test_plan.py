"""From a problem and a named device to launches: no GPU needed, and none asked for."""

from __future__ import annotations

import itertools

import pytest

from cuflash.device import MB, DeviceInfo
from cuflash.plan import KernelSpec
from cuflash.planner import plan_backward, plan_forward
from cuflash.problem import Problem, View
from cuflash.tiles import ANY

HOPPER = DeviceInfo.named("sm_90a")
# Plans of the portable kernels, unless a test asks for others: they run everything everywhere.


def problem_of(
    seqlen_q: int = 1000,
    seqlen_k: int = 1000,
    *,
    batch: int = 2,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    operands: dict[str, View] | None = None,
    **keywords: object,
) -> Problem:
    head_dim_v = head_dim_v or head_dim
    views = {
        "q": View.of((batch, seqlen_q, heads, head_dim), "bfloat16"),
        "k": View.of((batch, seqlen_k, kv_heads, head_dim), "bfloat16"),
        "v": View.of((batch, seqlen_k, kv_heads, head_dim_v), "bfloat16"),
    }
    return Problem.build(views | (operands or {}), **{"kernels": "sm80"} | keywords)


def config_of(plan, entry: str) -> dict[str, object]:
    (spec,) = (step.spec for step in plan.steps if step.spec.entry == entry)
    return {name: value for name, _, value in spec.config}


def entries(plan) -> list[str]:
    return [step.spec.entry for step in plan.steps]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"])
def test_grids(arch):
    problem, device = problem_of(1000, 777, kv_heads=2), DeviceInfo.named(arch)
    forward, backward = plan_forward(problem, device), plan_backward(problem, device)
    assert [step.grid for step in forward.steps] == [-(-1000 // forward.tile.block_m) * 8 * 2]
    q_grid, k_grid = -(-1000 // backward.tile.block_m) * 8 * 2, -(-777 // backward.tile.block_n) * 2 * 2
    assert [(step.spec.entry, step.grid) for step in backward.steps] == [
        ("backward_prepare", q_grid),
        ("backward_sm80", k_grid),
        ("backward_finish", q_grid),
    ]
    assert {step.spec.arch for step in (*forward.steps, *backward.steps)} == {arch.removesuffix("a")}


def test_sinks_have_a_kernel_of_their_own_in_the_backward():
    problem = problem_of(operands={"sinks": View.of((8,), "float32")})
    assert entries(plan_forward(problem, HOPPER)) == ["forward_sm80"]
    assert config_of(plan_forward(problem, HOPPER), "forward_sm80")["sinks"] is True
    step = plan_backward(problem, HOPPER).steps[-1]
    assert (step.spec.entry, step.grid, step.threads, step.shared_bytes) == ("backward_sinks", 8, 256, 32)


@pytest.mark.parametrize(
    ("lengths", "forward", "backward"),
    [
        ((0, 100), [], ["backward_sm80", "backward_sinks"]),
        ((100, 0), ["forward_sm80"], ["backward_prepare", "backward_finish", "backward_sinks"]),
        ((0, 0), [], ["backward_sinks"]),
    ],
)
def test_empty_grids_are_not_launched(lengths, forward, backward):
    problem = problem_of(*lengths, operands={"sinks": View.of((8,), "float32")})
    assert entries(plan_forward(problem, HOPPER)) == forward
    assert entries(plan_backward(problem, HOPPER)) == backward


def test_empty_batch_launches_nothing_but_sums_of_nothing():
    assert entries(plan_forward(problem_of(batch=0), HOPPER)) == []
    assert entries(plan_backward(problem_of(batch=0), HOPPER)) == []
    sinks = problem_of(batch=0, operands={"sinks": View.of((8,), "float32")})
    assert entries(plan_backward(sinks, HOPPER)) == ["backward_sinks"]


def test_workspace():
    plan = plan_backward(problem_of(1000, head_dim=40, deterministic=True), HOPPER)
    rows = plan.padded_seqlen_q
    assert rows % plan.tile.block_m == 0
    assert 1000 <= rows < 1000 + plan.tile.block_m
    assert plan.workspace == {
        "row_lse": ((2, 8, rows), "float32"),
        "row_delta": ((2, 8, rows), "float32"),
        "dq_accum": ((2, 8, rows, 64), "float32"),
        "dq_turn": ((2, 8, rows // plan.tile.block_m), "int32"),
    }
    assert "dq_turn" not in plan_backward(problem_of(1000), HOPPER).workspace
    assert plan_forward(problem_of(), HOPPER).workspace == {}


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, {}),
        ({"causal": True}, {"window_right": True}),
        ({"window_size": (5, None)}, {"window_left": True}),
        ({"window_size": (5, 5)}, {"window_left": True, "window_right": True}),
        ({"softcap": 3.0}, {"softcap": True, "scale_first": True}),
        ({"softmax_scale": -1.0}, {"scale_first": True}),
        ({"softmax_scale": 0.0}, {"scale_first": True}),
        ({"dropout_p": 0.5}, {"dropout": True}),
        ({"operands": {"alibi_slopes": View.of((8,), "float32")}}, {"alibi": True, "scale_first": True}),
    ],
)
@pytest.mark.parametrize(("plan", "entry"), [(plan_forward, "forward_sm80"), (plan_backward, "backward_sm80")])
def test_features_of_the_main_kernels(plan, entry, keywords, expected):
    config = config_of(plan(problem_of(**keywords), HOPPER), entry)
    flags = ("window_left", "window_right", "softcap", "alibi", "dropout", "scale_first")
    assert {name: config[name] for name in flags} == dict.fromkeys(flags, False) | expected


def test_kernels_that_ignore_a_feature_are_shared():
    plain = plan_backward(problem_of(), HOPPER)
    masked = plan_backward(problem_of(causal=True, softmax_scale=0.3), HOPPER)
    assert plain.steps[0].spec == masked.steps[0].spec
    assert plain.steps[1].spec != masked.steps[1].spec
    assert plain.steps[2].spec == masked.steps[2].spec


def test_values_of_arguments_are_not_compiled_in():
    specs = {
        plan_forward(problem_of(seqlen, causal=True, dropout_p=p, seed=seed, softcap=cap), HOPPER).steps[0].spec
        for seqlen, p, seed, cap in itertools.product((1, 999), (0.1, 0.2), (0, 7), (1.0, 30.0))
    }
    assert len(specs) == 1


def aligned(shape: tuple[int, ...], strides: tuple[int, ...], pointer: int = 0) -> View:
    return View(pointer, shape, strides, "bfloat16")


@pytest.mark.parametrize(
    ("head_dim", "q", "width"),
    [
        (64, None, 16),
        (40, None, 16),
        (60, None, 8),
        (58, None, 4),
        (59, None, 2),
        (64, aligned((2, 1000, 8, 64), (512_000, 512, 64, 1), pointer=8), 8),
        (64, aligned((2, 1000, 8, 64), (512_002, 512, 64, 1)), 4),
        (60, aligned((2, 1000, 8, 60), (512_000, 512, 64, 1)), 8),  # rows on 16 bytes that end between two
    ],
)
def test_width_of_loads(head_dim, q, width):
    problem = problem_of(head_dim=head_dim, operands={"q": q} if q else {})
    assert config_of(plan_forward(problem, HOPPER), "forward_sm80")["load_bytes"] == width
    assert config_of(plan_backward(problem, HOPPER), "backward_sm80")["load_bytes"] == width


def test_arrays_of_each_pass_decide_its_widths():
    shape, odd = (2, 1000, 8, 64), aligned((2, 1000, 8, 64), (512_000, 512, 64, 1), pointer=2)
    given_out = problem_of(operands={"out": odd})
    config = config_of(plan_forward(given_out, HOPPER), "forward_sm80")
    assert (config["load_bytes"], config["store_bytes"]) == (16, 2)
    backward = problem_of(operands={"out": odd, "dout": View.of(shape, "bfloat16")})
    config = config_of(plan_backward(backward, HOPPER), "backward_sm80")
    assert (config["load_bytes"], config["store_bytes"]) == (2, 16)


def test_head_dims_are_rounded_each_for_itself():
    config = config_of(plan_forward(problem_of(head_dim=59, head_dim_v=130), HOPPER), "forward_sm80")
    assert (config["head_dim"], config["head_dim_v"]) == (64, 160)


def test_demanding_features_choose_smaller_tiles():
    tiles = [
        plan_forward(problem_of(head_dim=128, **keywords), HOPPER).tile
        for keywords in ({}, {"causal": True}, {"dropout_p": 0.1}, {"dropout_p": 0.1, "softcap": 5.0})
    ]
    areas = [tile.block_m * tile.block_n for tile in tiles]
    assert areas[0] == areas[1] > areas[2]
    assert [tile.extras for tile in tiles] == [0, 0, 1, ANY]


def brute_force_pairs(problem: Problem) -> int:
    mask, lengths = problem.mask, (problem.layout.seqlen_q, problem.layout.seqlen_k)
    offset = mask.offset(*lengths)
    return sum(
        (mask.left is None or j >= i + offset - mask.left) and (mask.right is None or j <= i + offset + mask.right)
        for i, j in itertools.product(*map(range, lengths))
    )


@pytest.mark.parametrize("lengths", [(1, 1), (7, 13), (13, 7), (13, 13), (0, 5), (5, 0)])
@pytest.mark.parametrize("causal", [False, True, "top_left"])
@pytest.mark.parametrize("window", [None, (0, 0), (3, None), (None, 2), (4, 1), (100, 100)])
def test_flops_count_visible_pairs(lengths, causal, window):
    problem = problem_of(*lengths, causal=causal, window_size=window)
    flops_per_pair = 2 * (problem.head_dim + problem.head_dim_v) * problem.num_heads * problem.layout.batch
    assert plan_forward(problem, HOPPER).flops == brute_force_pairs(problem) * flops_per_pair


def test_flops_follow_the_conventions_of_the_field():
    problem = problem_of(512, 512, batch=2, heads=8, head_dim=128)
    forward, backward = plan_forward(problem, HOPPER), plan_backward(problem, HOPPER)
    assert forward.flops == 4 * 2 * 8 * 512 * 512 * 128
    assert backward.flops == 2.5 * forward.flops


@pytest.mark.parametrize(
    ("kv_heads", "seqlen", "heads"),
    [
        (8, 1000, 16),  # all 2 x 8 pairs fit
        (8, 16384, 4),  # 4 MB a head in 16 MB
        (2, 16384, 4 * 4),  # a group of four heads shares one; there are four
        (8, 1 << 20, 1),  # one does not fit, and is worked on alone
    ],
)
def test_sections_of_the_forward_fit_in_l2(kv_heads, seqlen, heads):
    plan = plan_forward(problem_of(seqlen, seqlen, kv_heads=kv_heads), HOPPER)
    assert plan.section_heads == heads
    pairs = plan.section_heads // plan.problem.group_size
    assert pairs == 1 or pairs * seqlen * 2 * 64 * 2 <= 16 * MB


def test_sections_of_a_small_cache_are_small():
    assert plan_forward(problem_of(16384, 16384), DeviceInfo.named("sm_86")).section_heads == 1


def test_sections_of_the_backward_count_kv_heads():
    assert plan_backward(problem_of(16384, 16384, kv_heads=2), HOPPER).section_heads == 1
    assert plan_backward(problem_of(1024, 1024, kv_heads=2), HOPPER).section_heads == 4


def test_floor_is_arithmetic_or_traffic():
    long, short = plan_forward(problem_of(16384, 16384), HOPPER), plan_forward(problem_of(1, 16384), HOPPER)
    assert long.floor_us() == pytest.approx(1e6 * long.flops / HOPPER.flops)
    assert short.floor_us() == pytest.approx(1e6 * short.bytes / HOPPER.bandwidth)


def test_explain_names_what_will_run():
    plan = plan_backward(problem_of(head_dim=128, causal=True), HOPPER)
    text = plan.explain({"backward_sm80": 255})
    assert f"tile {plan.tile.block_m}x{plan.tile.block_n}" in text
    assert plan.tile.reason in text
    for step in plan.steps:
        assert f"{step.spec.entry} [sm_90]: grid {step.grid}, {step.threads} threads" in text
    assert "255 registers, 1 blocks per SM" in text
    assert "floor " in text


def test_plans_are_values():
    plan = plan_forward(problem_of(), HOPPER)
    assert plan == plan_forward(problem_of(), HOPPER)
    spec = plan.steps[0].spec
    assert {spec: 1}[KernelSpec(spec.source, spec.entry, spec.config, spec.arch)] == 1
