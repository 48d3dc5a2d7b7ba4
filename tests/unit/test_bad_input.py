"""Any input either gives the right answer or is refused by an error that names an argument, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from cases import MEMORY
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import cuflash
from cuflash.problem import Problem, View
from cuflash.testing import Arrays, check, numpy_dtype

LAYOUTS = {
    **MEMORY,
    "column-major": np.asfortranarray,
    "every second column": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
    "one sequence for all": lambda array: np.broadcast_to(array[:1], array.shape),
}
NAMES = (*cuflash.attention.__kwdefaults__, "q", "k", "v")
JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        2,
        0.5,
        1e300,
        float("nan"),
        float("inf"),
        1 << 70,
        "x",
        "top_left",
        (1,),
        (-2, 0),
        (0, 1.5),
        [],
        {},
        object(),
        np.ones(3),
    ]
)


@dataclass
class Call:
    """One call that is valid until it is damaged."""

    arrays: dict[str, np.ndarray]
    keywords: dict[str, object]
    damages: list[str] = field(default_factory=list)


@st.composite
def valid_calls(draw: st.DrawFn) -> Call:
    batch, seqlen_q, seqlen_k = draw(st.integers(0, 2)), draw(st.integers(0, 19)), draw(st.integers(0, 19))
    num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim, head_dim_v = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    dtype = numpy_dtype(draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    num_heads = num_kv_heads * group
    shapes = {
        "q": (batch, seqlen_q, num_heads, head_dim),
        "k": (batch, seqlen_k, num_kv_heads, head_dim),
        "v": (batch, seqlen_k, num_kv_heads, head_dim_v),
    }
    arrays = {}
    for name, shape in shapes.items():
        memory = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
        # Small numbers: where the exact value is 0, rounding errors then stay below the bound's absolute term.
        arrays[name] = memory(rng.uniform(-0.5, 0.5, shape).astype(dtype))
    if draw(st.booleans()):
        arrays["sinks"] = rng.standard_normal(num_heads).astype(np.float32)
    if draw(st.booleans()):
        slopes = draw(st.sampled_from([(num_heads,), (batch, num_heads)]))
        arrays["alibi_slopes"] = rng.uniform(0, 1, slopes).astype(np.float32)
    for name, longest in (("seqused_q", seqlen_q), ("seqused_k", seqlen_k)):
        if draw(st.booleans()):
            arrays[name] = rng.integers(0, longest + 1, batch).astype(np.int32)

    sides = st.one_of(st.none(), st.integers(-1, 12))
    keywords = {
        "causal": draw(st.sampled_from([False, True, "top_left"])),
        "window_size": draw(st.one_of(st.none(), st.tuples(sides, sides))),
        "softmax_scale": draw(st.one_of(st.none(), st.floats(-1, 1, width=32))),
        "softcap": draw(st.sampled_from([0, 0.5, 20.0])),
        "dropout_p": draw(st.sampled_from([0, 0.25])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "offset": draw(st.integers(0, 2**32 - 1)),
        "deterministic": draw(st.booleans()),
    }
    return Call(arrays, {name: value for name, value in keywords.items() if draw(st.booleans()) or name == "seed"})


@st.composite
def damaged_calls(draw: st.DrawFn) -> Call:
    call = draw(valid_calls())
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.booleans()):
            name = draw(st.sampled_from(sorted(cuflash.attention.__kwdefaults__.keys() - call.arrays.keys())))
            call.keywords[name] = draw(JUNK)
            call.damages.append(f"keyword {name}")
        else:
            name = draw(st.sampled_from(sorted(call.arrays)))
            damage = draw(st.sampled_from(sorted(DAMAGES)))
            if isinstance(call.arrays[name], np.ndarray):
                call.arrays[name] = DAMAGES[damage](call.arrays[name])
                call.damages.append(f"array: {damage}")
    return call


DAMAGES = {
    "an axis more": lambda array: array[None],
    "an axis less": lambda array: array.reshape(-1),
    "one longer": lambda array: (
        np.concatenate([array, array[:1]]) if len(array) else np.zeros((1, *array.shape[1:]), array.dtype)
    ),
    "last axis longer": lambda array: np.concatenate([array, array[..., :1]], axis=-1),
    "axes reversed": lambda array: array.T,
    "integers": lambda array: np.zeros(array.shape, np.int64),
    "float32": lambda array: array.real.astype(np.float32),
    "complex": lambda array: array.astype(np.complex64),
    "byte-swapped": lambda array: array.real.astype(np.float32).astype(">f4"),
    "a list": lambda array: array.tolist(),
    "masked": np.ma.asarray,
    "nothing": lambda array: None,
    "negative": lambda array: -array,
}

REFUSALS = (TypeError, ValueError, NotImplementedError)


def names_an_argument(error: Exception) -> bool:
    return str(error).split(" ")[0] in NAMES


def solve(call: Call) -> tuple[dict[str, np.ndarray], np.ndarray]:
    (out, lse), pullback = cuflash.vjp(**call.arrays, **call.keywords | {"return_lse": True})
    dout = np.linspace(-0.5, 0.5, out.size).reshape(out.shape).astype(out.dtype)
    gradients = pullback(dout)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=False))}, dout


def verify(call: Call) -> None:
    """Compare with the oracle, which is told the call's meaning through contiguous canonical arrays."""
    actual, dout = solve(call)
    wide = {name: array.astype(np.float32) for name, array in call.arrays.items() if is_half(array)}
    if wide:
        # Rounding errors of a few elements say nothing about their bound: 16-bit results are rounded float32 results.
        verify(Call(call.arrays | wide, call.keywords))
        out, lse = cuflash.attention(**call.arrays | wide, **call.keywords | {"return_lse": True})
        np.testing.assert_array_equal(actual["out"], out.astype(actual["out"].dtype))
        np.testing.assert_array_equal(actual["lse"], lse)
        return
    given = {name: array for name, array in call.arrays.items() if array is not None}
    if call.keywords.get("layout") == "bhsd":
        given |= {name: given[name].swapaxes(1, 2) for name in ("q", "k", "v")}
        actual |= {name: actual[name].swapaxes(1, 2) for name in ("out", "dq", "dk", "dv")}
        dout = dout.swapaxes(1, 2)
    said = ("causal", "window_size", "softmax_scale", "softcap", "dropout_p", "seed", "offset", "deterministic")
    keywords = {name: value for name, value in call.keywords.items() if name in said}
    problem = Problem.build({name: View.of(array.shape, array.dtype.name) for name, array in given.items()}, **keywords)
    report = check(actual, problem, Arrays(dout=dout, **given))
    assert report.ok, f"\n{report}"


def is_half(array: np.ndarray | None) -> bool:
    return array is not None and array.dtype.itemsize == 2


@settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(valid_calls())
def test_valid_calls_are_right(call):
    verify(call)


@settings(deadline=None, derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(damaged_calls())
def test_damaged_calls_are_right_or_refused(call):
    for damage in call.damages:
        event(damage)
    try:
        verify(call)
    except REFUSALS as error:
        event("refused")
        assert names_an_argument(error), error
    else:
        event("right")
