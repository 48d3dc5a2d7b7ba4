"""Where measurements are kept: append-only CSV tables that carry the environment they were taken in."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import os
import platform
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED_FOLDERS = ("cuflash", "kernels_cu")

ENVIRONMENT_COLUMNS = ("date", "source_hash", "gpu", "driver", "nvrtc")
PROBLEM_COLUMNS = (
    "dtype", "batch", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "head_dim", "head_dim_v", "mask", "feature",
)  # fmt: skip
SPEED_COLUMNS = (
    *ENVIRONMENT_COLUMNS, "provider", "pass", *PROBLEM_COLUMNS,
    "run", "ms_median", "ms_p20", "ms_p80", "tflops", "max_error_ratio", "ok",
)  # fmt: skip
RUN_COLUMNS = (*ENVIRONMENT_COLUMNS, "run", "copy_tb_per_s", "matmul_tflops", "versions", "absent", "arguments")


def source_hash(root: Path = ROOT) -> str:
    """Content hash of the files that a measurement depends on, so that a record names the code it measured.

    Only names and contents count, so a checkout, an sdist and an edited tree are told apart without git.
    """
    digest = hashlib.sha256()
    for folder in MEASURED_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()[:16]


def gpu_name() -> str | None:
    """Name of the current device; None on a machine without one."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    except Exception:  # no CuPy, no driver or no device: all mean the same here
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} threads)"


def driver_version() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # NVML is optional; CUDA's own number is always there
        import cupy

        number = cupy.cuda.runtime.driverGetVersion()
        return f"CUDA {number // 1000}.{number % 1000 // 10}"


def nvrtc_version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def environment(root: Path = ROOT) -> dict[str, str]:
    """The first five columns of every table; on a machine without a GPU the processor stands in its column."""
    gpu = gpu_name()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "source_hash": source_hash(root),
        "gpu": gpu or f"none; {cpu_name()}",
        "driver": driver_version() if gpu else "",
        "nvrtc": nvrtc_version() if gpu else "",
    }


def new_run() -> str:
    """An id for the rows of one interleaved run."""
    return uuid.uuid4().hex[:8]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions among ``packages``; those not installed are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def append_rows(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to a table, making it (with its header) where it does not exist.

    A table whose header differs is refused: old rows keep the meaning they were written with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    for row in rows:
        if unknown := set(row) - set(columns):
            raise ValueError(f"{path.name} has no columns {sorted(unknown)}")
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != columns:
            raise ValueError(f"{path} has the columns {header}, not {columns}: move the old table aside")
        with path.open("a", newline="") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a table; an absent table is empty."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
