"""What the compiler makes of Hopper's backward in two kernels: registers, products, no addition in memory."""

from __future__ import annotations

import itertools
import re

import matrix
import pytest
from sass import disassemble, loops

from cuflash.cuda import nvrtc
from cuflash.cuda.source import translation_unit
from cuflash.tiles_sm90 import QUERIES

REGISTERS = 168  # a thread, before they change hands: all that 65536 allow three warpgroups
MASKS = (matrix.PLAIN, ("causal",), ("window_left",), ("window_left", "causal"))
EXTRAS = ("softcap", "alibi", "dropout")
FEATURES = [
    (*mask, *extras)
    for mask in MASKS
    for count in range(len(EXTRAS) + 1)
    for extras in itertools.combinations(EXTRAS, count)
] + [("negative_scale",), ("key_padding",), ("window_left", "causal", *EXTRAS, "key_padding")]
QUICK = (matrix.PLAIN, ("causal",), EXTRAS, ("window_left", "causal", *EXTRAS))
SMALLEST_AND_LARGEST = [(64, 64), (256, 256)]
TILE_SIZES = [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)]
# Those, their halves, and the multiples of 32 between them.
SIZES = [*TILE_SIZES, (96, 32), (160, 160), (224, 224), (256, 64), (64, 256)]

LAYOUT = {
    "backward_queries_sm90": """
static_assert(QueriesAndDouts::kBytes + Keys::kBytes + Values::kBytes + QueriesAndDouts::kBarriersBytes +
              Keys::kBarriersBytes + Values::kBarriersBytes == {shared_bytes});
static_assert(kBlockM == {q} && kBlockN == {k} && kThreads == {threads});
""",
    "backward_keys_sm90": """
static_assert(KeysAndValues::kBytes + Queries::kBytes + Douts::kBytes + 2 * kProbabilityBytes + 4 * kStatisticBytes +
              KeysAndValues::kBarriersBytes + Queries::kBarriersBytes + Douts::kBarriersBytes == {shared_bytes});
static_assert(kBlockM == {q} && kBlockN == {k} && kThreads == {threads});
""",
}


def kernel_of(entry: str, sizes: tuple[int, int], features: tuple[str, ...], dtype: str) -> matrix.Kernel | None:
    """The kernel of a backward that leaves dq to one of its own; None where other kernels do the rest."""
    features = (*features, "deterministic")
    steps = matrix.kernels_of("sm_90a", "backward", features, *sizes, dtype=dtype, kernels="sm90")
    return next((kernel for kernel in steps if kernel.step.spec.entry == entry), None)


def marks(sizes: tuple[int, int], names: tuple[str, ...], dtype: str) -> list[pytest.MarkDecorator]:
    if sizes not in TILE_SIZES or dtype != "bfloat16":
        return [pytest.mark.full]
    if sizes in SMALLEST_AND_LARGEST:
        return [] if names in QUICK else [pytest.mark.slow]
    return [pytest.mark.slow if names in QUICK else pytest.mark.full]


def cases() -> list:
    return [
        pytest.param(kernel, dtype, id=kernel.id, marks=marks(sizes, names, dtype))
        for entry, sizes, names, dtype in itertools.product(LAYOUT, SIZES, FEATURES, ("bfloat16", "float16"))
        if (kernel := kernel_of(entry, sizes, names, dtype))
    ]


@pytest.mark.parametrize(("kernel", "dtype"), cases())
def test_fits_registers_and_shared_memory(kernel, dtype):
    step = kernel.step
    layout = LAYOUT[step.spec.entry].format(shared_bytes=step.shared_bytes, threads=step.threads, **dict(step.boxes))
    report = nvrtc.compile_text(translation_unit(step.spec) + layout, step.spec.arch, name=step.spec.source)
    assert (report.spill_stores, report.spill_loads, report.stack) == (0, 0, 0)
    assert report.warnings == (), "C7508 to C7515: products wait for each other, or registers do not suffice"
    assert (report.registers, report.shared) == (REGISTERS, 0)
    assert kernel.plan.device.blocks_per_sm(step.threads, step.shared_bytes, report.registers) == 1


def product_loops(sass: str) -> list[list[str]]:
    """The shapes of the products of each loop that multiplies."""
    shapes = [re.findall(r"HGMMA\.(64x\d+)x16\.F32\.BF16", "\n".join(loop)) for loop in loops(sass)]
    return [products for products in shapes if products]


def sass_of(entry: str, sizes: tuple[int, int], folder) -> str:
    kernel = kernel_of(entry, sizes, matrix.PLAIN, "bfloat16")
    return disassemble(nvrtc.compile_spec(kernel.step.spec).cubin, folder)


@pytest.mark.parametrize("sizes", TILE_SIZES, ids=str)
def test_products_of_dq(sizes, tmp_path):
    """Scores and dP are as wide as a block of keys, dq as head_dim; only their results leave the registers."""
    head_dim, head_dim_v = sizes
    (found,) = product_loops(sass_of("backward_queries_sm90", sizes, tmp_path))
    keys = dict(kernel_of("backward_queries_sm90", sizes, matrix.PLAIN, "bfloat16").step.boxes)["k"]
    assert found == [f"64x{keys}"] * ((head_dim + head_dim_v) // 16) + [f"64x{head_dim}"] * (keys // 16)


@pytest.mark.parametrize("sizes", [(192, 128), (256, 256)], ids=str)
def test_products_of_dk_and_dv(sizes, tmp_path):
    """One warpgroup has scores and dv, the other dP and dk."""
    head_dim, head_dim_v = sizes
    found = product_loops(sass_of("backward_keys_sm90", sizes, tmp_path))
    scores_and_dv = ["64x64"] * (head_dim // 16) + [f"64x{head_dim_v}"] * (64 // 16)
    dp_and_dk = ["64x64"] * (head_dim_v // 16) + [f"64x{head_dim}"] * (64 // 16)
    assert sorted(found) == sorted([scores_and_dv, dp_and_dk])


@pytest.mark.parametrize("entry", LAYOUT)
def test_nothing_is_added_in_memory(entry, tmp_path):
    sass = sass_of(entry, (256, 256), tmp_path)
    assert not re.search(r"UBLKRED|\b(?:RED|ATOMG?)\.", sass)


def test_every_row_of_dq_is_compiled():
    rows = {
        kernel_of("backward_queries_sm90", sizes, names, "bfloat16").plan.dq_tile
        for sizes, names in itertools.product(TILE_SIZES, QUICK)
    }
    assert rows == set(QUERIES)
