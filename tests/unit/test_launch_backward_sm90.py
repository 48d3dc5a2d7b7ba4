"""What the kernels of the Hopper backward are handed: the whole struct or its common part, and tensor maps in boxes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_driver import addressed, driver, launch_on  # noqa: F401 - a fixture

from cuflash.cuda import launch
from cuflash.device import DeviceInfo
from cuflash.planner import plan_backward
from cuflash.problem import Problem, View

HOPPER = DeviceInfo.named("sm_90a")
BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS = 2, 100, 300, 4, 2
WORKSPACE = 1 << 40
ROWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
MAPS = ("q", "k", "v", "dout", "dk", "dv")
RESULTS = ("dq", "dk", "dv", "dsinks")
COMMON_OFFSET = 6 * 128  # behind six tensor maps


def array(*shape: int, dtype: str = "bfloat16") -> View:
    return View.of(shape, dtype, ("cuda", 0))


def views_of(head_dim: int = 64, head_dim_v: int = 64, **operands: View) -> dict[str, View]:
    q, out = array(BATCH, SEQLEN_Q, HEADS, head_dim), array(BATCH, SEQLEN_Q, HEADS, head_dim_v)
    k, v = array(BATCH, SEQLEN_K, KV_HEADS, head_dim), array(BATCH, SEQLEN_K, KV_HEADS, head_dim_v)
    shapes = {"q": q, "k": k, "v": v, "out": out, "dout": out, "dq": q, "dk": k, "dv": v}
    views = {name: replace(view) for name, view in shapes.items()}
    views["lse"] = array(BATCH, HEADS, SEQLEN_Q, dtype="float32")
    return addressed(views | operands)


def plan_of(views: dict[str, View], **keywords: object):
    inputs = {name: view for name, view in views.items() if name not in RESULTS}
    return plan_backward(Problem.build(inputs, **{"kernels": "sm90"} | keywords), HOPPER)


def launched_by(driver, views: dict[str, View], **keywords: object):  # noqa: F811
    """The plan of a call, and what its kernels were launched with, by entry point."""
    plan = plan_of(views, **keywords)
    launch_on(launch.Launch(plan, 0), views, WORKSPACE, stream=3)
    return plan, {launched.entry: launched for launched in driver.launched}


def common_of(launched) -> np.void:
    """The part of the struct that the kernels around the main one take, as one of them got it."""
    return np.frombuffer(launched.parameters, launch.BACKWARD_PARAMS)[0]


def maps_of(launched) -> dict[str, tuple[int, int]]:
    """Address and rows of a box of each map, as `FakeDriver.encode_tiled` wrote them."""
    whole = np.frombuffer(launched.parameters, launch.BACKWARD_SM90_PARAMS)[0]
    return {name: tuple(np.frombuffer(whole[name].tobytes(), np.uint64)[:2].tolist()) for name in MAPS}


def test_main_kernel_takes_the_whole_struct_and_the_others_its_common_part(driver):  # noqa: F811
    extra = {"sinks": array(HEADS, dtype="float32"), "dsinks": array(HEADS, dtype="float32")}
    plan, launched = launched_by(driver, views_of(**extra))
    assert list(launched) == ["backward_prepare", "backward_sm90", "backward_sinks"]
    assert launch.BACKWARD_SM90_PARAMS.fields["common"][1] == COMMON_OFFSET
    whole = launched["backward_sm90"].parameters
    assert len(whole) == launch.BACKWARD_SM90_PARAMS.itemsize
    common = whole[COMMON_OFFSET : COMMON_OFFSET + launch.BACKWARD_PARAMS.itemsize]
    for entry in ("backward_prepare", "backward_sinks"):
        assert launched[entry].parameters == common, entry
    assert set(whole[COMMON_OFFSET + len(common) :]) <= {0}


def test_each_kernel_is_launched_as_planned(driver):  # noqa: F811
    plan, launched = launched_by(driver, views_of(), causal=True)
    for step in plan.steps:
        found = launched[step.spec.entry]
        assert (found.grid, found.threads, found.shared_bytes) == (step.grid, step.threads, step.shared_bytes)
        assert found.stream == 3
    by_entry = {driver.entries[handle - 1]: size for handle, size in driver.opted_in.items()}
    assert by_entry == {step.spec.entry: step.shared_bytes for step in plan.steps if step.shared_bytes}
    assert by_entry["backward_sm90"] > 48 * 1024


def test_every_kernel_finds_every_address(driver):  # noqa: F811
    extra = {
        "dlse": array(BATCH, HEADS, SEQLEN_Q, dtype="float32"),
        "alibi_slopes": array(BATCH, HEADS, dtype="float32"),
        "sinks": array(HEADS, dtype="float32"),
        "dsinks": array(HEADS, dtype="float32"),
    }
    views = views_of(**extra)
    plan, launched = launched_by(driver, views, deterministic=True)
    params = common_of(launched["backward_prepare"])
    for name in ROWS:
        assert params[name].item() == (views[name].pointer, *views[name].strides[:3])
    for name in ("lse", "dlse", "dsinks"):
        assert params[name] == views[name].pointer
    for name in ("alibi_slopes", "sinks"):
        assert params["score"][name] == views[name].pointer
    assert params["padded_seqlen_q"] == plan.padded_seqlen_q == 128


def test_constants_describe_the_problem():
    views = views_of(64, 40, alibi_slopes=array(BATCH, HEADS, dtype="float32"))
    plan = plan_of(views, window_size=(7, 3), softmax_scale=-0.25)
    params = np.frombuffer(launch.constants(plan), launch.BACKWARD_SM90_PARAMS)[0]["common"]
    shape, score = params["shape"], params["score"]
    assert [shape[name] for name in ("batch", "num_heads", "num_kv_heads", "group_size")] == [2, 4, 2, 2]
    assert [shape[name] for name in ("seqlen_q", "seqlen_k", "head_dim", "head_dim_v")] == [100, 300, 64, 40]
    assert [shape[name] for name in ("window_left", "window_right", "top_left")] == [7, 3, 0]
    assert shape["section_heads"] == plan.section_heads
    assert (score["scale"], score["softcap"], score["alibi_batch_stride"]) == (-0.25, 0.0, HEADS)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(64, 64), (40, 64), (128, 128), (64, 128), (72, 8)])
def test_maps_have_boxes_of_what_a_warpgroup_or_a_block_moves(driver, head_dim, head_dim_v):  # noqa: F811
    """Operands are loaded by blocks of queries or of 128 keys; each warpgroup stores its own 64 rows of dk and dv."""
    views = views_of(head_dim, head_dim_v)
    _, launched = launched_by(driver, views)
    block_m = 64 if max(head_dim, head_dim_v) > 64 else 128
    rows = {"q": block_m, "dout": block_m, "k": 128, "v": 128, "dk": 64, "dv": 64}
    assert maps_of(launched["backward_sm90"]) == {name: (views[name].pointer, rows[name]) for name in MAPS}
    assert sorted(driver.encoded) == sorted((views[name].pointer, rows[name]) for name in MAPS)


def test_workspace_is_parted_without_overlap(driver):  # noqa: F811
    plan = plan_of(views_of())
    prepared = launch.Launch(plan, 0)
    launch_on(prepared, views_of(), WORKSPACE)
    params = common_of(driver.launched[0])
    parts = sorted((int(params[name]), 4 * math.prod(shape)) for name, (shape, _) in plan.workspace.items())
    names = ("row_lse", "row_delta", "dq_accum", "dq_done", "dq_turn")
    assert [name for name in names if params[name]] == list(plan.workspace)
    ends = [start for start, _ in parts[1:]] + [WORKSPACE + 4 * prepared.workspace_floats]
    assert parts[0][0] == WORKSPACE
    for (start, size), end in zip(parts, ends, strict=True):
        assert start % 256 == 0, "bulk copies and reductions take multiples of 16 bytes"
        assert start + size <= end


def test_what_a_call_lacks_is_null(driver):  # noqa: F811
    _, launched = launched_by(driver, views_of())
    params = common_of(launched["backward_prepare"])
    assert [int(params[name]) for name in ("dkv_accum", "dlse", "dsinks")] == [0, 0, 0]


def test_moved_arrays_get_new_maps_and_what_stayed_keeps_its_own(driver):  # noqa: F811
    views = views_of()
    prepared = launch.Launch(plan_of(views), 0)
    for shift in (0, 4096, 0):
        moved = replace(views["dout"], pointer=views["dout"].pointer + shift)
        launch_on(prepared, views | {"dout": moved}, WORKSPACE)
        main = next(one for one in reversed(driver.launched) if one.entry == "backward_sm90")
        prepare = next(one for one in reversed(driver.launched) if one.entry == "backward_prepare")
        assert maps_of(main)["dout"][0] == common_of(prepare)["dout"]["data"] == moved.pointer
    assert len(driver.encoded) == len(MAPS) + 1


def test_strided_gradients_are_addressed_by_their_strides(driver, monkeypatch):  # noqa: F811
    """dout of another order than the results': its map and its rows say the same."""
    strides = (HEADS * SEQLEN_Q * 64, 64, SEQLEN_Q * 64, 1)
    views = views_of(dout=View(0, (BATCH, SEQLEN_Q, HEADS, 64), strides, "bfloat16", ("cuda", 0)))
    encoded, genuine = {}, driver.encode_tiled

    def encode_tiled(address, dtype, rank, pointer, sizes, strides, box, *rest):
        encoded[pointer] = (list(sizes), list(strides))
        return genuine(address, dtype, rank, pointer, sizes, strides, box, *rest)

    monkeypatch.setattr(launch.tensor_map, "_encode_tiled", lambda: encode_tiled)
    _, launched = launched_by(driver, views)
    assert encoded[views["dout"].pointer] == ([64, SEQLEN_Q, HEADS, BATCH], [128, SEQLEN_Q * 128, 2 * strides[0]])
    assert encoded[views["dk"].pointer][0] == [64, SEQLEN_K, KV_HEADS, BATCH]
    assert common_of(launched["backward_prepare"])["dout"].item()[1:] == strides[:3]


def test_each_of_two_kernels_finds_its_own_maps(driver):  # noqa: F811
    """The kernel of dq takes all, with maps of its own in front; the one of dk and dv what is behind them."""
    views = views_of(256, 192)
    plan, launched = launched_by(driver, views)
    assert list(launched) == ["backward_prepare", "backward_queries_sm90", "backward_keys_sm90"]
    whole, rest = (launched[entry].parameters for entry in list(launched)[1:])
    assert len(whole) == launch.BACKWARD_QUERIES_SM90_PARAMS.itemsize == 5 * 128 + len(rest)
    assert whole[5 * 128 :] == rest
    common = rest[COMMON_OFFSET : COMMON_OFFSET + launch.BACKWARD_PARAMS.itemsize]
    assert common == launched["backward_prepare"].parameters
    read = np.frombuffer(whole, launch.BACKWARD_QUERIES_SM90_PARAMS)[0]
    for step, params in zip(plan.steps[1:], (read, read["rest"]), strict=True):
        found = {name: np.frombuffer(params[name].tobytes(), np.uint64)[:2].tolist() for name, _ in step.boxes}
        assert found == {name: [views[name].pointer, rows] for name, rows in step.boxes}
    assert len(driver.encoded) == 11


def test_the_struct_has_room_for_maps_and_common_part():
    assert launch.PARAMS["backward_sm90"] is launch.BACKWARD_SM90_PARAMS
    assert len(launch.constants(plan_of(views_of()))) == launch.BACKWARD_SM90_PARAMS.itemsize


@pytest.mark.parametrize(
    ("shapes", "entries"),
    [
        ({"seqlen_q": 0}, ["backward_sm80"]),  # dk = dv = 0 are to be written
        ({"seqlen_k": 0}, ["backward_prepare", "backward_finish"]),  # dq = 0
        ({"batch": 0}, []),
    ],
    ids=["no queries", "no keys", "no batch"],
)
def test_without_elements_nothing_of_hopper_is_launched(driver, shapes, entries):  # noqa: F811
    sizes = {"batch": BATCH, "seqlen_q": SEQLEN_Q, "seqlen_k": SEQLEN_K} | shapes
    q = array(sizes["batch"], sizes["seqlen_q"], HEADS, 64)
    k = array(sizes["batch"], sizes["seqlen_k"], KV_HEADS, 64)
    views = {"q": q, "k": k, "v": k, "out": q, "dout": q, "dq": q, "dk": k, "dv": k}
    views = {name: replace(view) for name, view in views.items()}
    views["lse"] = array(sizes["batch"], HEADS, sizes["seqlen_q"], dtype="float32")
    _, launched = launched_by(driver, addressed(views), kernels=None)
    assert list(launched) == entries
    assert driver.encoded == []
    assert {len(one.parameters) for one in launched.values()} <= {launch.BACKWARD_PARAMS.itemsize}
