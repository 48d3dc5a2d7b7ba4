"""The public functions: keywords, layouts, memory, seeds, gradients, the cache of checked calls."""

from __future__ import annotations

import inspect
import threading
from decimal import Decimal

import numpy as np
import pytest

import cuflash
from cuflash import dispatch
from cuflash.problem import Problem, View
from cuflash.testing import Arrays, check, random_arrays


def operands(*, dtype: str = "float32", num_heads: int = 4, num_kv_heads: int = 2, seqlen_k: int = 41) -> Arrays:
    shapes = {"q": (2, 33, num_heads, 16), "k": (2, seqlen_k, num_kv_heads, 16), "v": (2, seqlen_k, num_kv_heads, 24)}
    return random_arrays(Problem.build({name: View.of(shape, dtype) for name, shape in shapes.items()}), seed=0)


def problem_of(arrays: Arrays, **keywords) -> Problem:
    views = {name: View.of(getattr(arrays, name).shape, getattr(arrays, name).dtype.name) for name in "qkv"}
    return Problem.build(views, **keywords)


@pytest.fixture
def calls(monkeypatch):
    """An empty cache of checked calls."""
    monkeypatch.setattr(dispatch, "_prepared", {})
    return dispatch._prepared


def test_request_has_the_keywords_of_attention():
    public, sorted_by = (inspect.signature(function).parameters for function in (cuflash.attention, dispatch.request))
    assert [(name, p.default) for name, p in public.items()] == [(name, p.default) for name, p in sorted_by.items()]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_attention_and_gradients(dtype):
    arrays = operands(dtype=dtype)
    keywords = {"causal": True, "softcap": 3.0, "dropout_p": 0.2, "seed": 5, "offset": 1}
    (out, lse), pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v, return_lse=True, **keywords)
    gradients = pullback(arrays.dout)
    actual = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=False))}
    report = check(actual, problem_of(arrays, **keywords), arrays)
    assert report.ok, report
    assert out.dtype == gradients.dq.dtype == arrays.q.dtype
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)


def test_layouts_agree_and_nothing_is_copied():
    arrays = operands()
    expected, pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v)
    by_heads = [array.swapaxes(1, 2) for array in (arrays.q, arrays.k, arrays.v)]
    out, pullback_by_heads = cuflash.vjp(*by_heads, layout="bhsd", copy=False)
    np.testing.assert_array_equal(out, expected.swapaxes(1, 2))
    assert out.flags.c_contiguous
    gradients = pullback_by_heads(arrays.dout.swapaxes(1, 2))
    for actual, wanted in zip(gradients[:3], pullback(arrays.dout)[:3], strict=True):
        np.testing.assert_array_equal(actual, wanted.swapaxes(1, 2))


def test_columns_that_are_not_contiguous_are_copied_or_refused():
    arrays = operands()
    expected = cuflash.attention(arrays.q, arrays.k, arrays.v)
    fortran = np.asfortranarray(arrays.q)
    np.testing.assert_array_equal(cuflash.attention(fortran, arrays.k, arrays.v), expected)
    with pytest.raises(
        ValueError, match=r"^q has strides .*; its last axis must be contiguous and aligned where copy=False"
    ):
        cuflash.attention(fortran, arrays.k, arrays.v, copy=False)
    off_grid = np.zeros(arrays.q.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(arrays.q.shape)
    off_grid[:] = arrays.q
    np.testing.assert_array_equal(cuflash.attention(off_grid, arrays.k, arrays.v), expected)
    with pytest.raises(
        ValueError, match=r"^q has strides .*; its last axis must be contiguous and aligned where copy=False"
    ):
        cuflash.attention(off_grid, arrays.k, arrays.v, copy=False)
    with pytest.raises(ValueError, match=r"^copy is True; it must be None"):
        cuflash.attention(arrays.q, arrays.k, arrays.v, copy=True)


def test_gradients_of_any_strides():
    arrays = operands()
    _, pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v)
    ones = np.broadcast_to(np.float32(1), arrays.dout.shape)
    np.testing.assert_array_equal(pullback(ones).dq, pullback(np.ascontiguousarray(ones)).dq)


def test_out_is_written_and_returned():
    arrays = operands()
    expected = cuflash.attention(arrays.q, arrays.k, arrays.v)
    memory = np.full((2, 4, 33, 32), np.nan, np.float32)
    out = memory.swapaxes(1, 2)[..., :24]
    assert cuflash.attention(arrays.q, arrays.k, arrays.v, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(memory[..., 24:]).all()
    by_heads = np.full((2, 4, 33, 24), np.nan, np.float32)
    transposed = [array.swapaxes(1, 2) for array in (arrays.q, arrays.k, arrays.v)]
    assert cuflash.attention(*transposed, layout="bhsd", out=by_heads) is by_heads
    np.testing.assert_array_equal(by_heads, expected.swapaxes(1, 2))


def test_in_place():
    arrays = operands()
    v = arrays.v[..., :16]
    expected, q = cuflash.attention(arrays.q, arrays.k, v), arrays.q.copy()
    assert cuflash.attention(q, arrays.k, v, out=q) is q
    np.testing.assert_array_equal(q, expected)
    for same_memory in (q, q[:]):
        with pytest.raises(ValueError, match="^out overlaps q; vjp reads it again$"):
            cuflash.vjp(q, arrays.k, v, out=same_memory)
    with pytest.raises(ValueError, match="^out overlaps k; only out=q"):
        cuflash.attention(q[:, :33], q, q, out=q[:, :33])


def test_read_only_operands_are_fine_and_a_read_only_out_is_not():
    arrays = operands()
    for array in (arrays.q, arrays.k, arrays.v):
        array.flags.writeable = False
    out = cuflash.attention(arrays.q, arrays.k, arrays.v)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="^out is read-only; it must be writable$"):
        cuflash.attention(arrays.q, arrays.k, arrays.v, out=out)


def test_a_drawn_seed_follows_numpy_and_serves_the_gradients():
    arrays = operands()
    np.random.seed(3)
    first, pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v, dropout_p=0.5)
    second = cuflash.attention(arrays.q, arrays.k, arrays.v, dropout_p=0.5)
    np.random.seed(3)
    repeated = cuflash.attention(arrays.q, arrays.k, arrays.v, dropout_p=0.5)
    np.testing.assert_array_equal(first, repeated)
    assert not np.array_equal(first, second)

    np.random.seed(3)
    seed = int(np.random.randint(0, 2**63 - 1, dtype=np.int64))
    report = check({"dv": pullback(arrays.dout).dv}, problem_of(arrays, dropout_p=0.5, seed=seed), arrays)
    assert report.ok, report


def test_a_backward_with_dropout_needs_the_seed():
    arrays = operands()
    out, lse = cuflash.attention(arrays.q, arrays.k, arrays.v, dropout_p=0.5, seed=1, return_lse=True)
    with pytest.raises(ValueError, match="^seed is None; dropout_p=0.5 needs the seed of the forward$"):
        cuflash.attention_backward(arrays.dout, arrays.q, arrays.k, arrays.v, out, lse, dropout_p=0.5)


def test_a_seed_is_checked_even_without_dropout():
    arrays = operands()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^seed is -1; it must lie in \[0, 2\*\*64\)$"):
            cuflash.attention(arrays.q, arrays.k, arrays.v, seed=-1)


def test_the_gradient_of_lse_counts():
    arrays = operands(dtype="float64")
    (_, lse), pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v, return_lse=True)
    arrays.dlse = np.random.default_rng(1).standard_normal(lse.shape)
    gradients = pullback(arrays.dout, arrays.dlse)
    report = check({"dq": gradients.dq, "dk": gradients.dk}, problem_of(arrays), arrays)
    assert report.ok, report


def test_gradients_of_operands_that_are_not_there_are_none():
    arrays = operands()
    out, pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v)
    gradients = pullback(np.ones_like(out))
    assert gradients._fields == ("dq", "dk", "dv", "dsinks", "dbias", "captured")
    assert gradients[3:] == (None, None, None)
    _, pullback = cuflash.vjp(arrays.q, arrays.k, arrays.v, sinks=np.zeros(4, np.float32))
    assert pullback(np.ones_like(out)).dsinks.shape == (4,)


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [("score_mod", "softcap"), ("mask_mod", "causal"), ("block_mask", "window_size"), ("bias", "alibi_slopes")],
)
def test_keywords_to_come(keyword, nearest):
    arrays = operands()
    for function in (cuflash.attention, cuflash.vjp):
        with pytest.raises(NotImplementedError, match=f"^{keyword} is not supported yet; nearest are .*{nearest}"):
            function(arrays.q, arrays.k, arrays.v, **{keyword: object()})


def test_unknown_keywords():
    arrays = operands()
    for function in (cuflash.attention, cuflash.vjp):
        with pytest.raises(TypeError, match="is_causal"):
            function(arrays.q, arrays.k, arrays.v, is_causal=True)


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("cuda", ValueError, "backend is 'cuda' and q is on the cpu; move the arrays, for instance by cupy.asarray"),
        ("sm80", ValueError, "backend is 'sm80' and q is on the cpu; move the arrays, for instance by cupy.asarray"),
        ("sm90", ValueError, "backend is 'sm90' and q is on the cpu; move the arrays, for instance by cupy.asarray"),
        ("tpu", ValueError, "backend is 'tpu'; it must be None or one of 'numpy', 'cuda', 'sm80', 'sm90'"),
    ],
)
def test_backends_that_cannot_run(backend, error, message):
    arrays = operands()
    with pytest.raises(error) as raised:
        cuflash.attention(arrays.q, arrays.k, arrays.v, backend=backend)
    assert str(raised.value) == message


def test_used_lengths_are_checked_where_they_can_be_read():
    arrays = operands()
    with pytest.raises(ValueError, match="^seqused_k has 42; it must lie between 0 and the allocated 41$"):
        cuflash.attention(arrays.q, arrays.k, arrays.v, seqused_k=np.array([41, 42], np.int32))


def test_a_kind_of_call_is_checked_once(calls, monkeypatch):
    arrays, built = operands(), []
    build = Problem.build
    monkeypatch.setattr(Problem, "build", lambda *args, **keywords: built.append(args) or build(*args, **keywords))
    for seed in range(3):
        cuflash.attention(arrays.q, arrays.k + seed, arrays.v, causal=True, dropout_p=0.5, seed=seed)
    assert len(built) == len(calls) == 1
    cuflash.attention(arrays.q, arrays.k[:, 1:], arrays.v[:, 1:], causal=True, dropout_p=0.5, seed=0)
    cuflash.attention(arrays.q, arrays.k, arrays.v, causal="top_left", dropout_p=0.5, seed=0)
    assert len(built) == len(calls) == 3


@pytest.mark.parametrize(
    ("keyword", "accepted", "refused"),
    [
        ("causal", True, 1.0),
        ("window_size", (3, 0), (3.0, 0)),
        ("window_size", [3, 0], [3, 0.0]),
        ("softmax_scale", 0.5, Decimal("0.5")),
        ("softcap", 2.0, 2 + 0j),
        ("dropout_p", 0.0, Decimal(0)),
        ("deterministic", True, 1),
        ("deterministic", False, 0),
        ("copy", False, 0),
    ],
)
def test_what_equals_an_accepted_value_is_checked_all_the_same(keyword, accepted, refused):
    arrays = operands()
    assert accepted == refused
    cuflash.attention(arrays.q, arrays.k, arrays.v, **{keyword: accepted})
    with pytest.raises((TypeError, ValueError), match=f"^{keyword} is "):
        cuflash.attention(arrays.q, arrays.k, arrays.v, **{keyword: refused})


def test_windows_of_one_kind_are_told_apart():
    arrays = operands()
    for window in ((3, 0), (4, 0), (3, 1), (3, None), (None, 0)):
        report = check(
            {"out": cuflash.attention(arrays.q, arrays.k, arrays.v, window_size=window)},
            problem_of(arrays, window_size=window),
            arrays,
        )
        assert report.ok, report


def test_errors_are_not_remembered(calls):
    arrays = operands()
    for _ in range(2):
        with pytest.raises(ValueError, match="^softcap is -1"):
            cuflash.attention(arrays.q, arrays.k, arrays.v, softcap=-1)
    assert not calls


SCALARS = ["causal", "window_size", "softmax_scale", "softcap", "dropout_p", "seed", "offset", "deterministic"]


@pytest.mark.parametrize("keyword", [*SCALARS, "return_lse", "layout", "copy", "backend"])
@pytest.mark.parametrize("value", [[1.0], np.ones(2), np.ones(())], ids=["list", "array", "zero-dimensional array"])
def test_keywords_that_are_no_scalars_are_named(keyword, value):
    arrays = operands()
    for function in (cuflash.attention, cuflash.vjp):
        with pytest.raises((TypeError, ValueError), match=f"^{keyword} is "):
            function(arrays.q, arrays.k, arrays.v, **{keyword: value})


def test_a_window_may_be_a_list():
    arrays = operands()
    expected = cuflash.attention(arrays.q, arrays.k, arrays.v, window_size=(3, 0))
    np.testing.assert_array_equal(cuflash.attention(arrays.q, arrays.k, arrays.v, window_size=[3, 0]), expected)


def test_the_cache_is_bounded(calls, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PREPARED", 4)
    q = np.ones((1, 1, 1, 8), np.float32)
    for seqlen_k in range(1, 20):
        k = np.ones((1, seqlen_k, 1, 8), np.float32)
        assert np.allclose(cuflash.attention(q, k, k), 1)
        assert len(calls) <= 4


def test_threads_share_the_cache(calls, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PREPARED", 3)  # so that threads empty it under each other
    arrays = operands()
    expected = {n: cuflash.attention(arrays.q, arrays.k[:, :n], arrays.v[:, :n], causal=True) for n in range(36, 42)}
    failures, barrier = [], threading.Barrier(8)

    def work(first: int) -> None:
        try:
            barrier.wait()
            for step in range(12):
                n = 36 + (first + step) % 6
                out = cuflash.attention(arrays.q, arrays.k[:, :n], arrays.v[:, :n], causal=True)
                np.testing.assert_array_equal(out, expected[n])
        except Exception as error:  # a thread's error is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_explain_says_what_would_run():
    q = np.zeros((1, 64, 2, 32), np.float32)
    assert str(cuflash.explain(q, q, q)).startswith("numpy backend, float32")
    with pytest.raises(TypeError, match="^q is float32; the cuda backend takes float16 or bfloat16$"):
        cuflash.explain(q, q, q, device="sm_90a")
    half = q.astype(np.float16)
    explanation = cuflash.explain(half, half, half, device="sm_80", causal=True)
    assert [plan.pass_ for plan in explanation.plans] == ["forward", "backward"]
    assert "forward_sm80" in repr(explanation)
    with pytest.raises(ValueError, match="^arch is 'sm_75'"):
        cuflash.explain(half, half, half, device="sm_75")
