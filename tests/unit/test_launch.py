"""Parameter structs: the same bytes on both sides of the compiler, the right address in every field, one per call."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_driver import COUNTERS, backward_views, driver, forward_views, launch_on  # noqa: F401 - a fixture

from cuflash.cuda import launch
from cuflash.cuda.source import kernels_folder
from cuflash.device import DeviceInfo
from cuflash.dropout import Dropout
from cuflash.planner import plan_backward, plan_forward
from cuflash.problem import Problem, View

HOPPER = DeviceInfo.named("sm_90a")


def fields(params: np.dtype, prefix: str = ""):
    """Dotted name, offset and size of every scalar, nested structs included, without the padding at a struct's end."""
    for name in params.names:
        dtype, offset = params.fields[name][:2]
        if name == "padding":
            continue
        if dtype.names:
            yield from ((inner, offset + at, size) for inner, at, size in fields(dtype, f"{prefix}{name}."))
        else:
            yield f"{prefix}{name}", offset, dtype.itemsize


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to lay out the structs of params.cuh")
def test_structs_are_laid_out_as_in_cpp(tmp_path):
    lines = []
    for struct, dtype in launch.STRUCTS.items():
        lines.append(f'std::printf("{struct} - %zu %zu\\n", sizeof({struct}), alignof({struct}));')
        for name, _, _ in fields(dtype):
            offset, size = f"offsetof({struct}, {name})", f"sizeof((({struct}*)0)->{name})"
            lines.append(f'std::printf("{struct} {name} %zu %zu\\n", {offset}, {size});')
    program = tmp_path / "offsets.cpp"
    program.write_text(
        "#include <algorithm>\n#include <cstddef>\n#include <cstdio>\n"
        + f'#include "{kernels_folder() / "params.cuh"}"\n'
        + "int main() {\n"
        + "\n".join(lines)
        + "\n}\n"
    )
    binary = tmp_path / "offsets"
    subprocess.run(["g++", "-std=c++17", "-Wno-invalid-offsetof", str(program), "-o", str(binary)], check=True)
    printed = subprocess.run([str(binary)], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = []
    for struct, dtype in launch.STRUCTS.items():
        # NumPy aligns maps, which are bytes to it, by where they are placed and by the padding behind them.
        has_maps = launch.TENSOR_MAP in (field[0] for field in dtype.fields.values())
        alignment = launch.tensor_map.ALIGNMENT if has_maps else dtype.alignment
        expected.append(f"{struct} - {dtype.itemsize} {alignment}")
        expected += [f"{struct} {name} {offset} {size}" for name, offset, size in fields(dtype)]
    assert printed == expected


def test_structs_have_no_field_that_is_missing_here():
    text = re.sub(r"//.*", "", (kernels_folder() / "params.cuh").read_text())
    for struct, dtype in launch.STRUCTS.items():
        body = re.search(rf"struct (?:alignas\(\d+\) )?{struct} {{(.*?)}};", text, flags=re.DOTALL)[1]
        declarations = [re.sub(r"^(?:const )?\w+\*? ", "", line.strip()) for line in body.split(";") if line.strip()]
        names = [name.strip(" *") for line in declarations for name in line.split(",")]
        assert names == [name for name in dtype.names if name != "padding"], struct


def problem_of(views: dict[str, View], **keywords) -> Problem:
    results = ("dq", "dk", "dv", "dsinks")
    inputs = {name: view for name, view in views.items() if name not in results}
    return Problem.build(inputs, **{"kernels": "sm80"} | keywords)


def read(params: np.dtype, content: bytes) -> np.void:
    return np.frombuffer(content, params)[0]


def test_constants_describe_the_problem():
    views = forward_views(alibi_slopes=View.of((2, 4), "float32", ("cuda", 0)))
    problem = problem_of(views, window_size=(7, 3), softcap=5.0, softmax_scale=0.25, dropout_p=0.25)
    plan = plan_forward(problem, HOPPER)
    params = read(launch.FORWARD_PARAMS, launch.constants(plan))
    shape, score, dropout = params["shape"], params["score"], params["dropout"]
    assert [shape[name] for name in ("batch", "num_heads", "num_kv_heads", "group_size")] == [2, 4, 4, 1]
    assert [shape[name] for name in ("seqlen_q", "seqlen_k", "head_dim", "head_dim_v")] == [100, 100, 64, 64]
    assert [shape[name] for name in ("window_left", "window_right", "top_left")] == [7, 3, 0]
    assert shape["section_heads"] == plan.section_heads
    assert (score["scale"], score["softcap"], score["alibi_batch_stride"]) == (0.25, 5.0, 4)
    assert (dropout["threshold"], dropout["scale"]) == (16384, np.float32(4 / 3))


def test_slopes_of_all_batches_have_no_batch_stride():
    views = forward_views(alibi_slopes=View.of((4,), "float32", ("cuda", 0)))
    params = read(launch.FORWARD_PARAMS, launch.constants(plan_forward(problem_of(views), HOPPER)))
    assert params["score"]["alibi_batch_stride"] == 0


def test_forward_passes_every_address_and_stride(driver):  # noqa: F811
    views = forward_views(
        q=View(0, (2, 100, 4, 64), (51200, 64, 12800, 1), "bfloat16", ("cuda", 0)),
        alibi_slopes=View.of((4,), "float32", ("cuda", 0)),
        sinks=View.of((4,), "float32", ("cuda", 0)),
        seqused_q=View.of((2,), "int32", ("cuda", 0)),
        seqused_k=View.of((2,), "int32", ("cuda", 0)),
    )
    plan = plan_forward(problem_of(views), HOPPER)
    launch_on(launch.Launch(plan, 0), views, stream=5)
    (launched,) = driver.launched
    step = plan.steps[0]
    assert (launched.entry, launched.stream) == ("forward_sm80", 5)
    assert (launched.grid, launched.threads, launched.shared_bytes) == (step.grid, step.threads, step.shared_bytes)
    params = read(launch.FORWARD_PARAMS, launched.parameters)
    assert params["q"].item() == (views["q"].pointer, 51200, 64, 12800)
    for name in ("k", "v", "out"):
        assert params[name].item() == (views[name].pointer, 25600, 256, 64)
    found = [params["lse"], *params["shape"].item()[:2], *params["score"].item()[:2]]
    assert found == [views[name].pointer for name in ("lse", "seqused_q", "seqused_k", "alibi_slopes", "sinks")]


def test_backward_passes_every_address(driver):  # noqa: F811
    extra = {"sinks": View.of((4,), "float32", ("cuda", 0)), "dsinks": View.of((4,), "float32", ("cuda", 0))}
    views = backward_views(dlse=View.of((2, 4, 100), "float32", ("cuda", 0)), **extra)
    plan = plan_backward(problem_of(views, deterministic=True), HOPPER)
    prepared = launch.Launch(plan, 0)
    launch_on(prepared, views, 1 << 40)
    assert [launched.entry for launched in driver.launched] == [step.spec.entry for step in plan.steps]
    assert len({launched.parameters for launched in driver.launched}) == 1
    params = read(launch.BACKWARD_PARAMS, driver.launched[0].parameters)
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        assert params[name]["data"] == views[name].pointer
    for name in ("lse", "dlse", "dsinks"):
        assert params[name] == views[name].pointer
    assert params["padded_seqlen_q"] == plan.padded_seqlen_q
    ends = {int(params[name]): int(np.prod(shape)) * 4 for name, (shape, _) in plan.workspace.items()}
    for start, end in zip(sorted(ends), [*sorted(ends)[1:], (1 << 40) + 4 * prepared.workspace_floats], strict=True):
        assert start % 256 == 0
        assert start + ends[start] <= end, "parts of the workspace overlap"
    assert min(ends) == 1 << 40


def test_a_bound_launch_takes_other_addresses_at_every_call(driver):  # noqa: F811
    views = backward_views(dlse=View.of((2, 4, 100), "float32", ("cuda", 0)))
    for kernels, params in (("sm80", launch.BACKWARD_PARAMS), ("sm90", launch.BACKWARD_SM90_PARAMS)):
        bound = launch.Launch(plan_backward(problem_of(views, kernels=kernels), HOPPER), 0).bind(views)
        for shift in (0, 1 << 30, 1 << 31):
            pointers = {name: view.pointer + shift for name, view in views.items()}
            driver.launched.clear()
            bound(pointers, (1 << 40) + shift, None, 0)
            (main,) = [launched for launched in driver.launched if launched.entry == f"backward_{kernels}"]
            content = read(params, main.parameters)
            found = content["common"] if kernels == "sm90" else content
            assert {name: found[name]["data"] for name in ("q", "k", "v", "dout", "dq", "dk", "dv")} == {
                name: pointers[name] for name in ("q", "k", "v", "dout", "dq", "dk", "dv")
            }
            assert (found["lse"], found["dlse"]) == (pointers["lse"], pointers["dlse"])
            assert found["row_lse"] == (1 << 40) + shift
            if kernels == "sm90":
                maps = maps_in(params, main)
                assert {name: pointer for name, (pointer, _) in maps.items()} == {name: pointers[name] for name in maps}


def test_what_one_call_brought_does_not_stay_for_the_next(driver):  # noqa: F811
    views = forward_views()
    prepared = launch.Launch(plan_forward(problem_of(views), HOPPER), 0)
    launch_on(prepared, views)
    launch_on(prepared, {name: view for name, view in views.items() if name != "lse"})
    with_lse, without = (read(launch.FORWARD_PARAMS, launched.parameters) for launched in driver.launched)
    assert with_lse["lse"] == views["lse"].pointer
    assert without["lse"] == 0


def test_seed_belongs_to_the_call(driver):  # noqa: F811
    views = forward_views()
    prepared = launch.Launch(plan_forward(problem_of(views, dropout_p=0.5), HOPPER), 0)
    for seed, offset in ((0x1122334455667788, 9), ((1 << 64) - 1, (1 << 32) - 1), (0, 0)):
        launch_on(prepared, views, dropout=Dropout(0.5, seed, offset))
        key = read(launch.FORWARD_PARAMS, driver.launched[-1].parameters)["dropout"]
        assert int(key["seed_low"]) | int(key["seed_high"]) << 32 == seed
        assert (key["offset"], key["threshold"], key["scale"]) == (offset, 32768, 2.0)


def test_negative_strides(driver):  # noqa: F811
    views = forward_views(k=View(0, (2, 100, 4, 64), (25600, -256, 64, 1), "bfloat16", ("cuda", 0)))
    launch_on(launch.Launch(plan_forward(problem_of(views), HOPPER), 0), views)
    assert read(launch.FORWARD_PARAMS, driver.launched[0].parameters)["k"]["row_stride"] == -256


def test_large_shared_memory_is_opted_in(driver):  # noqa: F811
    plan = plan_backward(problem_of(backward_views()), HOPPER)
    launch.Launch(plan, 0)
    by_entry = {driver.entries[handle - 1]: size for handle, size in driver.opted_in.items()}
    assert by_entry == {step.spec.entry: step.shared_bytes for step in plan.steps if step.shared_bytes}
    assert by_entry["backward_sm80"] > 48 * 1024


def test_thread_without_a_context_gets_one(driver):  # noqa: F811
    views = forward_views()
    prepared = launch.Launch(plan_forward(problem_of(views), HOPPER), 0)
    driver.has_context = False
    launch_on(prepared, views)
    assert driver.has_context


def test_calls_at_the_same_time_have_parameters_of_their_own(driver, monkeypatch):  # noqa: F811
    """The driver holds every call until all have patched their bytes: the lock is released at the worst moment."""
    threads, views, genuine = 4, forward_views(), driver.launchKernel
    prepared, barrier = launch.Launch(plan_forward(problem_of(views), HOPPER), 0), threading.Barrier(threads)
    bound = prepared.bind(views)

    def held(*arguments):
        barrier.wait(timeout=10)
        genuine(*arguments)

    monkeypatch.setattr(prepared, "_launch_kernel", held)
    pointers = {name: view.pointer for name, view in views.items()}
    own = [pointers | {"out": (number + 1) << 30} for number in range(threads)]
    workers = [threading.Thread(target=bound, args=(mine, 0, None, number)) for number, mine in enumerate(own)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    params = {launched.stream: read(launch.FORWARD_PARAMS, launched.parameters) for launched in driver.launched}
    out = {stream: int(content["out"]["data"]) for stream, content in params.items()}
    assert out == {number: (number + 1) << 30 for number in range(threads)}


@pytest.fixture
def hopper(driver):  # noqa: F811
    """A prepared Hopper forward of `forward_views`, and its plan."""
    plan = plan_forward(problem_of(forward_views(), kernels="sm90"), HOPPER)
    return launch.Launch(plan, 0), plan


def maps_in(params: np.dtype, launched) -> dict[str, tuple[int, int]]:
    """Address and rows of a box in each tensor map of a struct, as `FakeDriver.encode_tiled` wrote them."""
    content = read(params, launched.parameters)
    names = [name for name in params.names if params.fields[name][0] == launch.TENSOR_MAP]
    return {name: tuple(np.frombuffer(content[name].tobytes(), np.uint64)[:2].tolist()) for name in names}


def test_hopper_forward_passes_maps_counter_and_constants(driver, hopper):  # noqa: F811
    prepared, plan = hopper
    views, step, tile = forward_views(), plan.steps[0], plan.tile
    for stream in (3, 4, 3):
        launch_on(prepared, views, stream=stream)
    assert {(launched.entry, launched.grid, launched.threads) for launched in driver.launched} == {
        ("forward_sm90", step.grid, step.threads)
    }
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "out": 64}
    expected = {name: (views[name].pointer, rows) for name, rows in boxes.items()}
    for launched in driver.launched:
        params = read(launch.FORWARD_SM90_PARAMS, launched.parameters)
        assert maps_in(launch.FORWARD_SM90_PARAMS, launched) == expected
        assert (params["lse"], params["shape"]["seqlen_q"]) == (views["lse"].pointer, 100)
    counters = [read(launch.FORWARD_SM90_PARAMS, one.parameters)["tile_counter"] for one in driver.launched]
    assert counters == [COUNTERS, COUNTERS + 4, COUNTERS], "one by one for every stream"


def test_hopper_constants_are_those_of_the_portable_kernels(driver):  # noqa: F811
    views = forward_views(alibi_slopes=View.of((2, 4), "float32", ("cuda", 0)))
    keywords = {"window_size": (7, 3), "softcap": 5.0, "softmax_scale": 0.25, "dropout_p": 0.25}
    plans = [plan_forward(problem_of(views, kernels=kernels, **keywords), HOPPER) for kernels in ("sm80", "sm90")]
    portable, hopper = (read(launch.PARAMS[plan.main_entry], launch.constants(plan)) for plan in plans)
    for name in ("shape", "score", "dropout"):
        assert portable[name] == hopper[name]


def test_maps_are_encoded_once_for_an_address(driver, hopper):  # noqa: F811
    prepared, plan = hopper
    views = forward_views()
    for shift in (0, 0, 256, 0, 256):
        moved = replace(views["k"], pointer=views["k"].pointer + shift)
        launch_on(prepared, views | {"k": moved})
        assert maps_in(launch.FORWARD_SM90_PARAMS, driver.launched[-1])["k"][0] == moved.pointer
    assert [pointer for pointer, _ in driver.encoded] == [
        *(views[name].pointer for name in ("q", "k", "v", "out")),
        views["k"].pointer + 256,
    ]


def test_maps_of_one_address_differ_by_strides(driver, hopper):  # noqa: F811
    """Results that we allocate have the strides of the caller's layout, which a plan does not know."""
    prepared, _ = hopper
    views = forward_views()
    batch, seqlen, heads, head_dim = views["out"].shape
    swapped = replace(views["out"], strides=(seqlen * heads * head_dim, head_dim, seqlen * head_dim, 1))
    for out in (views["out"], swapped, views["out"]):
        launch_on(prepared, views | {"out": out})
    assert [pointer for pointer, _ in driver.encoded].count(views["out"].pointer) == 2


def test_number_of_maps_kept_is_bounded(driver, hopper, monkeypatch):  # noqa: F811
    monkeypatch.setattr(launch, "MAX_MAPS", 3)
    prepared, _ = hopper
    for number in range(1, 12):
        views = {name: replace(view, pointer=view.pointer + 16 * number) for name, view in forward_views().items()}
        launch_on(prepared, views)
        assert all(len(operand.maps_like(views[operand.name])) <= 3 for operand in prepared.through_maps)
        found = maps_in(launch.FORWARD_SM90_PARAMS, driver.launched[-1])
        assert {name: pointer for name, (pointer, _) in found.items()} == {name: views[name].pointer for name in found}


def test_captured_launches_have_counters_of_their_own(driver, hopper):  # noqa: F811
    prepared, _ = hopper
    driver.capturing = 7
    for stream in (7, 7, 1):
        launch_on(prepared, forward_views(), stream=stream)
    counters = {int(read(launch.FORWARD_SM90_PARAMS, one.parameters)["tile_counter"]) for one in driver.launched}
    assert len(counters) == 3


def test_hopper_backward_passes_maps_to_its_main_kernel_alone(driver):  # noqa: F811
    views = backward_views(dlse=View.of((2, 4, 100), "float32", ("cuda", 0)))
    plan = plan_backward(problem_of(views, kernels="sm90"), HOPPER)
    launch_on(launch.Launch(plan, 0), views, 1 << 40, stream=6)
    entries = ["backward_prepare", "backward_sm90"]
    assert [(launched.entry, launched.stream) for launched in driver.launched] == [(entry, 6) for entry in entries]
    prepare, main = driver.launched
    common = read(launch.BACKWARD_SM90_PARAMS, main.parameters)["common"]
    assert common.tobytes() == prepare.parameters
    assert common["dlse"] == views["dlse"].pointer
    assert common["padded_seqlen_q"] == plan.padded_seqlen_q
    assert min(common[name] for name in plan.workspace) == 1 << 40
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        assert common[name]["data"] == views[name].pointer
    tile = plan.tile
    boxes = {"q": tile.block_m, "k": tile.block_n, "v": tile.block_n, "dout": tile.block_m, "dk": 64, "dv": 64}
    found = maps_in(launch.BACKWARD_SM90_PARAMS, main)
    assert found == {name: (views[name].pointer, rows) for name, rows in boxes.items()}


def test_maps_are_as_aligned_as_the_driver_and_the_compiler_want_them(driver):  # noqa: F811
    """A kernel reads them at multiples of 64 bytes of its parameters, which begin at such a multiple."""
    structs = launch.FORWARD_SM90_PARAMS, launch.BACKWARD_SM90_PARAMS, launch.BACKWARD_QUERIES_SM90_PARAMS
    for params in structs:
        offsets = [offset for dtype, offset, *_ in params.fields.values() if dtype == launch.TENSOR_MAP]
        assert len(offsets) >= 4
        assert {offset % launch.tensor_map.ALIGNMENT for offset in offsets} == {0}
        assert params.itemsize % launch.tensor_map.ALIGNMENT == 0
        assert params.itemsize <= 4096, "all that a launch takes on every driver"
