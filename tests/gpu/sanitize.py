"""compute-sanitizer over one small case of each kernel family, into the record of the GPU tests.

    PYTHONPATH=.:tests python -m gpu.sanitize

Exits with 1 where a tool found anything.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time

import numpy as np
from cases import Case

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9  # exit code of a tool that found something
# Reports that a tool makes because it does not follow the copy engine: which text marks one, and why it is none.
KNOWN = {
    "racecheck": (
        "arch::copy_bytes_to_shared",
        "racecheck does not see that an mbarrier orders a bulk copy without a tensor map; tests/emulated does",
    )
}
# initcheck does not see what the copy engine writes, so it watches the kernels that do without one.
BACKENDS = {"initcheck": "sm80"}
# Small, because a tool slows a kernel a hundredfold; odd lengths, so that every edge is met.
FAMILIES = [
    Case("d64-causal", seqlen_q=145, seqlen_k=203, causal=True),
    Case("d128-gqa", seqlen_q=113, seqlen_k=143, num_heads=4, head_dim=128),
    Case("d256-window", seqlen_q=113, seqlen_k=113, head_dim=256, window_size=(37, 21)),
    Case("d59-odd", seqlen_q=113, seqlen_k=77, head_dim=59, strides="odd"),
    Case("d64-rich", batch=2, num_heads=2, alibi="batch", softcap=2.0, sinks=True, dropout_p=0.1, dlse=True,
         seqused_q=(113, 65), seqused_k=(113, 40), causal=True, deterministic=True),
    Case("d128-padded", batch=2, head_dim=128, seqused_q=(113, 65), seqused_k=(113, 40)),
    Case("d192-padded", batch=2, head_dim=192, seqused_q=(113, 65), seqused_k=(113, 40)),
    Case("d64-packed", batch=2, seqlen_q=20, seqlen_k=203, num_heads=8, num_kv_heads=1),
]  # fmt: skip


def child(backend: str | None) -> int:
    """What a tool watches: every family once, each array an allocation of its own."""
    import cupy
    from gpu.calls import both_passes

    from cuflash.testing import check

    cupy.cuda.set_allocator(None)  # straight from CUDA, so that a tool knows where every array ends
    wrong = 0
    for case in FAMILIES:
        arrays = case.arrays()
        names = ("q", "k", "v", "dout", "dlse", "alibi_slopes", "sinks", "seqused_q", "seqused_k")
        given = {name: getattr(arrays, name) for name in names if getattr(arrays, name) is not None}
        operands = {name: to_device(cupy, array) for name, array in given.items()}
        results = both_passes(operands, **case.keywords, backend=backend)
        report = check({name: cupy.asnumpy(array) for name, array in results.items()}, case.problem(), arrays)
        wrong += not report.ok
        print(f"{case.id}: {'right' if report.ok else 'WRONG'}", flush=True)
    return 1 if wrong else 0


def to_device(cupy, host: np.ndarray):
    """The same numbers in the same strides where those matter, copied by the driver alone."""
    if host.flags.c_contiguous:
        return cupy.asarray(host)
    rows = host.base  # the poisoned memory that a strided case lies in
    start = (host.__array_interface__["data"][0] - rows.__array_interface__["data"][0]) // host.dtype.itemsize
    memory = cupy.asarray(np.nan_to_num(rows.astype(np.float32)).astype(rows.dtype))
    pointer = memory.data + start * host.dtype.itemsize
    return cupy.ndarray(host.shape, host.dtype, memptr=pointer, strides=host.strides)


def errors_in(text: str) -> int | None:
    """How many errors a tool reports; None where it did not come to its summary."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    return sum(int(number) for pair in found for number in pair if number) if found else None


def known_in(text: str, tool: str) -> int:
    """How many of racecheck's reports, each from its first line to an empty one, are known to be none."""
    if tool not in KNOWN:
        return 0
    reports = re.findall(r"Race reported between .*?(?=\n=+ *\n)", text, flags=re.DOTALL)
    return sum(KNOWN[tool][0] in report for report in reports)


def run_tool(tool: str, timeout: float) -> dict[str, object]:
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        sys.executable,
        "-m",
        "gpu.sanitize",
        "--child",
    ]
    if tool in BACKENDS:
        command += ["--backend", BACKENDS[tool]]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"outcome": "skipped", "reason": f"not done after {timeout:.0f} s"}
    text = done.stdout + done.stderr
    errors = errors_in(text)
    entry: dict[str, object] = {"outcome": "passed", "errors": errors, "seconds": round(time.perf_counter() - begin, 1)}
    entry |= {"cases": [case.id for case in FAMILIES], "backend": BACKENDS.get(tool, "cuda")}
    known = known_in(text, tool)
    if known:
        entry |= {"known": known, "known_reason": KNOWN[tool][1]}
    wrong = done.returncode not in (0, FOUND) or "WRONG" in text
    if wrong or errors is None or errors > known or (done.returncode and not known):
        entry |= {"outcome": "failed", "reason": f"exit code {done.returncode}"}
        print(text[-6000:])
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--timeout", type=float, default=130, help="seconds for each tool")
    args = parser.parse_args()
    if args.child:
        return child(args.backend)
    from gpu import gpu_record

    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on the PATH")
    for backend in {None, *BACKENDS.values()}:  # compiles, without a tool's slowness
        choice = ["--backend", backend] if backend else []
        subprocess.run([sys.executable, "-m", "gpu.sanitize", "--child", *choice], check=True)
    entries = {}
    for tool in args.tools.split(","):
        entries[tool] = run_tool(tool, args.timeout)
        print(tool, {key: value for key, value in entries[tool].items() if key != "cases"}, flush=True)
    gpu_record.add("sanitizer", entries)
    return 0 if all(entry["outcome"] == "passed" for entry in entries.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
