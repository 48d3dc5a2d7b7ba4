"""The twin's Hopper: it computes what the instructions compute, and it notices what the hardware would punish."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cuflash.cuda import source, tensor_map
from emulated import tensor_maps, twin
from emulated.emulation import view_of
from emulated.twin import Memory, Schedule, TwinError

PROBES = Path(__file__).parent / "probes"
SEEDS = range(10)
DTYPES = [ml_dtypes.bfloat16, np.float16]
CHUNK = 64  # columns of a box


Maps = ctypes.c_ubyte * (2 * tensor_map.BYTES)


class HopperParams(ctypes.Structure):
    _fields_ = [
        ("maps", Maps),
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("column", "row", "variant")),
        ("padding", ctypes.c_char * 36),  # the struct is as aligned as its maps
    ]


@pytest.fixture(scope="module")
def library() -> Path:
    text = "struct Bfloat16;\nstruct Float16;\n"
    text += source.flatten("hopper.cu", (twin.TWIN_FOLDER, PROBES, source.kernels_folder()))
    return twin.compile_text(text, tuple(re.findall(r"^KERNEL\(.*?\) (\w+)\(", text, re.MULTILINE)))


@pytest.fixture
def run(library: Path, monkeypatch: pytest.MonkeyPatch) -> functools.partial:
    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: tensor_maps.encode_tiled)
    return functools.partial(run_probe, library)


def run_probe(
    library: Path,
    entry: str,
    out: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    data: np.ndarray,
    *,
    boxes: tuple[int, int] = (64, 64),
    place: tuple[int, int] = (0, 0),
    variant: int = 0,
    grid: int = 1,
    threads: int = 32,
    shared_bytes: int = 9216,
    seed: int = 0,
    detect_races: bool = True,
) -> np.ndarray:
    """Run a probe on maps of ``a`` and ``b`` (rows, columns) in boxes of so many rows; returns ``out``."""
    maps = [encoded(array, rows) for array, rows in zip((a, b), boxes, strict=True)]
    params = HopperParams(Maps.from_buffer_copy(b"".join(maps)), data.ctypes.data, out.ctypes.data, *place, variant)
    twin.Kernel(library, entry).launch(
        ctypes.addressof(params),
        grid=grid,
        threads=threads,
        shared_bytes=shared_bytes,
        memory=Memory([a, data], [b, out]),
        schedule=Schedule(seed, detect_races=detect_races),
    )
    return out


def encoded(array: np.ndarray, box_rows: int) -> bytes:
    view = view_of(array[None, :, None])
    return tensor_map.Encoder(view, box_rows).encode(view.pointer)


def tile(rows: int, columns: int, dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)


class HandoverParams(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("early_read", ctypes.c_int), ("padding", ctypes.c_int)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("early_read", [False, True])
def test_a_hand_over_by_arrivals_is_ordered(early_read: bool, seed: int) -> None:
    """What compute-sanitizer is asked on a GPU: tests/gpu/sanitize.py."""
    text = "struct Bfloat16;\nstruct Float16;\n"
    text += source.flatten("handover.cu", (twin.TWIN_FOLDER, PROBES, source.kernels_folder()))
    out = np.full(128, np.nan, np.float32)
    params = HandoverParams(out.ctypes.data, early_read)
    kernel = twin.Kernel(twin.compile_text(text, ("hand_over",)), "hand_over")
    launch = functools.partial(
        kernel.launch,
        ctypes.addressof(params),
        grid=1,
        threads=256,
        shared_bytes=2 * 128 * 16,
        memory=Memory([], [out]),
        schedule=Schedule(seed),
    )
    if early_read:
        with pytest.raises(TwinError, match="race: this thread"):
            launch()
    else:
        launch()
        np.testing.assert_array_equal(out, 6 * (4 * np.arange(128) + 6) + 4 * 15)


def test_params_mirror_the_probes() -> None:
    assert ctypes.sizeof(HopperParams) % tensor_map.ALIGNMENT == 0


@pytest.mark.parametrize("pattern", [r"kHigh = (.+?);", r": (low\(.+?\)) \{\}"])
def test_descriptors_are_built_as_on_the_device(pattern: str) -> None:
    """The twin decodes every bit of a descriptor, but its `ProductOperand` is a copy: the same words make both."""
    device, host = (
        re.findall(pattern, (folder / "arch/sm90.cuh").read_text(), re.DOTALL)
        for folder in (source.kernels_folder(), twin.TWIN_FOLDER)
    )
    assert len(host) == 1
    assert device == host


# ---- what the instructions compute ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["shared", "shared_rows", "registers"])
def test_product_is_bit_exact(run: functools.partial, form: str, dtype: type) -> None:
    a, b = tile(64, 128, dtype), tile(128, 128, dtype, seed=1)
    expected = np.zeros((64, 128), np.float32)
    right = (b.T if form == "shared" else b).astype(np.float32)
    for k in range(128):
        expected += a[:, k, None].astype(np.float32) * right[None, k]
    for seed in SEEDS:
        out = run(
            f"product_{np.dtype(dtype).name}",
            np.full((64, 128), np.nan, np.float32),
            a,
            b,
            a,
            boxes=(64, 128),
            variant=["shared", "shared_rows", "registers"].index(form),
            threads=128,
            shared_bytes=6 * 8192 + 16,
            seed=seed,
        )
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("place", [(0, 0), (64, 0), (0, 64), (64, 64), (192, 0), (0, -3), (0, 1000)])
def test_boxes_are_swizzled_filled_with_zeros_and_clipped(run: functools.partial, place: tuple[int, int]) -> None:
    column, row = place
    a = tile(100, 88)
    stored = np.full_like(a, np.nan)
    raw = run("boxes", np.full(2048, np.nan, np.float32), a, stored, a, place=place)

    padded = np.zeros((2000, 400), a.dtype)
    padded[500:600, :88] = a
    box = padded[500 + row : 564 + row, column : column + CHUNK]
    pieces = raw.view(a.dtype).reshape(64, 8, 8)  # rows of eight pieces, piece p of row r at p ^ (r % 8)
    r, p = np.ogrid[:64, :8]
    np.testing.assert_array_equal(pieces[r, p ^ r % 8].reshape(64, CHUNK), box)

    expected = np.full_like(a, np.nan)
    rows, columns = slice(max(row, 0), max(row + 64, 0)), slice(column, column + CHUNK)
    expected[rows, columns] = a[rows, columns]
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_stored_as_lanes_bring_them(run: functools.partial, transposed: bool) -> None:
    registers = np.arange(32 * 4 * 2, dtype=np.uint16).view(np.uint32).reshape(32, 4)
    a = tile(64, 64)
    out = run("stored_matrices", np.zeros(128, np.float32), a, a.copy(), registers, variant=int(transposed))
    matrices = out.view(np.uint16).reshape(4, 8, 8)
    matrices = matrices.swapaxes(1, 2) if transposed else matrices
    for lane, i, half in np.ndindex(32, 4, 2):
        assert matrices[i, lane // 4, lane % 4 * 2 + half] == registers.view(np.uint16)[lane, 2 * i + half]


def test_floats_are_added(run: functools.partial) -> None:
    data = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    a = tile(64, 64)
    for seed in SEEDS:
        out = run("added_floats", np.ones(64, np.float32), a, a.copy(), data, grid=2, seed=seed)
        np.testing.assert_array_equal(out, 1 + 2 * data + 2 * data)


def test_encoder_has_the_drivers_rules(run: functools.partial) -> None:
    for array in (tile(64, 65)[:, 1:], tile(64, 60)):
        with pytest.raises(RuntimeError, match="returned 1 for sizes"):
            encoded(array, 64)
    with pytest.raises(RuntimeError, match="returned 1 for sizes"):
        encoded(tile(64, 64), 257)


# ---- rules ---------------------------------------------------------------------------------------------------------

BROKEN_RULES = {
    "barrier not fenced": ("copy_rules", 1, "fence_barrier_init is missing"),
    "no such barrier": ("copy_rules", 2, "there is no barrier at shared offset"),
    "copy not waited for": ("copy_rules", 3, "is being copied to|was copied to, with no wait"),
    "too many bytes announced": ("copy_rules", 4, r"deadlock: waits for the end of phase 0 .* 0 of 1 arrivals"),
    "too many arrivals": ("copy_rules", 5, "one arrival too many"),
    "box misaligned": ("copy_rules", 6, "no multiple of 128"),
    "no tensor map": ("copy_rules", 7, "this is no tensor map"),
    "box past the end": ("copy_rules", 8, "the block has 9216 bytes"),
    "floats not fenced": ("copy_rules", 9, "missing proxy fence"),
    "floats overwritten": ("copy_rules", 10, "writes .* has still to be read"),
    "floats not waited for": ("copy_rules", 11, "leaves the kernel without a wait"),
    "no named barrier": ("named_rules", 1, "race: this thread"),
    "other count": ("named_rules", 2, "threads here, for"),
    "no such number": ("named_rules", 3, "1 to 15 are free"),
    "nobody arrives": ("named_rules", 4, "deadlock: waits for named barrier 1, where 32 of 64 threads are missing"),
    "lanes differ": ("named_rules", 5, "lanes of a warp come to different named barriers"),
    "no product fence": ("product_rules", 1, "no product_fence since"),
    "operand not fenced": ("product_rules", 2, "missing proxy fence"),
    "operand of other warps": ("product_rules", 3, "race: this thread starts to read"),
    "accumulator written": ("product_rules", 5, "accumulator 5 of lane 0 was written while"),
    "register operand written": ("product_rules", 6, "left operand of lane 0 was written while"),
    "shared operand written": ("product_rules", 7, "race: this thread writes .* has still to be read"),
    "warps differ": ("product_rules", 8, "warps of a warpgroup diverge"),
    "other swizzle": ("product_rules", 9, "descriptor with swizzle mode 3|descriptor with swizzle mode 2"),
    "product not waited for": ("product_rules", 10, "leaves the kernel while this product is under way"),
    "product not committed": ("product_rules", 11, "leaves the kernel while this product is under way"),
    "nothing handed over": ("register_rules", 1, "deadlock: waits for 256 registers; 0 are free"),
    "no multiple of 8": ("register_rules", 2, "252 registers: multiples of 8"),
    "lowered to more": ("register_rules", 3, "lowers its registers from 248 to 256"),
}
THREADS = {"named_rules": 64, "product_rules": 128, "register_rules": 256}


def run_rule(run: functools.partial, entry: str, variant: int, seed: int) -> np.ndarray:
    a = tile(64, 64)
    out = np.zeros(4096, np.float32)
    return run(entry, out, a, a.copy(), a, variant=variant, threads=THREADS.get(entry, 32), seed=seed)


@pytest.mark.parametrize("entry", sorted({entry for entry, _, _ in BROKEN_RULES.values()}))
def test_kept_rules_pass(run: functools.partial, entry: str) -> None:
    for seed in SEEDS:
        run_rule(run, entry, 0, seed)


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_broken_rules_are_reported_where_they_are(run: functools.partial, name: str) -> None:
    entry, variant, message = BROKEN_RULES[name]
    for seed in SEEDS:
        with pytest.raises(TwinError, match=rf"^probes/hopper\.cu:\d+: block 0 warp \d lane \d+: .*({message})"):
            run_rule(run, entry, variant, seed)


def test_accumulators_hold_nan_until_the_wait(run: functools.partial) -> None:
    assert np.isnan(run_rule(run, "product_rules", 4, seed=0)).all()
