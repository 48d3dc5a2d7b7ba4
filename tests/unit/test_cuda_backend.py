"""The backend for GPU arrays up to the driver: what is planned once, allocated once and launched."""

from __future__ import annotations

import numpy as np
import pytest
from fake_driver import backward_views, driver, forward_views  # noqa: F401 - a fixture

from cuflash.backends import cuda_backend
from cuflash.cuda.launch import BACKWARD_PARAMS, FORWARD_PARAMS
from cuflash.problem import Problem, View

WORKSPACE = 1 << 40


def problem_of(views: dict[str, View], **keywords) -> Problem:
    inputs = ("q", "k", "v", "dout", "alibi_slopes", "sinks", "seqused_q", "seqused_k", "lse", "dlse")
    given = {name: view for name, view in views.items() if name in inputs}
    return Problem.build(given, **{"kernels": "sm80"} | keywords)


def run(direction: str, problem: Problem, views: dict[str, View], stream: int) -> None:
    launch = cuda_backend.bind(direction, problem, 0, views, stream)
    launch({name: view.pointer for name, view in views.items()}, WORKSPACE, problem.dropout, stream)


def test_forward_launches_one_kernel_and_allocates_nothing(driver):  # noqa: F811
    views = forward_views()
    run("forward", problem_of(views), views, 7)
    assert [(launched.entry, launched.stream) for launched in driver.launched] == [("forward_sm80", 7)]
    assert cuda_backend.bind("forward", problem_of(views), 0, views, 7).workspace_floats == 0


def test_backward_asks_for_its_workspace_at_once(driver):  # noqa: F811
    views = backward_views()
    run("backward", problem_of(views), views, 7)
    assert [launched.entry for launched in driver.launched] == ["backward_prepare", "backward_sm80", "backward_finish"]
    assert {launched.stream for launched in driver.launched} == {7}
    launch = cuda_backend.bind("backward", problem_of(views), 0, views, 7)
    assert launch.workspace_floats >= 2 * 4 * 128 * (64 + 2)
    params = np.frombuffer(driver.launched[0].parameters, BACKWARD_PARAMS)[0]
    assert params["row_lse"] == WORKSPACE


def test_repeated_calls_compile_and_plan_nothing(driver, monkeypatch):  # noqa: F811
    views = forward_views()
    problem = problem_of(views)
    run("forward", problem, views, 0)
    monkeypatch.setattr(cuda_backend, "Launch", None)
    run("forward", problem, views, 0)
    run("forward", problem_of(views), views, 0)
    assert len(driver.compiled) == 1
    assert len(driver.launched) == 3


def test_new_seeds_are_the_same_problem_to_the_kernels(driver, monkeypatch):  # noqa: F811
    views = forward_views()
    problem = problem_of(views, dropout_p=0.5)
    run("forward", problem, views, 0)
    monkeypatch.setattr(cuda_backend, "Launch", None)
    for seed in (1, 2**40):
        run("forward", problem.with_seed(seed, 3), views, 0)
    keys = [np.frombuffer(launched.parameters, FORWARD_PARAMS)[0]["dropout"] for launched in driver.launched]
    assert [(int(key["seed_low"]), int(key["seed_high"]), int(key["offset"])) for key in keys] == [
        (0, 0, 0),
        (1, 0, 3),
        (0, 256, 3),
    ]


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "entries"),
    [(0, 64, ["backward_sm80"]), (64, 0, ["backward_prepare", "backward_finish"])],
)
def test_zero_lengths(driver, seqlen_q, seqlen_k, entries):  # noqa: F811
    rows, keys = View.of((1, seqlen_q, 2, 32), "float16"), View.of((1, seqlen_k, 2, 32), "float16")
    views = {"q": rows, "k": keys, "v": keys, "out": rows, "dout": rows, "dq": rows, "dk": keys, "dv": keys}
    views["lse"] = View.of((1, 2, seqlen_q), "float32")
    run("backward", problem_of(views), views, 0)
    assert [launched.entry for launched in driver.launched] == entries


def test_first_use_under_capture_says_what_to_do(driver):  # noqa: F811
    views = forward_views()
    driver.capturing = 7
    with pytest.raises(RuntimeError, match="forward_sm80 is first used while a CUDA graph is captured; make"):
        run("forward", problem_of(views), views, 7)
    assert driver.compiled == []
    run("forward", problem_of(views), views, 8)
    run("forward", problem_of(views), views, 7)
    run("forward", problem_of(views, softmax_scale=0.5), views, 7)  # another problem, the same kernel
    assert [launched.stream for launched in driver.launched] == [8, 7, 7]


@pytest.mark.parametrize("kernels", ["sm80", "sm90"])
def test_what_is_warm_may_be_captured(driver, kernels):  # noqa: F811
    views = forward_views()
    problem = Problem.build({name: views[name] for name in "qkv"}, kernels=kernels, dropout_p=0.5, seed=3)
    cuda_backend.warmup(problem, 0, backward=False)
    driver.capturing = 7
    run("forward", problem, views, 7)
    assert [launched.entry for launched in driver.launched] == [f"forward_{kernels}"]
    assert len(driver.compiled) == 1


def test_number_of_launches_kept_is_bounded(driver, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_backend, "MAX_LAUNCHES", 3)
    views = forward_views()
    for scale in (0.1, 0.2, 0.3, 0.4, 0.5):
        run("forward", problem_of(views, softmax_scale=scale), views, 0)
        assert len(cuda_backend._launches) <= 3
    assert len(driver.launched) == 5


def test_hopper_runs_its_own_kernels_unless_asked_not_to(driver):  # noqa: F811
    views = backward_views()
    for kernels in (None, "sm90", "sm80"):
        problem = problem_of(views, kernels=kernels)
        run("forward", problem, views, 0)
        run("backward", problem, views, 0)
    entries = [launched.entry for launched in driver.launched]
    assert [entry for entry in entries if entry.endswith(("sm80", "sm90"))] == [
        *("forward_sm90", "backward_sm90") * 2,
        *("forward_sm80", "backward_sm80"),
    ]
    options = {entry: options[-1] for entry, options in driver.compiled if entry.endswith("sm90")}
    assert set(options.values()) == {"-arch=sm_90a"}


def test_dtype_without_kernels_is_refused(driver):  # noqa: F811
    view = View.of((1, 8, 1, 16), "float32")
    views = {"q": view, "k": view, "v": view, "out": view}
    with pytest.raises(TypeError, match="q is float32; the cuda backend takes float16 or bfloat16"):
        run("forward", problem_of(views), views, 0)


def test_explain_describes_both_passes_and_knows_loaded_kernels(driver):  # noqa: F811
    views = forward_views()
    problem = problem_of(views)
    text = cuda_backend.explain(problem, 0)
    assert text.startswith("forward on NVIDIA H200")
    assert "\nbackward on NVIDIA H200" in text
    assert "? registers" in text
    run("forward", problem, views, 0)
    assert "168 registers" in cuda_backend.explain(problem, 0)


@pytest.mark.parametrize(
    ("backward", "number", "kernels"), [(False, 1, "sm80"), (False, 1, "sm90"), (True, 4, "sm80"), (True, 3, "sm90")]
)
def test_warmup_loads_what_the_passes_launch(driver, backward, number, kernels):  # noqa: F811
    views = backward_views()
    problem = problem_of(views, kernels=kernels)
    cuda_backend.warmup(problem, 0, backward=backward)
    assert len(driver.compiled) == number
    run("forward", problem, views, 0)
    if backward:
        run("backward", problem, views, 0)
    assert len(driver.compiled) == number
