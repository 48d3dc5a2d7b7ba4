"""The table of supported features is true: every row runs, and every empty row says so."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash
from cuflash.api import FEATURES, UNLANDED
from cuflash.device import DeviceInfo
from cuflash.problem import NEAREST
from cuflash.testing import numpy_dtype

EXAMPLES = {
    "causal": "top_left",
    "window_size": (3, 0),
    "softmax_scale": 0.3,
    "softcap": 2.0,
    "alibi_slopes": np.float32([0.5, 0.25]),
    "sinks": np.float32([0.5, 0.25]),
    "dropout_p": 0.5,
    "seqused_q": np.int32([4]),
    "seqused_k": np.int32([3]),
    "deterministic": True,
    "return_lse": True,
    "layout": "bshd",
    "out": None,
}
KEYWORDS = set(cuflash.attention.__kwdefaults__)


def test_every_keyword_is_in_the_table():
    helpers = {"seed", "offset", "copy", "backend"}  # say how, not what
    assert set(FEATURES) - {"q, k, v", "strides"} == KEYWORDS - helpers - set(UNLANDED)
    assert set(EXAMPLES) | set(UNLANDED) | {"q, k, v", "strides"} == {row.keyword for row in cuflash.supports()}
    assert UNLANDED.keys() == NEAREST.keys()


@pytest.mark.parametrize("row", cuflash.supports(backend="numpy"), ids=lambda row: row.keyword)
def test_rows_hold(row):
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        q = np.random.default_rng(0).standard_normal((1, 8, 2, 16)).astype(numpy_dtype(dtype))
        k = v = q[:, ::2, :1] if row.keyword in ("q, k, v", "strides") else q
        keywords = {row.keyword: EXAMPLES.get(row.keyword, object())} if row.keyword in KEYWORDS else {}
        if row.keyword == "out":
            keywords["out"] = np.empty_like(q)
        if dtype in row.dtypes:
            result, pullback = cuflash.vjp(q, k, v, **keywords)
            out = result[0] if keywords.get("return_lse") else result
            assert np.isfinite(out.astype(np.float32)).all() and pullback(out).dq.dtype == q.dtype
        else:
            with pytest.raises(NotImplementedError, match=f"^{row.keyword} is not supported yet"):
                cuflash.attention(q, k, v, **keywords)


def test_rows_can_be_selected():
    assert {row.backend for row in cuflash.supports("causal")} == {"numpy", "cuda"}
    (row,) = cuflash.supports("causal", backend="cuda", dtype="bfloat16")
    assert row.dtypes == ("float16", "bfloat16")
    assert not cuflash.supports("causal", backend="cuda", dtype="float64")
    assert cuflash.supports("bias", backend="numpy")[0].dtypes == ()


@pytest.mark.parametrize("name", ["keyword", "backend", "dtype"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name} is 'none such'; it must be one of "):
        cuflash.supports(**{name: "none such"})


def test_backends_names_what_runs():
    assert set(cuflash.backends()) <= {"numpy", "cuda", "sm80", "sm90"} and "numpy" in cuflash.backends()


@pytest.mark.parametrize(("arch", "names"), [("sm_90a", ("sm80", "sm90")), ("sm_100", ("sm80",)), ("sm_80", ("sm80",))])
def test_backends_of_a_device(monkeypatch, arch, names):
    monkeypatch.setattr(DeviceInfo, "current", lambda index: DeviceInfo.named(arch))
    assert cuflash.backends() == ("numpy", "cuda", *names)
