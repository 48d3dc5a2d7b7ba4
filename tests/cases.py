"""One list of attention problems, for the NumPy backend, the emulated kernels and the GPU alike.

A `Case` is pure data. A level takes the cases it can afford, ``select(max_pairs=...)``, and asks each for its problem
and its arrays; `CASES` itself holds float16 and bfloat16, what every level runs, and `WIDE_CASES` float32 and float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cuflash.problem import Problem, View
from cuflash.testing import Arrays, random_arrays

SMALL = 1 << 18  # score pairs: what the emulator runs in a fraction of a second


@dataclass(frozen=True, slots=True)
class Case:
    """One call of attention and of its backward.

    ``alibi`` is False, "head" or "batch" (slopes per head, or per batch and head); ``strides`` names how the arrays lie
    in memory (`MEMORY`).
    """

    id: str
    batch: int = 1
    seqlen_q: int = 113
    seqlen_k: int = 113
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    causal: bool | str = False
    window_size: tuple[int, int] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: bool | str = False
    sinks: bool = False
    dropout_p: float = 0.0
    dlse: bool = False
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    deterministic: bool = False
    strides: str = "contiguous"

    @property
    def num_pairs(self) -> int:
        """Scores of the whole call, visible or not: what a test of it costs."""
        return self.batch * self.num_heads * self.seqlen_q * self.seqlen_k

    @property
    def keywords(self) -> dict[str, object]:
        """Keywords of the public functions that are not arrays."""
        dropout = {"dropout_p": self.dropout_p, "seed": 0x1234_5678_9ABC, "offset": 3} if self.dropout_p else {}
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "deterministic": self.deterministic,
        } | dropout

    def problem(self) -> Problem:
        """The problem of contiguous arrays; a level that brings its own memory builds its own from `keywords`."""
        head_dim_v = self.head_dim_v or self.head_dim
        shapes = {
            "q": ((self.batch, self.seqlen_q, self.num_heads, self.head_dim), self.dtype),
            "k": ((self.batch, self.seqlen_k, self.num_kv_heads, self.head_dim), self.dtype),
            "v": ((self.batch, self.seqlen_k, self.num_kv_heads, head_dim_v), self.dtype),
        }
        if self.alibi:
            per_head = (self.num_heads,)
            shapes["alibi_slopes"] = ((self.batch, *per_head) if self.alibi == "batch" else per_head, "float32")
        if self.sinks:
            shapes["sinks"] = ((self.num_heads,), "float32")
        for name in ("seqused_q", "seqused_k"):
            if getattr(self, name) is not None:
                shapes[name] = ((self.batch,), "int32")
        return Problem.build({name: View.of(*spec) for name, spec in shapes.items()}, **self.keywords)

    def arrays(self, seed: int = 0) -> Arrays:
        """Operands on the host, lying in memory as ``strides`` says."""
        arrays = random_arrays(self.problem(), seed, dlse=self.dlse)
        for name in ("q", "k", "v", "dout"):
            setattr(arrays, name, MEMORY[self.strides](getattr(arrays, name)))
        for name in ("seqused_q", "seqused_k"):
            if getattr(self, name) is not None:
                setattr(arrays, name, np.array(getattr(self, name), np.int32))
        return arrays

    def __str__(self) -> str:
        return self.id


def poisoned(shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
    """Memory that no right answer can be read from."""
    return np.full(shape, np.nan, dtype)


def poison_unused(arrays: Arrays, poison: float = np.nan) -> None:
    """Fills every row past a used length: rows that are absent may hold anything."""
    for names, lengths in ((("q", "dout"), arrays.seqused_q), (("k", "v"), arrays.seqused_k)):
        for batch, length in enumerate(() if lengths is None else lengths):
            for name in names:
                getattr(arrays, name)[batch, length:] = poison
    if arrays.dlse is not None and arrays.seqused_q is not None:
        for batch, length in enumerate(arrays.seqused_q):
            arrays.dlse[batch, :, length:] = poison


def _transposed(array: np.ndarray) -> np.ndarray:
    """(batch, seqlen, heads, head_dim) seen in memory that is (batch, heads, seqlen, head_dim)."""
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)


def _sliced(array: np.ndarray) -> np.ndarray:
    """Every second row and some heads of a larger array, rows 16 bytes apart from a multiple of each other."""
    batch, seqlen, heads, head_dim = array.shape
    memory = poisoned((batch, 2 * seqlen, heads + 1, head_dim + 8), array.dtype)
    memory[:, ::2, 1:, :head_dim] = array
    return memory[:, ::2, 1:, :head_dim]


def _odd(array: np.ndarray) -> np.ndarray:
    """Rows that start at odd elements: no load wider than one element is aligned."""
    memory = poisoned((*array.shape[:3], array.shape[3] + 3), array.dtype)
    memory[..., 1:-2] = array
    return memory[..., 1:-2]


def _reversed(array: np.ndarray) -> np.ndarray:
    """Rows that run backwards through memory."""
    return np.ascontiguousarray(array[:, ::-1])[:, ::-1]


MEMORY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda array: array,
    "transposed": _transposed,
    "sliced": _sliced,
    "odd": _odd,
    "reversed": _reversed,
}

# Every mask and modifier on its own, and with each other one below.
FEATURES: dict[str, dict[str, object]] = {
    "causal": {"causal": True},
    "window": {"window_size": (37, 21)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "head"},
    "sinks": {"sinks": True, "num_heads": 8, "num_kv_heads": 8},  # dsinks has one number per head
    "dropout": {"dropout_p": 0.3},
    "dlse": {"dlse": True},
    "gqa": {"num_heads": 8, "num_kv_heads": 2},
    "used": {"batch": 2, "seqused_q": (113, 50), "seqused_k": (77, 143)},
}
RICHEST = {"num_heads": 8, "num_kv_heads": 2, "causal": True, "window_size": (90, -1), "softcap": 2.0, "alibi": "batch"}
RICHEST |= {"sinks": True, "dropout_p": 0.1, "dlse": True, "batch": 2, "seqused_q": (113, 65), "seqused_k": (143, 40)}


def _sequences(seqlen_q: int, seqlen_k: int) -> dict[str, int]:
    """Lengths, and the shorter the more sequences: rounding errors of a few rows say nothing about their bound."""
    shortest = min(seqlen_q, seqlen_k)
    batch, heads = (4, 8) if shortest < 16 else (2, 4) if shortest < 128 else (1, 2)
    return {"batch": batch, "num_heads": heads, "num_kv_heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}


def _lengths() -> list[Case]:
    square = [1, 2, 63, 64, 65, 113, 127, 128, 129, 203, 511, 512, 1023, 1024]
    cases = [Case(f"length-{n}", **_sequences(n, n)) for n in square]
    pairs = [(1, 128), (1, 203), (2, 511), (64, 1), (64, 129), (65, 64), (113, 203), (129, 63), (203, 113), (511, 2)]
    pairs += [(512, 1023), (1023, 512)]
    for (seqlen_q, seqlen_k), causal in itertools.product(pairs, (False, True, "top_left")):
        mask = {False: "full", True: "causal"}.get(causal, "causal-top-left")
        name = f"length-{seqlen_q}x{seqlen_k}-{mask}"
        cases.append(Case(name, **_sequences(seqlen_q, seqlen_k), causal=causal))
    cases += [
        Case("length-zero-queries", seqlen_q=0),
        Case("length-zero-keys", seqlen_k=0),
        Case("length-zero-keys-sinks", **FEATURES["sinks"], seqlen_k=0, dlse=True),
        Case("length-zero-both", seqlen_q=0, seqlen_k=0),
        Case("length-zero-batch", batch=0),
    ]
    return cases


def _head_dims() -> list[Case]:
    equal = [1, 2, 16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
    unequal = [(64, 32), (40, 59), (192, 128), (128, 192), (64, 256), (256, 1)]
    return [
        Case(f"head-dim-{d}-{d_v}-{dtype}", seqlen_k=129, head_dim=d, head_dim_v=d_v, dtype=dtype, causal=causal)
        for d, d_v in [(d, d) for d in equal] + unequal
        for dtype, causal in (("bfloat16", True), ("float16", False))
    ]


def _heads() -> list[Case]:
    return [
        Case(f"heads-{heads}-{kv_heads}", batch=2, seqlen_k=77, num_heads=heads, num_kv_heads=kv_heads, causal=True)
        for heads, kv_heads in ((1, 1), (3, 3), (4, 1), (6, 2), (8, 1), (8, 2), (16, 2))
    ]


def _few_queries() -> list[Case]:
    """Groups of heads with few queries each, which may share a tile: within a block, at its end, in several blocks."""
    shapes = [(1, 203, 8, 1, 64), (5, 143, 16, 2, 128), (16, 203, 16, 1, 64), (17, 143, 8, 2, 128), (33, 129, 8, 1, 64)]
    shapes += [(64, 129, 6, 3, 128), (130, 203, 8, 1, 64), (20, 77, 8, 2, 256), (9, 203, 24, 2, 192)]
    cases = [
        Case(f"few-queries-{n_q}x{n_k}-{heads}-{kv_heads}-{d}", batch=1 + (n_q < 100), seqlen_q=n_q, seqlen_k=n_k,
             num_heads=heads, num_kv_heads=kv_heads, head_dim=d, head_dim_v=128 if d == 192 else d, causal=causal)
        for (n_q, n_k, heads, kv_heads, d), causal in zip(shapes, itertools.cycle((True, False)))
    ]  # fmt: skip
    rich = RICHEST | {"num_kv_heads": 1, "seqlen_q": 20, "seqlen_k": 143, "seqused_q": (20, 9), "head_dim": 128}
    return [*cases, Case("few-queries-richest", **rich), Case("few-queries-window", **rich | {"window_size": (30, 5)})]


def _masks() -> list[Case]:
    windows = [(0, 0), (5, 0), (0, 9), (64, 64), (-1, 3), (3, -1), (1000, 1000), (129, 17)]
    cases = [
        Case(f"window-{left}-{right}-{n_q}x{n_k}", seqlen_q=n_q, seqlen_k=n_k, window_size=(left, right))
        for (left, right), (n_q, n_k) in itertools.product(windows, ((203, 203), (65, 203), (203, 65)))
    ]
    cases += [
        Case("window-causal", seqlen_q=203, seqlen_k=229, window_size=(31, 31), causal=True),
        Case("window-causal-top-left", seqlen_q=203, seqlen_k=229, window_size=(31, 31), causal="top_left"),
        Case("window-top-left-empty-tail", seqlen_q=300, seqlen_k=65, window_size=(20, 0), causal="top_left"),
    ]
    return cases


def _features() -> list[Case]:
    shape = {"seqlen_k": 143, "head_dim": 64}
    cases = [Case(name, **shape | keywords) for name, keywords in FEATURES.items()]
    cases += [Case(f"{name}-float16", **shape | keywords, dtype="float16") for name, keywords in FEATURES.items()]
    for (first, a), (second, b) in itertools.combinations(FEATURES.items(), 2):
        cases.append(Case(f"{first}+{second}", **shape | a | b))
    cases += [
        Case("softmax-scale", softmax_scale=0.7),
        Case("softmax-scale-negative", softmax_scale=-0.05),
        Case("softcap-large", softcap=50.0, softmax_scale=2.0),
        Case("alibi-batch", batch=3, alibi="batch", seqlen_k=67),
        Case("alibi-top-left", alibi="head", causal="top_left", seqlen_k=67),
        Case("dropout-tiny", dropout_p=1e-6),
        Case("dropout-large", dropout_p=0.9, seqlen_k=203),
        Case("empty-rows", seqlen_q=203, seqlen_k=65, causal=True, dlse=True),
        Case("empty-rows-sinks", **FEATURES["sinks"], seqlen_q=203, seqlen_k=65, causal=True, dlse=True),
        Case("used-zero", batch=4, seqused_q=(0, 113, 0, 1), seqused_k=(50, 0, 0, 1), causal=True),
        Case("used-zero-sinks", **FEATURES["sinks"], batch=3, seqused_q=(0, 113, 20), seqused_k=(50, 0, 9), dlse=True),
        Case("used-k-tile-edges", batch=3, seqlen_k=256, seqused_k=(64, 128, 129)),
        Case("used-q-tile-edges", batch=3, seqlen_q=256, seqused_q=(64, 128, 129), causal=True),
        Case("deterministic", seqlen_q=203, seqlen_k=203, num_heads=4, num_kv_heads=2, causal=True, deterministic=True),
    ]
    cases += [Case(f"richest-{d}-{dtype}", **RICHEST, seqlen_k=143, head_dim=d, dtype=dtype)
              for d, dtype in ((64, "bfloat16"), (59, "float16"), (128, "float16"), (256, "bfloat16"))]  # fmt: skip
    return cases


def _memory() -> list[Case]:
    return [
        Case(f"strides-{strides}-{d}", batch=2, num_heads=4, num_kv_heads=2, seqlen_k=67, head_dim=d, head_dim_v=d_v,
             causal=True, strides=strides)
        for strides, (d, d_v) in itertools.product(tuple(MEMORY)[1:], ((64, 64), (40, 96), (59, 59)))
    ]  # fmt: skip


def _large() -> list[Case]:
    shape = {"seqlen_q": 777, "seqlen_k": 1024, "head_dim": 128}
    return [
        Case("large", **shape),
        Case("large-causal-gqa", **shape, num_heads=4, num_kv_heads=1, causal=True, dtype="float16"),
        Case("large-window-sinks", **shape, num_heads=4, window_size=(200, 0), sinks=True),
        Case("large-192-128", **shape | {"head_dim": 192}, head_dim_v=128, causal=True),
    ]


CASES: list[Case] = [*_lengths(), *_head_dims(), *_heads(), *_few_queries(), *_masks(), *_features(), *_memory()]
CASES += _large()

_WIDE_SOURCES = ("length-113x203-causal", "length-203x113-full", "head-dim-59-59-float16", "head-dim-64-32-bfloat16")
_WIDE_SOURCES += ("heads-8-2", "window-5-0-65x203", "empty-rows-sinks", "used-zero-sinks", "dropout-large")
_WIDE_SOURCES += ("strides-reversed-40", "richest-64-bfloat16", *FEATURES)
WIDE_CASES: list[Case] = [
    replace(case, id=f"{case.id.removesuffix('-' + case.dtype)}-{dtype}", dtype=dtype)
    for case in CASES
    if case.id in _WIDE_SOURCES
    for dtype in ("float32", "float64")
]


_PADDED = {"batch": 5, "seqlen_q": 203, "seqused_q": (150, 101, 203, 0, 9), "seqused_k": (150, 256, 0, 140, 333)}
# Query blocks that share what is copied for their cluster, some without queries of their own; more than run at once.
IN_CLUSTERS: dict[str, Case] = {
    "consumers in turn": Case("turns", seqlen_q=1280, seqlen_k=170, num_heads=1, num_kv_heads=1, head_dim=256),
    "three consumers": Case("three", seqlen_q=380, seqlen_k=450, sinks=True),
    "heads of a group": Case("heads", seqlen_q=203, seqlen_k=333, num_heads=4, num_kv_heads=2, head_dim=128),
    "shared output staging": Case("192", seqlen_q=203, seqlen_k=450, head_dim=192, dtype="float16"),
    "padded queries and keys": Case("padded", **_PADDED, seqlen_k=333, head_dim=128),
    "dropout": Case("dropout", seqlen_q=203, seqlen_k=333, head_dim=128, dropout_p=0.2, alibi="head"),
}


def select(max_pairs: int = SMALL, cases: list[Case] = CASES) -> list[Case]:
    """The cases of at most ``max_pairs`` scores."""
    return [case for case in cases if case.num_pairs <= max_pairs]
