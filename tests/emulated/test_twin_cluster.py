"""The twin's clusters: blocks that reach each other's shared memory, and what is noticed where they do it wrong."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cuflash.cuda import source, tensor_map
from emulated import tensor_maps, twin
from emulated.emulation import view_of
from emulated.twin import Memory, Schedule, TwinError

PROBES = Path(__file__).parent / "probes"
SEEDS = range(10)
WARP = twin.WARP_SIZE
PART_ROWS = 16  # of a tile, that one block copies
ROUNDS = 12
SIZES = (1, 2, 4)
CLEARS = 16  # the variant of shared_tiles whose readers write to tiles before they release them


class ClusterParams(ctypes.Structure):
    _fields_ = [
        ("map", ctypes.c_ubyte * tensor_map.BYTES),
        ("out", ctypes.c_void_p),
        ("rounds", ctypes.c_int),
        ("variant", ctypes.c_int),
        ("padding", ctypes.c_char * 48),  # the struct is as aligned as its map
    ]


def test_params_mirror_the_probes() -> None:
    assert ctypes.sizeof(ClusterParams) % tensor_map.ALIGNMENT == 0


@functools.cache
def library(size: int) -> Path:
    text = f"struct Bfloat16;\nstruct Float16;\nconstexpr int kBlocks = {size};\n"
    text += source.flatten("cluster.cu", (twin.TWIN_FOLDER, PROBES, source.kernels_folder()))
    return twin.compile_text(text, tuple(re.findall(r"^CLUSTER_KERNEL\(.*?\) (\w+)\(", text, re.MULTILINE)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: tensor_maps.encode_tiled)
    return run_probe


def tiles(size: int, rounds: int = ROUNDS) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rounds * size * PART_ROWS, 64)).astype(np.float16)


def run_probe(
    entry: str,
    out: np.ndarray,
    *,
    size: int = 2,
    threads: int = 32,
    grid: int | None = None,
    rounds: int = ROUNDS,
    variant: int = 0,
    seed: int = 0,
    resident_blocks: int = 2,
) -> np.ndarray:
    a = tiles(size, rounds)
    view = view_of(a[None, :, None])
    encoded = tensor_map.Encoder(view, PART_ROWS).encode(view.pointer)
    params = ClusterParams(
        (ctypes.c_ubyte * tensor_map.BYTES).from_buffer_copy(encoded), out.ctypes.data, rounds, variant
    )
    twin.Kernel(library(size), entry).launch(
        ctypes.addressof(params),
        grid=size if grid is None else grid,
        threads=threads,
        shared_bytes=2 * size * PART_ROWS * 128 + 64,
        memory=Memory([a], [out]),
        schedule=Schedule(seed, resident_blocks),
    )
    return out


# ---- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", [0, CLEARS], ids=["as they come", "cleared"])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_come_to_all_blocks(run: Callable[..., np.ndarray], size: int, variant: int, seed: int) -> None:
    grid, resident = 3 * size, 1 + 2 * seed
    out = np.zeros((grid, ROUNDS, WARP), np.uint32)
    run("shared_tiles", out, size=size, threads=64, grid=grid, variant=variant, seed=seed, resident_blocks=resident)

    words = tiles(size).view(np.uint32).reshape(ROUNDS, size * PART_ROWS, 8, 4)  # rows of eight pieces
    row, piece = np.ogrid[: size * PART_ROWS, :8]
    swizzled = words[:, row, piece ^ row % 8].reshape(ROUNDS, size * PART_ROWS, WARP)
    np.testing.assert_array_equal(out, np.broadcast_to(swizzled.sum(axis=1, dtype=np.uint32), out.shape))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES)
def test_words_come_to_another_block(run: Callable[..., np.ndarray], size: int, seed: int) -> None:
    out = run("sent_words", np.zeros((2, WARP), np.int32), size=size, grid=2 * size, seed=seed)
    np.testing.assert_array_equal(out, np.full((2, WARP), 7 * np.arange(ROUNDS).sum()))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES)
def test_blocks_have_barriers_of_their_own(run: Callable[..., np.ndarray], size: int, seed: int) -> None:
    out = np.zeros((2 * size, 2 * WARP), np.int32)
    run("own_barriers", out, size=size, grid=2 * size, threads=64, seed=seed)
    block, thread = np.ogrid[: 2 * size, : 2 * WARP]
    np.testing.assert_array_equal(out, 200 * block + thread + (thread + WARP) % (2 * WARP))


DESCRIPTOR = r"(constexpr uint32 kDescriptorAddressBits = .*?;|: low\(.*?\{\})"


def test_descriptors_are_written_as_on_the_device() -> None:
    """What the twin makes of a descriptor says something about a GPU only if its bits are the same."""
    device, host = (
        re.findall(DESCRIPTOR, (folder / "arch" / "sm90.cuh").read_text())
        for folder in (source.kernels_folder(), twin.TWIN_FOLDER)
    )
    assert device == host and len(device) == 3


def test_clusters_are_whole(run: Callable[..., np.ndarray]) -> None:
    out = np.zeros((3, 2 * WARP), np.int32)
    with pytest.raises(TwinError, match="the grid is no multiple of the cluster's size"):
        run("own_barriers", out, grid=3, threads=64)


# ---- rules ---------------------------------------------------------------------------------------------------------

LEFT = "the block leaves the kernel, with no|has left the kernel|the block ends while this copy"
DEADLOCK = "deadlock: waits for the end of phase"
BROKEN_RULES = {
    "readers not waited for": ("shared_tiles", 1, "race: this thread (copies to|writes|reads)|one arrival too many"),
    "readers of other blocks not waited for": ("shared_tiles", 2, "race: this thread (copies to|writes|reads)"),
    "released before it is read": ("shared_tiles", 3, "race: this thread (copies to|writes|reads)"),
    "bytes announced in one block": ("shared_tiles", 4, rf"{DEADLOCK} 0 .* 1 of 1 arrivals and (0|-\d+) bytes"),
    "no barrier at the start": ("shared_tiles", 5, r"reaches into block \d with no barrier of the cluster since"),
    "barriers made after the barrier of the cluster": ("shared_tiles", 6, "there is no barrier|uses the barrier"),
    "barriers not fenced": ("shared_tiles", 7, "fence_barrier_init is missing|uses the barrier"),
    "no barrier at the end": ("shared_tiles", 8, LEFT),
    "copy to no rank": ("shared_tiles", 9, "there is no rank 2 in a cluster of 2 blocks"),
    "copy to nobody": ("shared_tiles", 10, "a copy to no block of the cluster"),
    "address in no rank": ("shared_tiles", 11, "there is no rank 2 in a cluster of 2 blocks"),
    "arrival at no barrier": ("shared_tiles", 12, r"there is no barrier at shared offset \d+ of block 1"),
    "warp leaves early": ("shared_tiles", 13, "others wait at a cluster barrier|a cluster barrier waits for warps"),
    "warp at another barrier": ("shared_tiles", 14, "deadlock: waits for warps at a cluster barrier"),
    "tile not waited for": ("shared_tiles", 15, LEFT),
    "cleared without a proxy fence": ("shared_tiles", CLEARS + 1, "missing proxy fence: .* of block [01]"),
    "word not waited for": ("sent_words", 1, f"race: this thread (reads|writes)|{DEADLOCK}"),
    "word over one that is read": ("sent_words", 2, "race: this thread (reads|writes)|one arrival too many"),
    "word and barrier apart": ("sent_words", 3, "a word for the block of rank 1, and a barrier of rank 0"),
    "word not announced": ("sent_words", 4, f"race: this thread (reads|writes)|{DEADLOCK}"),
    "one arrival too many": ("sent_words", 5, r"one arrival too many in .* at shared offset \d+ of block 1"),
    "block leaves before a word": ("sent_words", 6, LEFT),
    "warp misses its block's barrier": ("own_barriers", 1, "others wait at a block barrier|waits for warps that have"),
    "writes and a barrier of the cluster": ("own_barriers", 2, "race: this thread reads .* was written by block"),
    "writes and arrivals of another block": ("own_barriers", 3, "race: this thread reads .* was written by block"),
}
THREADS = {"shared_tiles": 64, "own_barriers": 64}
ONE_ROUND = {"bytes announced in one block", "tile not waited for", "word not waited for"}


@pytest.mark.parametrize("name", BROKEN_RULES)
def test_broken_rules_are_reported_where_they_are(run: Callable[..., np.ndarray], name: str) -> None:
    entry, variant, message = BROKEN_RULES[name]
    rounds = 1 if name in ONE_ROUND else ROUNDS
    for seed in SEEDS:
        out = np.zeros((2, ROUNDS, WARP), np.int32)
        with pytest.raises(TwinError, match=rf"^probes/cluster\.cu:\d+: block [01] warp [01] lane \d+: .*({message})"):
            run(entry, out, threads=THREADS.get(entry, WARP), rounds=rounds, variant=variant, seed=seed)
