"""What the compile tests compile: problems that together reach every tile row and every pair of features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from cuflash.device import DeviceInfo
from cuflash.plan import Plan, Step, plan_backward, plan_forward
from cuflash.problem import Problem, View
from cuflash.tiles import ANY, rows_for

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
PASSES = {"forward": plan_forward, "backward": plan_backward}

# Keywords of `problem` by the name of the feature that they turn on.
FEATURES = {
    "window_left": {"window_size": (100, None)},
    "causal": {"causal": True},
    "softcap": {"softcap": 10.0},
    "alibi": {"alibi": True},
    "dropout": {"dropout_p": 0.1},
    "sinks": {"sinks": True},
    "deterministic": {"deterministic": True},
    "negative_scale": {"softmax_scale": -0.1},
    "float16": {"dtype": "float16"},
    "narrow_rows": {"narrow": True},
}
PLAIN: tuple[str, ...] = ()
WITHOUT_EXTRAS = ("window_left", "causal", "sinks", "deterministic")
RICHEST = (*WITHOUT_EXTRAS, "softcap", "alibi", "dropout")
# The heaviest forms that a tile row must bear, by how many extras it serves (`TileRow.extras`).
HEAVIEST = {
    0: (WITHOUT_EXTRAS,),
    1: tuple((*WITHOUT_EXTRAS, extra) for extra in ("alibi", "dropout")),
    ANY: (RICHEST,),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile, and the plan that launches it."""

    arch: str
    plan: Plan
    step: Step
    label: str

    @property
    def id(self) -> str:
        return f"{self.arch}-{self.step.spec.entry}-{self.label}"

    @property
    def is_main(self) -> bool:
        """Whether this is the kernel with the matrix products."""
        return self.step.spec.entry.endswith("_sm80")


def problem(
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    dtype: str = "bfloat16",
    alibi: bool = False,
    sinks: bool = False,
    narrow: bool = False,
    **keywords: object,
) -> Problem:
    """A problem of some size; ``narrow`` makes rows of an odd number of elements, which are loaded one by one."""
    batch, seqlen, heads = 2, 1000, 8
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    q_and_k = View.of((batch, seqlen, heads, head_dim - narrow), dtype)
    views = {"q": q_and_k, "k": q_and_k, "v": View.of((batch, seqlen, heads, head_dim_v - narrow), dtype)}
    if alibi:
        views["alibi_slopes"] = View.of((heads,), "float32")
    if sinks:
        views["sinks"] = View.of((heads,), "float32")
    return Problem.build(views, **keywords)


def kernels_of(arch: str, pass_: str, features: tuple[str, ...], *head_dims: int) -> Iterator[Kernel]:
    keywords = {name: value for feature in features for name, value in FEATURES[feature].items()}
    if {"window_left", "causal"} <= set(features):
        keywords["window_size"] = (100, 0)
    plan = PASSES[pass_](problem(*head_dims, **keywords), DeviceInfo.named(arch))
    sizes = "x".join(map(str, head_dims))
    for step in plan.steps:
        yield Kernel(arch, plan, step, f"{sizes}-{'+'.join(features) or 'plain'}")


def tile_rows(arch: str, pass_: str) -> Iterator[Kernel]:
    """Every tile row of an architecture, at its largest head_dim, plain and in the heaviest forms that it serves."""
    for row in rows_for(DeviceInfo.named(arch).tile_family, pass_):
        for features in (PLAIN, *HEAVIEST[row.extras]):
            yield from kernels_of(arch, pass_, features, row.head_dim)


def feature_pairs(arch: str, pass_: str, *head_dims: int) -> Iterator[Kernel]:
    for pair in itertools.combinations(FEATURES, 2):
        yield from kernels_of(arch, pass_, pair, *head_dims)


def head_dim_pairs(arch: str, pass_: str) -> Iterator[Kernel]:
    """Every rounded head_dim, with equal and with extreme head_dim_v."""
    sizes = range(32, 257, 32)
    for pair in sorted({*zip(sizes, sizes, strict=True), *itertools.product((32, 256), sizes), (192, 128), (128, 192)}):
        yield from kernels_of(arch, pass_, PLAIN, *pair)
        yield from kernels_of(arch, pass_, RICHEST, *pair)


def distinct(kernels: Iterator[Kernel]) -> list[Kernel]:
    """The kernels without repetition: features that a kernel does not depend on leave its specification as it was."""
    return list({kernel.step.spec: kernel for kernel in reversed(list(kernels))}.values())[::-1]


def quick() -> list[Kernel]:
    """The plain kernels of one large and one small device."""
    rows = (row for arch in ("sm_86", "sm_90a") for pass_ in PASSES for row in tile_rows(arch, pass_))
    return distinct(kernel for kernel in rows if kernel.label.endswith("plain"))


def continuous() -> list[Kernel]:
    """What continuous integration compiles: all rows of all architectures, all pairs of features on one."""
    rows = (row for arch in ARCHS for pass_ in PASSES for row in tile_rows(arch, pass_))
    pairs = (pair for pass_ in PASSES for pair in feature_pairs("sm_90a", pass_, 128))
    return distinct(itertools.chain(rows, pairs))


def full() -> list[Kernel]:
    """Everything: all pairs of features and all head_dims on every architecture."""
    sized = itertools.product(ARCHS, PASSES, (64, 128, 256))
    pairs = (pair for arch, pass_, head_dim in sized for pair in feature_pairs(arch, pass_, head_dim))
    sizes = (kernel for arch in ARCHS for pass_ in PASSES for kernel in head_dim_pairs(arch, pass_))
    return distinct(itertools.chain(pairs, sizes))
