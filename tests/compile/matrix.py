"""What the compile tests compile: problems that together reach every tile row and every pair of features."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cuflash.device import DeviceInfo
from cuflash.plan import KernelSpec, Plan, Step
from cuflash.planner import plan_backward, plan_forward
from cuflash.problem import Problem, View
from cuflash.tiles import ANY, rows_for
from cuflash.tiles_sm90 import FORWARD, ForwardRow

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
    "key_padding": {"key_padding": True},
    "deterministic": {"deterministic": True},
    "negative_scale": {"softmax_scale": -0.1},
    "narrow_rows": {"narrow": True},
}
PLAIN: tuple[str, ...] = ()
WITHOUT_EXTRAS = ("window_left", "causal", "sinks", "key_padding", "deterministic")
RICHEST = (*WITHOUT_EXTRAS, "softcap", "alibi", "dropout")
# The heaviest forms that a portable tile row must bear, by how many extras it serves (`TileRow.extras`).
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
    features: tuple[str, ...]

    @property
    def id(self) -> str:
        problem, entry = self.plan.problem, self.step.spec.entry
        size = f"{problem.head_dim}x{problem.head_dim_v}-{problem.dtype}"
        if entry.endswith("_sm90"):
            size += f"-{problem.layout.seqlen_q}"  # which Hopper's rows depend on
        return f"{self.arch}-{entry}-{size}-{'+'.join(self.features) or 'plain'}"

    @property
    def is_main(self) -> bool:
        """Whether this is the kernel with the matrix products."""
        return self.step.spec.entry.endswith(("_sm80", "_sm90"))


def problem(
    head_dim: int,
    head_dim_v: int,
    *,
    seqlen: int = 4096,
    num_kv_heads: int = 8,
    dtype: str = "bfloat16",
    alibi: bool = False,
    sinks: bool = False,
    key_padding: bool = False,
    narrow: bool = False,
    **keywords: object,
) -> Problem:
    """A problem of some size; ``narrow`` makes rows of an odd number of elements, which are loaded one by one."""
    batch, heads = 2, 8
    shapes = {"q": (heads, head_dim), "k": (num_kv_heads, head_dim), "v": (num_kv_heads, head_dim_v)}
    views = {name: View.of((batch, seqlen, n, columns - narrow), dtype) for name, (n, columns) in shapes.items()}
    if alibi:
        views["alibi_slopes"] = View.of((heads,), "float32")
    if sinks:
        views["sinks"] = View.of((heads,), "float32")
    if key_padding:
        views |= {name: View.of((batch,), "int32") for name in ("seqused_q", "seqused_k")}
    return Problem.build(views, **keywords)


def kernels_of(
    arch: str, pass_: str, features: tuple[str, ...], head_dim: int, head_dim_v: int | None = None, **others: object
) -> Iterator[Kernel]:
    """The kernels of a pass: the portable ones, where ``kernels="sm90"`` does not ask for Hopper's."""
    keywords = {"kernels": "sm80"} | others
    for feature in features:
        keywords |= FEATURES[feature]
    if {"window_left", "causal"} <= set(features):
        keywords["window_size"] = (100, 0)
    plan = PASSES[pass_](problem(head_dim, head_dim_v or head_dim, **keywords), DeviceInfo.named(arch))
    for step in plan.steps:
        yield Kernel(arch, plan, step, features)


def tile_rows(arch: str, pass_: str) -> Iterator[Kernel]:
    """Every portable tile row of an architecture, at its largest head_dim, plain and in its heaviest forms."""
    for row in rows_for(DeviceInfo.named(arch).tile_family, pass_):
        for features in (PLAIN, *HEAVIEST[row.extras]):
            yield from kernels_of(arch, pass_, features, row.head_dim)


def hopper_rows() -> Iterator[Kernel]:
    """Every row of the Hopper forward, plain and in the heaviest form that it serves."""
    for row in FORWARD:
        size = {"head_dim": row.head_dim, "head_dim_v": row.head_dim_v, "seqlen": row.longest or 4096}
        for features in (PLAIN, heaviest(row)):
            yield from kernels_of("sm_90a", "forward", features, **size, kernels="sm90")


def heaviest(row: ForwardRow) -> tuple[str, ...]:
    """The most features that a row of the Hopper forward serves at once."""
    return RICHEST if row.extras == ANY else (*WITHOUT_EXTRAS, *("alibi", "softcap")[: row.extras])


def feature_pairs(arch: str, pass_: str, head_dim: int, kernels: str = "sm80") -> Iterator[Kernel]:
    for pair in itertools.combinations(FEATURES, 2):
        if kernels == "sm80" or "narrow_rows" not in pair:
            yield from kernels_of(arch, pass_, pair, head_dim, kernels=kernels)


def head_dim_pairs(arch: str, pass_: str) -> Iterator[Kernel]:
    """Every rounded head_dim, with equal and with extreme head_dim_v, in both dtypes."""
    sizes = range(32, 257, 32)
    pairs = sorted({*zip(sizes, sizes, strict=True), *itertools.product((32, 256), sizes), (192, 128), (128, 192)})
    for features, dtype, pair in itertools.product((PLAIN, RICHEST), ("bfloat16", "float16"), pairs):
        yield from kernels_of(arch, pass_, features, *pair, dtype=dtype)


def distinct(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels without repetition: features that a kernel does not depend on leave its specification as it was."""
    first: dict[KernelSpec, Kernel] = {}
    for kernel in kernels:
        first.setdefault(kernel.step.spec, kernel)
    return list(first.values())


def portable_rows() -> list[Kernel]:
    return [row for arch in ARCHS for pass_ in PASSES for row in tile_rows(arch, pass_)]


def quick() -> list[Kernel]:
    """The plain kernels of Hopper and of a device with little shared memory."""
    rows = itertools.chain(portable_rows(), hopper_rows())
    return distinct(row for row in rows if row.arch in ("sm_86", "sm_90a") and not row.features)


def continuous() -> list[Kernel]:
    """What continuous integration compiles: all rows of all architectures, all pairs of features on one."""
    pairs = [
        *feature_pairs("sm_90a", "forward", 128),
        *feature_pairs("sm_90a", "backward", 128),
        *feature_pairs("sm_90a", "forward", 128, kernels="sm90"),
    ]
    return distinct([*portable_rows(), *hopper_rows(), *(pair for pair in pairs if pair.is_main)])


def full() -> list[Kernel]:
    """Everything: all pairs of features and all head_dims on every architecture."""
    sized = itertools.product(ARCHS, PASSES, (64, 128, 256))
    pairs = [pair for arch, pass_, head_dim in sized for pair in feature_pairs(arch, pass_, head_dim)]
    hopper = [pair for size in (64, 192, 256) for pair in feature_pairs("sm_90a", "forward", size, kernels="sm90")]
    sizes = [kernel for arch in ARCHS for pass_ in PASSES for kernel in head_dim_pairs(arch, pass_)]
    return distinct([*pairs, *hopper, *sizes])
