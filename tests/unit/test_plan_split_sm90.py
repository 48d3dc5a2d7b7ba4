"""When Hopper's backward leaves dq to a kernel of its own: repeatable sums, and head dimensions over 128."""

from __future__ import annotations

import pytest
from test_plan_backward_sm90 import (
    BATCH,
    HEADS,
    HOPPER,
    LENGTHS,
    SHARED,
    SINKS,
    SLOPES,
    config_of,
    entries,
    problem_of,
)

from cuflash.planner import plan_backward
from cuflash.tiles_sm90 import backward_row, queries_row

WIDE = ["backward_prepare", "backward_queries_sm90", "backward_keys_sm90"]
REPEATABLE = ["backward_prepare", "backward_queries_sm90", "backward_sm90"]
# Every multiple of 8 against the smallest, the largest, and those around which the kernels change.
HEAD_DIMS_V = (8, 64, 128, 136, 192, 200, 256)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_head_dim_has_steps_that_fit(head_dim, deterministic):
    for head_dim_v in HEAD_DIMS_V:
        plan = plan_backward(problem_of(head_dim, head_dim_v, deterministic=deterministic), HOPPER)
        wide = max(head_dim, head_dim_v) > 128
        assert plan.tile.split is (wide or deterministic)
        if not plan.tile.split:
            continue
        prepare, queries, keys = plan.steps
        assert entries(plan) == (WIDE if wide else REPEATABLE)
        assert plan.main_entry == "backward_queries_sm90"
        query_blocks, key_blocks = 8, 16 if wide else 8
        grids = [blocks * HEADS * BATCH for blocks in (query_blocks, query_blocks, key_blocks)]
        assert [step.grid for step in plan.steps] == grids
        assert [step.threads for step in plan.steps] == [256, 384, 384]
        assert prepare.shared_bytes == 0
        assert max(queries.shared_bytes, keys.shared_bytes) <= SHARED
        assert [step.spec.arch for step in plan.steps] == ["sm_90", "sm_90a", "sm_90a"]


def test_shared_memory_is_what_the_kernels_lay_out():
    """The layouts at the top of the kernels, counted by hand."""
    queries, keys = plan_backward(problem_of(192, 128), HOPPER).steps[1:]
    rows, block = 128 * (192 + 128) * 2, 80 * (192 + 128) * 2
    assert queries.shared_bytes == rows + 2 * block + 8 * 2 * (1 + 2 + 2)
    block, probabilities, statistics = 64 * (192 + 128) * 2, 64 * 64 * 4, 2 * 64 * 4
    assert keys.shared_bytes == 3 * block + 2 * (probabilities + statistics) + 8 * 2 * (1 + 2 + 2)
    one_stage = plan_backward(problem_of(256, 256), HOPPER).steps[1]
    assert one_stage.shared_bytes == 2 * 128 * 256 * 2 + 3 * 64 * 256 * 2 + 8 * 2 * (1 + 2 + 1)


@pytest.mark.parametrize(("head_dim", "deterministic"), [(64, True), (128, True), (256, False)])
@pytest.mark.parametrize(("seqlen_q", "padded"), [(1, 128), (128, 128), (129, 256), (1000, 1024)])
def test_workspace_is_two_values_a_row(head_dim, deterministic, seqlen_q, padded):
    plan = plan_backward(problem_of(head_dim, head_dim, seqlen_q=seqlen_q, deterministic=deterministic), HOPPER)
    rows = (BATCH, HEADS, padded)
    assert plan.padded_seqlen_q == padded
    assert plan.workspace == {"row_lse": (rows, "float32"), "row_delta": (rows, "float32")}


def test_repeatable_sums_cost_nothing_where_dq_has_its_own_kernel_anyway():
    plans = [plan_backward(problem_of(192, 128, deterministic=flag), HOPPER) for flag in (False, True)]
    assert plans[0].steps == plans[1].steps


def test_kernel_of_dk_and_dv_leaves_dq_alone():
    alone = plan_backward(problem_of(deterministic=True), HOPPER).steps
    together = plan_backward(problem_of(), HOPPER).steps
    assert [config_of(step).get("with_dq") for step in alone] == [False, None, False]
    assert [config_of(step).get("with_dq") for step in together] == [True, True]
    assert alone[2].shared_bytes < together[1].shared_bytes


def test_each_kernel_moves_boxes_of_its_own_tiles():
    _, queries, keys = plan_backward(problem_of(256, 256), HOPPER).steps
    assert dict(queries.boxes) == {"q": 128, "k": 64, "v": 64, "dout": 128, "dq": 64}
    assert dict(keys.boxes) == {"q": 64, "k": 64, "v": 64, "dout": 64, "dk": 64, "dv": 64}
    keys = plan_backward(problem_of(64, 64, deterministic=True), HOPPER).steps[2]
    assert dict(keys.boxes) == {"q": 128, "k": 128, "v": 128, "dout": 128, "dk": 64, "dv": 64}


FLAGS = ("window_left", "window_right", "scale_first", "softcap", "alibi", "dropout")


@pytest.mark.parametrize(
    ("keywords", "on"),
    [
        ({}, set()),
        ({"causal": True}, {"window_right"}),
        ({"window_size": (5, 7)}, {"window_left", "window_right"}),
        ({"operands": SLOPES}, {"alibi", "scale_first"}),
        ({"operands": SINKS}, set()),
        ({"softcap": 5.0}, {"softcap", "scale_first"}),
        ({"dropout_p": 0.1}, {"dropout"}),
        ({"deterministic": True}, set()),
    ],
)
def test_features_are_compiled_into_both_kernels(keywords, on):
    plan = plan_backward(problem_of(256, 192, **keywords), HOPPER)
    assert entries(plan)[:3] == WIDE
    for step in plan.steps[1:3]:
        assert {name for name in FLAGS if config_of(step)[name]} == on


def test_kernels_know_the_padding_that_they_read():
    """Absent keys meet only dq's products, absent queries those of dk and dv, and dq's own rows."""
    lengths = {"seqused_q": LENGTHS, "seqused_k": LENGTHS}
    _, queries, keys = plan_backward(problem_of(256, 192, operands=lengths), HOPPER).steps
    assert config_of(queries)["used_queries"] and config_of(queries)["used_keys"]
    assert config_of(keys)["used_queries"] and "used_keys" not in config_of(keys)


def test_sinks_take_a_step_of_their_own():
    plan = plan_backward(problem_of(256, 256, operands=SINKS), HOPPER)
    assert entries(plan) == [*WIDE, "backward_sinks"]


def test_head_dims_are_compiled_for_in_steps_of_32():
    for step in plan_backward(problem_of(136, 40), HOPPER).steps[1:]:
        assert (config_of(step)["head_dim"], config_of(step)["head_dim_v"]) == (160, 64)


def test_explain_shows_both_rows():
    plan = plan_backward(problem_of(256, 256), HOPPER)
    keys, queries = backward_row(256, 256, split=False), queries_row(256, 256, extras=0)
    text = plan.explain()
    assert f"  tile {keys.describe()}: {keys.reason}\n" in text
    assert f"  tile of dq {queries.describe()}: {queries.reason}\n" in text


def test_heads_of_a_section_have_no_float32_dq():
    """A section of 32 MB: q and dout of a head take 4 MB here, and the accumulator of dq would take as much again."""
    sizes = {"batch": 4, "seqlen_q": 8192}
    fused, split = (
        plan_backward(problem_of(128, 128, deterministic=flag, **sizes), HOPPER) for flag in (False, True)
    )
    assert (fused.section_heads, split.section_heads) == (4, 8)
