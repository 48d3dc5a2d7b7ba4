"""Every rule of the input, by its message (argument, value, rule); and the fields of a problem."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from cuflash.dropout import Dropout
from cuflash.masks import Mask
from cuflash.problem import ArraySpec, Problem, View, check_copy, check_out, check_used_lengths

Q, K, V = (2, 33, 8, 64), (2, 47, 2, 64), (2, 47, 2, 40)  # batch, seqlen, heads, head_dim


def views(dtype: str = "float16", **changes: View | tuple[int, ...]) -> dict[str, View]:
    """Views of q, k and v, with changed shapes or other views."""
    shapes = {"q": Q, "k": K, "v": V} | changes
    return {name: value if isinstance(value, View) else View.of(value, dtype) for name, value in shapes.items()}


def refused(error: type[Exception], message: str):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def test_fields():
    problem = Problem.build(
        views(alibi_slopes=View.of((2, 8), "float32"), seqused_k=View.of((2,), "int32")),
        causal="top_left",
        window_size=(5, None),
        softcap=30,
        dropout_p=0.25,
        seed=7,
        offset=9,
        deterministic=True,
    )
    assert (problem.num_heads, problem.num_kv_heads, problem.group_size) == (8, 2, 4)
    assert (problem.head_dim, problem.head_dim_v, problem.softmax_scale) == (64, 40, 0.125)
    assert (problem.layout.batch, problem.layout.seqlen_q, problem.layout.seqlen_k) == (2, 33, 47)
    assert (problem.layout.used_q, problem.layout.used_k) == (False, True)
    assert problem.mask == Mask(5, 0, top_left=True)
    assert problem.modifiers.softcap == 30 and problem.modifiers.alibi and problem.modifiers.alibi_per_batch
    assert problem.dropout == Dropout(0.25, 7, 9) and problem.deterministic and not problem.sinks
    assert problem.out_shape == (2, 33, 8, 40) and problem.lse_shape == (2, 8, 33)
    assert problem.out is None and problem.dout is None


def test_layouts_describe_the_same_problem():
    bhsd = {
        name: View.of(tuple(view.shape[axis] for axis in (0, 2, 1, 3)), view.dtype) for name, view in views().items()
    }
    problem, canonical = Problem.build(bhsd, layout="bhsd"), Problem.build(views())
    assert problem.q.shape == Q and problem.q.strides == (8 * 33 * 64, 64, 33 * 64, 1)
    assert (problem.layout, problem.num_heads, problem.head_dim_v) == (canonical.layout, 8, 40)


def test_equal_calls_are_one_key():
    first, second = (Problem.build(views(), causal=True, dropout_p=0.5, seed=1) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != Problem.build(views(), dropout_p=0.5, seed=1)


def test_plans_do_not_depend_on_the_seed():
    first, second = (Problem.build(views(), dropout_p=0.5, seed=seed, offset=seed) for seed in (1, 2))
    assert first != second and first.without_seed() == second.without_seed()
    assert first.with_seed(2, 2) == second and first.with_seed(2, 2).without_seed() == first.without_seed()
    plain = Problem.build(views())
    assert plain.without_seed() is plain


@pytest.mark.parametrize(
    ("pointer", "strides", "alignment"),
    [
        (0x1000, (4096, 512, 64, 1), 16),
        (0x1008, (4096, 512, 64, 1), 8),
        (0x1000, (4096, 512, 59, 1), 2),
        (0x1000, (4096, -512, 60, 1), 8),
        (0x1000, (0, 512, 62, 1), 4),
    ],
)
def test_alignment(pointer, strides, alignment):
    assert ArraySpec.of(View(pointer, (2, 8, 8, 64), strides, "bfloat16")).alignment == alignment


def test_an_axis_of_one_element_aligns_with_everything():
    assert ArraySpec.of(View(0x1000, (1, 8, 1, 64), (7, 64, 3, 1), "float16")).alignment == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": ()}, "q has shape (); it must have four axes, (batch, seqlen, heads, head_dim)"),
        ({"q": (2, 33, 8)}, "q has shape (2, 33, 8); it must have four axes, (batch, seqlen, heads, head_dim)"),
        (
            {"v": (2, 47, 2, 2, 40)},
            "v has shape (2, 47, 2, 2, 40); it must have four axes, (batch, seqlen, heads, head_dim)",
        ),
        ({"k": (2, 1 << 30, 2, 64)}, f"k has shape {(2, 1 << 30, 2, 64)}; every axis must be shorter than 2**30"),
        ({"k": (2, 47, 6, 64)}, "k has 6 heads; q's 8 heads need a divisor of 8"),
        ({"k": (2, 47, 16, 64), "v": (2, 47, 16, 40)}, "k has 16 heads; q's 8 heads need a divisor of 8"),
        ({"k": (2, 47, 0, 64)}, "k has 0 heads; it must have at least 1"),
        ({"q": (2, 33, 0, 64)}, "q has 0 heads; it must have at least 1"),
        ({"v": (2, 47, 1, 40)}, "v has 1 heads; it must have as many as k, 2"),
        ({"v": (2, 46, 2, 40)}, "v has seqlen 46; it must be k's, 47"),
        ({"k": (3, 47, 2, 64)}, "k has batch 3; it must be q's, 2"),
        ({"v": (1, 47, 2, 40)}, "v has batch 1; it must be q's, 2"),
        ({"k": (2, 47, 2, 32)}, "k has head_dim 32; it must be q's, 64"),
        ({"q": (2, 33, 8, 0)}, "q has head_dim 0; it must lie between 1 and 256"),
        ({"v": (2, 47, 2, 257)}, "v has head_dim 257; it must lie between 1 and 256"),
        ({"out": (2, 33, 8, 64)}, "out has shape (2, 33, 8, 64); it must be (2, 33, 8, 40)"),
        ({"dout": (2, 8, 33, 40)}, "dout has shape (2, 8, 33, 40); it must be (2, 33, 8, 40)"),
        ({"lse": View.of((2, 33, 8), "float32")}, "lse has shape (2, 33, 8); it must be (2, 8, 33)"),
        ({"dlse": View.of((8, 33), "float32")}, "dlse has shape (8, 33); it must be (2, 8, 33)"),
        ({"sinks": View.of((2,), "float32")}, "sinks has shape (2,); it must be (8,)"),
        ({"alibi_slopes": View.of((8, 2), "float32")}, "alibi_slopes has shape (8, 2); it must be (8,) or (2, 8)"),
        ({"seqused_q": View.of((3,), "int32")}, "seqused_q has shape (3,); it must be (batch,) = (2,)"),
        ({"seqused_k": View.of((2, 1), "int32")}, "seqused_k has shape (2, 1); it must be (batch,) = (2,)"),
        (
            {"k": View(0, K, (6016, 128, 64, 2), "float16")},
            "k has strides (6016, 128, 64, 2); its last axis must be contiguous",
        ),
        ({"sinks": View(0, (8,), (2,), "float32")}, "sinks has strides (2,); its last axis must be contiguous"),
        ({"k": View.of(K, "float16", ("cuda", 1))}, "k is on cuda:1; it must be on q's cpu"),
    ],
)
def test_wrong_arrays(changes, message):
    with refused(ValueError, message):
        Problem.build(views(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": View.of(Q, "int32")}, "q is int32; attention takes float16, bfloat16, float32, float64"),
        (
            {"q": View.of(Q, "byte-swapped float32")},
            "q is byte-swapped float32; attention takes float16, bfloat16, float32, float64",
        ),
        ({"k": View.of(K, "bfloat16")}, "k is bfloat16; it must have q's dtype, float16"),
        ({"out": View.of(Q, "float32")}, "out is float32; it must have q's dtype, float16"),
        ({"sinks": View.of((8,), "float16")}, "sinks is float16; it must be float32"),
        ({"alibi_slopes": View.of((8,), "float64")}, "alibi_slopes is float64; it must be float32"),
        ({"seqused_k": View.of((2,), "int64")}, "seqused_k is int64; it must be int32"),
        ({"lse": View.of((2, 8, 33), "float64")}, "lse is float64; it must be float32"),
    ],
)
def test_wrong_dtypes(changes, message):
    with refused(TypeError, message):
        Problem.build(views(**changes))


def test_lse_of_float64_is_float64():
    assert Problem.build(views("float64", lse=View.of((2, 8, 33), "float64"))).accumulator == "float64"


WINDOW = "each side must be None, -1 or from 0 to 2**30 - 1"
SCALE = "it must be a finite float32 number"
SOFTCAP = "it must be 0 (off) or a positive, finite, normal float32 number"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layout": "sbhd"}, "layout is 'sbhd'; it must be one of 'bshd', 'bhsd'"),
        ({"causal": "bottom_right"}, "causal is 'bottom_right'; it must be False, True or 'top_left'"),
        ({"causal": 2}, "causal is 2; it must be False, True or 'top_left'"),
        ({"causal": None}, "causal is None; it must be False, True or 'top_left'"),
        ({"window_size": 5}, "window_size is 5; it must be None or a pair (left, right)"),
        ({"window_size": (1, 2, 3)}, "window_size is (1, 2, 3); it must be None or a pair (left, right)"),
        ({"window_size": (-2, 0)}, f"window_size is (-2, 0); {WINDOW}"),
        ({"window_size": (0, 1 << 30)}, f"window_size is (0, {1 << 30}); {WINDOW}"),
        ({"softmax_scale": float("nan")}, f"softmax_scale is nan; {SCALE}"),
        ({"softmax_scale": float("inf")}, f"softmax_scale is inf; {SCALE}"),
        ({"softmax_scale": -1e39}, f"softmax_scale is -1e+39; {SCALE}"),
        ({"softmax_scale": 10**400}, f"softmax_scale is {10**400}; it must be finite"),
        ({"softcap": -1.0}, f"softcap is -1.0; {SOFTCAP}"),
        ({"softcap": float("inf")}, f"softcap is inf; {SOFTCAP}"),
        ({"softcap": float("nan")}, f"softcap is nan; {SOFTCAP}"),
        ({"softcap": 1e-40}, f"softcap is 1e-40; {SOFTCAP}"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0; it must lie in [0, 1)"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1; it must lie in [0, 1)"),
        ({"dropout_p": float("nan")}, "dropout_p is nan; it must lie in [0, 1)"),
        ({"dropout_p": 0.1, "seed": None}, "seed is None; dropout_p=0.1 needs the seed of the forward"),
        ({"dropout_p": 0.1, "seed": -1}, "seed is -1; it must lie in [0, 2**64)"),
        ({"dropout_p": 0.1, "seed": 1 << 64}, f"seed is {1 << 64}; it must lie in [0, 2**64)"),
        ({"dropout_p": 0.1, "offset": 1 << 32}, f"offset is {1 << 32}; it must lie in [0, 2**32)"),
        ({"offset": -1}, "offset is -1; it must lie in [0, 2**32)"),
    ],
)
def test_wrong_values(keywords, message):
    with refused(ValueError, message):
        Problem.build(views(), **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"window_size": (1.5, 0)}, "window_size is (1.5, 0); each side must be None or a whole number"),
        ({"softmax_scale": "1"}, "softmax_scale is '1'; it must be a real number"),
        ({"softcap": None}, "softcap is None; it must be a real number"),
        ({"dropout_p": 1j}, "dropout_p is 1j; it must be a real number"),
        ({"dropout_p": 0.1, "seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"offset": "0"}, "offset is '0'; it must be a whole number"),
        ({"deterministic": 1}, "deterministic is 1; it must be True or False"),
    ],
)
def test_wrong_types(keywords, message):
    with refused(TypeError, message):
        Problem.build(views(), **keywords)


def test_numpy_scalars_are_numbers():
    problem = Problem.build(
        views(),
        causal=np.True_,
        window_size=(np.int64(3), np.int32(-1)),
        softmax_scale=np.float32(0.5),
        softcap=np.float64(2),
        dropout_p=np.float32(0.5),
        seed=np.uint64(2**64 - 1),
        offset=np.int64(2**32 - 1),
        deterministic=np.False_,
    )
    assert problem.mask == Mask(3, 0) and problem.softmax_scale == 0.5 and problem.dropout.seed == 2**64 - 1


def test_dropout_needs_few_heads_and_sequences():
    many = views(q=(1 << 16, 1, 1, 8), k=(1 << 16, 1, 1, 8), v=(1 << 16, 1, 1, 8))
    Problem.build(many)
    with refused(ValueError, "q has batch 65536 and 1 heads; dropout needs both below 65536"):
        Problem.build(many, dropout_p=0.5)


def test_copies_are_needed_and_can_be_refused():
    strided = View(0, K, (6016, 128, 64, 2), "float16")
    assert check_copy("k", strided, None) and not check_copy("k", View.of(K, "float16"), False)
    rule = "its last axis must be contiguous and aligned where copy=False refuses a copy"
    with refused(ValueError, f"k has strides (6016, 128, 64, 2); {rule}"):
        check_copy("k", strided, False)
    with refused(ValueError, f"k has strides {View.of(K, 'float16').strides}; {rule}"):
        check_copy("k", View.of(K, "float16"), False, addressable=False)
    broadcast = View(0, (2, 8), (0, 1), "float32")  # slopes without strides in the kernels
    with refused(
        ValueError,
        "alibi_slopes has strides (0, 1); all of it must be contiguous and aligned where copy=False refuses a copy",
    ):
        check_copy("alibi_slopes", broadcast, False)


def test_one_column_is_contiguous_whatever_its_stride():
    assert View(0, (2, 8, 4, 1), (32, 4, 1, 7), "float16").is_row_contiguous
    assert View(0, (2, 0, 4, 8), (32, 4, 1, 7), "float16").is_row_contiguous


def test_used_lengths_lie_in_the_allocation():
    check_used_lengths("seqused_k", np.array([0, 47]), 47)
    with refused(ValueError, "seqused_k has 48; it must lie between 0 and the allocated 47"):
        check_used_lengths("seqused_k", np.array([0, 48]), 47)
    with refused(ValueError, "seqused_q has -1; it must lie between 0 and the allocated 33"):
        check_used_lengths("seqused_q", np.array([-1]), 33)


def packed_qkv() -> dict[str, View]:
    """q, k and v interleaved by head in one allocation (batch, seqlen, 3, heads, head_dim)."""
    strides = (33 * 3 * 8 * 64, 3 * 8 * 64, 64, 1)
    return {name: View(0x1000 + i * 8 * 64 * 2, Q, strides, "float16") for i, name in enumerate("qkv")}


def test_out_may_be_q_even_between_keys_and_values():
    arrays = packed_qkv()
    check_out(arrays | {"out": arrays["q"]}, writable=True)


@pytest.mark.parametrize("name", ["k", "v"])
def test_out_may_not_be_another_operand(name):
    arrays = packed_qkv()
    rule = "only out=q itself, with head_dim_v equal to head_dim, works in place"
    with refused(ValueError, f"out overlaps {name}; {rule}"):
        check_out(arrays | {"out": arrays[name]}, writable=True)


@pytest.mark.parametrize("backwards", [False, True])
def test_out_may_touch_another_operand(backwards):
    batch, seqlen, heads, head_dim = Q
    row, size = heads * head_dim, 2 * math.prod(Q)
    k = View(1 << 20, Q, (seqlen * row, row, head_dim, 1), "float16")
    given = {"q": View(1 << 40, Q, k.strides, "float16"), "k": k}
    if backwards:
        given["k"] = replace(k, pointer=k.pointer + 2 * (seqlen - 1) * row, strides=(seqlen * row, -row, head_dim, 1))
    for shift in (size, -size):
        check_out(given | {"out": replace(k, pointer=k.pointer + shift)}, writable=True)
    for shift in (size - 2, 2 - size):
        with refused(
            ValueError, "out overlaps k; only out=q itself, with head_dim_v equal to head_dim, works in place"
        ):
            check_out(given | {"out": replace(k, pointer=k.pointer + shift)}, writable=True)


def test_out_may_not_be_part_of_q():
    strides = View.of(Q, "float16").strides
    q, shifted = (View(pointer, Q, strides, "float16") for pointer in (0x1000, 0x1000 + 64 * 2))
    with refused(ValueError, "out overlaps q; only out=q itself, with head_dim_v equal to head_dim, works in place"):
        check_out({"q": q, "out": shifted}, writable=True)


@pytest.mark.parametrize("strides", [(0, 512, 64, 1), (16896, 512, 63, 1), (16896, 512, 0, 1)])
def test_out_may_not_overlap_itself(strides):
    q, out = packed_qkv()["q"], View(1 << 40, Q, strides, "float16")
    with refused(ValueError, f"out has strides {strides} for shape {Q}; no two elements may share memory"):
        check_out({"q": q, "out": out}, writable=True)


def test_out_may_be_strided():
    q = packed_qkv()["q"]
    for strides in ((-16896, 512, 64, 1), (16896, 64, 33 * 64, 1), (1 << 20, 1 << 10, 128, 1)):
        check_out({"q": q, "out": View(1 << 40, Q, strides, "float16")}, writable=True)


def test_out_must_be_writable():
    with refused(ValueError, "out is read-only; it must be writable"):
        check_out(views(out=V), writable=False)
