"""The twin itself: it computes what the hardware computes, and it notices what the hardware would punish."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cuflash.cuda import source
from emulated import twin
from emulated.twin import Memory, Schedule, TwinError

PROBES = Path(__file__).parent / "probes"
SEEDS = range(10)

Run = Callable[..., np.ndarray]


class ProbeParams(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("input", "out", "turn")] + [("variant", ctypes.c_int)]


@pytest.fixture(scope="module")
def run() -> Run:
    """Runs a probe on ``data`` and returns its output, poisoned before."""
    text = "struct Bfloat16;\nstruct Float16;\n"
    text += source.flatten("probes.cu", (twin.TWIN_FOLDER, PROBES, source.kernels_folder()))
    entries = tuple(re.findall(r"^KERNEL\(.*?\) (\w+)\(", text, re.MULTILINE))
    library = twin.compile_text(text, entries)

    def run(
        entry: str,
        data: np.ndarray,
        out_shape: tuple[int, ...],
        dtype: type = np.float32,
        *,
        variant: int = 0,
        grid: int = 1,
        threads: int = 32,
        shared_bytes: int = 1024,
        schedule: Schedule = Schedule(),
        registered: bool = True,
        initial: float = np.nan,
    ) -> np.ndarray:
        out = np.full(out_shape, initial, np.float32).view(dtype)
        turn = np.zeros(1, np.int32)
        params = ProbeParams(data.ctypes.data, out.ctypes.data, turn.ctypes.data, variant)
        memory = Memory([data] if registered else [], [out, turn])
        kernel = twin.Kernel(library, entry)
        kernel.launch(
            ctypes.addressof(params),
            grid=grid,
            threads=threads,
            shared_bytes=shared_bytes,
            memory=memory,
            schedule=schedule,
        )
        return out

    return run


# What CUDA itself declares for the device, and what instructions are made of where one call of C++ does not do.
TWIN_ALONE = {
    "arch/common.cuh": "abs min max float2 float4 bit_cast round_to widen Shuffle exchange Vote give_first give_any",
    "arch/sm80.cuh": "MatrixLoad distribute_matrices Mma multiply_matrices",
    "arch/sm90.cuh": "MatrixStore gather_matrices is_float16",
}


def declarations(header: Path) -> set[str]:
    """Names, those of functions with the types of their parameters: overloads are told apart."""
    text = re.sub(r"//.*|alignas\(\d+\) |(,\s+)?Where where = {}", "", header.read_text())
    functions = re.findall(r"^(?:\w+ )+(\w+)(?:<\w+>)?\(([^{;]*)\)(?: {|;)", text, re.MULTILINE)
    types = [re.sub(r"(?<=[ &*])\w+(?=[,)]|$)", "", re.sub(r"\s+", " ", parameters)) for _, parameters in functions]
    others = re.findall(r"^(?:constexpr \w+|using|#define|struct) (\w+)(?=[ (;])", text, re.MULTILINE)
    return {f"{name}({of})" for (name, _), of in zip(functions, types, strict=True)} | set(others)


@pytest.mark.parametrize("name", TWIN_ALONE)
def test_twin_has_every_name_of_the_device(name: str) -> None:
    """And no other, so that a kernel which compiles for the one compiles for the other."""
    of_device, of_twin = (declarations(folder / name) for folder in (source.kernels_folder(), twin.TWIN_FOLDER))
    macros = ("PRODUCT", "CLUSTER_ATTRIBUTE", "CLUSTER_KERNEL_OF")  # that write instructions and attributes
    missing = {each for each in of_device - of_twin if not each.startswith(macros)}
    alone = {each.partition("(")[0] for each in of_twin - of_device}
    assert (missing, alone) == (set(), set(TWIN_ALONE[name].split()))


# ---- what the instructions compute ---------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix_hands_out_the_documented_fragments(run: Run, transposed: bool) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    entry = "load_transposed" if transposed else "load_plain"
    registers = run(entry, matrices, (32, 4), np.uint32)
    source_matrices = matrices.swapaxes(1, 2) if transposed else matrices
    for lane, i in np.ndindex(32, 4):
        low, high = source_matrices[i, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
        assert registers[lane, i] == int(low) | int(high) << 16


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_mma_is_bit_exact(run: Run, dtype: type) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(dtype), rng.standard_normal((8, 16)).astype(dtype)
    out = run(f"mma_{np.dtype(dtype).name}", np.concatenate([a, b]), (16, 8))
    expected = np.ones((16, 8), np.float32)
    for k in range(16):
        expected += a[:, k, None].astype(np.float32) * b[None, :, k].astype(np.float32)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_conversions_round_to_nearest_even(run: Run, dtype: type) -> None:
    # Every 16-bit value, the ties between neighbours, and their neighbours in float32; then what overflows.
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    specials = np.array([np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 65519.996, 65520.0, 1e-45], np.float32)
    values = np.concatenate([every, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), specials])
    values = np.resize(values.astype(np.float32), -(-len(values) // 32) * 32)
    out = run(f"convert_{np.dtype(dtype).name}", values, (len(values), 3), grid=len(values) // 32)

    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.stack([values, -values], axis=1).astype(dtype)
    packed = out[:, 0].copy().view(np.uint32)
    actual = np.stack([packed & 0xFFFF, packed >> 16], axis=1).astype(np.uint16).view(dtype)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(actual[numbers].view(np.uint16), expected[numbers].view(np.uint16))
    assert np.isnan(actual[~numbers].astype(np.float32)).all()
    np.testing.assert_array_equal(out[:, 1:], expected.astype(np.float32))


def test_shuffle(run: Run) -> None:
    data = np.arange(32, dtype=np.float32)
    for lane_mask in (1, 2, 4, 31):
        np.testing.assert_array_equal(run("shuffle", data, (32,), variant=lane_mask), data[np.arange(32) ^ lane_mask])


def test_votes_and_atomics(run: Run) -> None:
    data = np.arange(7, 39, dtype=np.int32)
    for variant, found in ((20, 100), (5, 0)):
        out = run("votes", data, (32,), np.int32, variant=variant)
        np.testing.assert_array_equal(np.sort(out), 7 + found + 1000 * np.arange(32))


# ---- copies and barriers -------------------------------------------------------------------------------------------


def run_pipeline(run: Run, variant: int, seed: int, detect_races: bool) -> bool:
    """Whether a pipeline of eight tiles gave the right sums."""
    data = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    expected = np.zeros(128, np.float32)
    for tile in data:
        expected += tile[::-1]
        expected += expected[np.arange(128) ^ 1]
    schedule = Schedule(seed, resident_blocks=1, detect_races=detect_races)
    out = run("pipeline", data, (128,), variant=variant, threads=128, schedule=schedule)
    return np.array_equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_right_pipeline_is_right_under_every_schedule(run: Run, seed: int) -> None:
    assert run_pipeline(run, 0, seed, detect_races=True)


WRONG_PIPELINES = {
    "no wait": (1, "is being copied to"),
    "no barrier": (2, "is being copied to|with no barrier in between"),
    "no commit": (3, "is being copied to"),
    "one stage": (4, "with no barrier in between"),
}


@pytest.mark.parametrize("name", WRONG_PIPELINES)
def test_wrong_pipelines_are_races(run: Run, name: str) -> None:
    variant, message = WRONG_PIPELINES[name]
    for seed in SEEDS:
        with pytest.raises(TwinError, match=message):
            run_pipeline(run, variant, seed, detect_races=True)


@pytest.mark.parametrize("name", WRONG_PIPELINES)
def test_wrong_pipelines_give_wrong_sums(run: Run, name: str) -> None:
    """Late copies and seeded schedules show the same bugs in the numbers."""
    variant, _ = WRONG_PIPELINES[name]
    assert not all(run_pipeline(run, variant, seed, detect_races=False) for seed in SEEDS)


def test_invalid_copy_touches_no_global_memory(run: Run) -> None:
    data = np.ones(4, np.float32)
    np.testing.assert_array_equal(run("invalid_copy", data, (32,), registered=False), np.zeros(32))
    with pytest.raises(TwinError, match="global read of 16 bytes .* lies in no array"):
        run("invalid_copy", data, (32,), registered=False, variant=1)


# ---- rules ---------------------------------------------------------------------------------------------------------

RACE = "race: this thread (reads|writes) .* was (written|read) by warp"
BROKEN_RULES = {
    "shared past the end": ("shared_bounds", 1, r"shared access of 4 bytes at offset \d+; the block has 128 bytes"),
    "shared before the base": ("shared_bounds", 2, "shared access of 4 bytes at offset -4"),
    "shared misaligned": ("shared_bounds", 3, r"shared access of 4 bytes at offset \d+ is misaligned"),
    "global read past the end": ("global_bounds", 1, "global read of 4 bytes .* lies in no array"),
    "global write past the end": ("global_bounds", 2, "global (read|write) of 4 bytes .* lies in no array"),
    "global misaligned": ("global_bounds", 3, "global access of 4 bytes .* is misaligned"),
    "write to an input": ("global_bounds", 4, "writes to array 0, which is an input"),
    "other collective": ("divergence", 1, r"lanes diverge: .*probes\.cu"),
    "other line": ("divergence", 2, r"lanes diverge: shuffle_xor here, shuffle_xor at .*probes\.cu"),
    "lane leaves": ("divergence", 3, "have left the kernel|leaves the kernel while others wait"),
    "lane misses a barrier": ("divergence", 4, "others wait in block_barrier|have left the kernel"),
    "warp misses a barrier": ("divergence", 5, "others wait at a block barrier|waits for warps that have left"),
    "warp leaves": ("divergence", 6, "others wait at a block barrier|waits for warps that have left"),
    "lane reads another's": ("races", 1, RACE),
    "lane overwrites another's": ("races", 2, RACE),
    "warp reads another's": ("races", 3, RACE),
    "warp overwrites another's": ("races", 4, RACE),
    "two threads write one word": ("races", 5, "race: this thread writes .* was written by warp"),
}
THREADS = {"divergence": 64, "races": 64}


def run_rule(run: Run, entry: str, variant: int, seed: int) -> None:
    threads = THREADS.get(entry, 32)
    shared_bytes = 128 if entry == "shared_bounds" else 1024
    data = np.zeros(32, np.float32)
    schedule = Schedule(seed)
    run(entry, data, (threads,), variant=variant, threads=threads, shared_bytes=shared_bytes, schedule=schedule)


@pytest.mark.parametrize("entry", sorted({entry for entry, _, _ in BROKEN_RULES.values()}))
def test_kept_rules_pass(run: Run, entry: str) -> None:
    for seed in SEEDS:
        run_rule(run, entry, 0, seed)


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_broken_rules_are_reported_where_they_are(run: Run, name: str) -> None:
    entry, variant, message = BROKEN_RULES[name]
    for seed in SEEDS:
        with pytest.raises(TwinError, match=rf"^probes/probes\.cu:\d+: block 0 warp \d lane \d+: .*({message})"):
            run_rule(run, entry, variant, seed)


# ---- blocks that wait for each other -------------------------------------------------------------------------------


def run_turns(run: Run, variant: int, seed: int, resident_blocks: int) -> bytes:
    """Eight blocks add numbers whose float32 sums depend on the order; the bits of the sums."""
    data = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    schedule = Schedule(seed, resident_blocks)
    return run("turns", data, (64,), variant=variant, grid=8, threads=64, schedule=schedule, initial=0.0).tobytes()


@pytest.mark.parametrize("resident_blocks", [1, 3, 8])
def test_turns_make_a_sum_repeatable(run: Run, resident_blocks: int) -> None:
    assert len({run_turns(run, 0, seed, resident_blocks) for seed in SEEDS}) == 1


@pytest.mark.parametrize("variant", [1, 2], ids=["no wait", "passes early"])
def test_a_missing_turn_shows_in_the_bits(run: Run, variant: int) -> None:
    assert len({run_turns(run, variant, seed, 4) for seed in SEEDS}) > 1


def test_waiting_for_a_later_block_is_a_deadlock(run: Run) -> None:
    with pytest.raises(TwinError, match="deadlock: waits for turn"):
        run_turns(run, 3, 0, resident_blocks=3)
