"""compute-sanitizer over one small case of each kernel family, into the record of the GPU tests.

    PYTHONPATH=.:tests python -m gpu.sanitize

Exits with 1 where a tool found anything. Racecheck is asked about the portable kernels, all of whose barriers it
follows, without exceptions; and about Hopper's, which hand shared memory over by `bar.arrive`. What it says of that is
weighed by what it says of a kernel that does nothing else (emulated/probes/handover.cu): once as the PTX manual has it,
once with a race. Reports like those that it makes of the right one are known to be none, and where it does not report
the race the record says that it cannot judge: the emulated level does.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from cases import Case

from cuflash.cuda import source
from cuflash.cuda.module import COMPILER_OPTIONS

FOUND = 9  # exit code of a tool that found something
# Reports that racecheck makes because it does not follow the copy engine: which text marks one, and why it is none.
BULK_COPY = "arch::copy_bytes_to_shared"
KNOWN_COPIES = "racecheck does not see that an mbarrier orders a bulk copy without a tensor map; tests/emulated does"
KNOWN_HANDOVERS = "racecheck reports the same of emulated/probes/handover.cu, which is right by the PTX manual"
PROBES = Path(__file__).parents[1] / "emulated" / "probes"
HANDOVER_THREADS, HANDOVER_BYTES = 256, 2 * 128 * 16
# Tool and backend of each entry of the record. initcheck does not see what the copy engine writes, so it watches the
# kernels that do without one.
RUNS = {
    "memcheck": ("memcheck", None),
    "racecheck": ("racecheck", None),
    "racecheck of portable kernels": ("racecheck", "sm80"),
    "synccheck": ("synccheck", None),
    "initcheck": ("initcheck", "sm80"),
}
UNJUDGED = "racecheck reports no race of a hand-over by bar.arrive that has one: it cannot judge; tests/emulated does"
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


def handover_text() -> str:
    """The probe as NVRTC compiles it."""
    text = source.flatten("handover.cu", (PROBES, source.kernels_folder()))
    return f"struct Bfloat16;\nstruct Float16;\n{text}\n"


def handover_child(early_read: bool) -> int:
    """The hand-over alone, right or with a race."""
    import cupy

    module = cupy.RawModule(code=handover_text(), options=(*COMPILER_OPTIONS, "-arch=sm_90a"))
    out = cupy.zeros(HANDOVER_THREADS // 2, cupy.float32)
    params = np.zeros((), np.dtype([("out", np.uint64), ("early_read", np.int32), ("padding", np.int32)]))
    params["out"], params["early_read"] = out.data.ptr, early_read
    arguments = (params.reshape(1),)
    module.get_function("hand_over")((1,), (HANDOVER_THREADS,), arguments, shared_mem=HANDOVER_BYTES)
    expected = 6 * (4 * np.arange(128) + 6) + 4 * 15
    wrong = not early_read and not np.array_equal(cupy.asnumpy(out), expected)
    print(f"hand-over: {'WRONG' if wrong else 'done'}", flush=True)
    return int(wrong)


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


def races_in(text: str) -> list[frozenset[str]]:
    """Of each of racecheck's reports, from its first line to an empty one, the functions of arch/ that it names."""
    reports = re.findall(r"Race reported between .*?(?=\n=+ *\n)", text, flags=re.DOTALL)
    return [frozenset(re.findall(r"\barch::\w+", report)) for report in reports]


def known_in(text: str, handovers: frozenset[frozenset[str]]) -> dict[str, int]:
    """How many of racecheck's reports are known to be none, by the reason."""
    races = races_in(text)
    counts = {
        KNOWN_COPIES: sum(BULK_COPY in names for names in races),
        KNOWN_HANDOVERS: sum(names in handovers for names in races if BULK_COPY not in names),
    }
    return {reason: count for reason, count in counts.items() if count}


def watched(tool: str, arguments: list[str], timeout: float) -> tuple[int, str]:
    """Exit code and output of this module under a tool."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "gpu.sanitize", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def ask_about_handovers(timeout: float) -> tuple[frozenset[frozenset[str]], dict[str, object]]:
    """What racecheck reports of a hand-over that is right, and for the record whether it reports one with a race."""
    answers = {kind: watched("racecheck", ["--handover", kind], timeout)[1] for kind in ("right", "race")}
    reports = {kind: races_in(text) for kind, text in answers.items()}
    entry = {f"reports_{kind}": len(races) for kind, races in reports.items()}
    if any(errors_in(text) is None for text in answers.values()):
        print(*answers.values(), sep="\n")
        entry |= {"outcome": "failed", "reason": "racecheck did not come to its summary"}
    elif not reports["race"]:
        entry |= {"outcome": "skipped", "reason": UNJUDGED}
    else:
        entry["outcome"] = "passed"
    return frozenset(names for names in reports["right"] if names), entry


def run_tool(
    tool: str, backend: str | None, timeout: float, handovers: frozenset[frozenset[str]] = frozenset()
) -> dict[str, object]:
    arguments = ["--child"] + (["--backend", backend] if backend else [])
    begin = time.perf_counter()
    try:
        code, text = watched(tool, arguments, timeout)
    except subprocess.TimeoutExpired:
        return {"outcome": "skipped", "reason": f"not done after {timeout:.0f} s"}
    errors = errors_in(text)
    entry: dict[str, object] = {"outcome": "passed", "errors": errors, "seconds": round(time.perf_counter() - begin, 1)}
    entry |= {"cases": [case.id for case in FAMILIES], "backend": backend or "cuda"}
    known = known_in(text, handovers) if tool == "racecheck" and backend is None else {}
    if known:
        entry["known"] = known
    wrong = code not in (0, FOUND) or "WRONG" in text
    if wrong or errors is None or errors > sum(known.values()) or (code and not known):
        entry |= {"outcome": "failed", "reason": f"exit code {code}"}
        print(text[-6000:])
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--handover", choices=("right", "race"), help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--timeout", type=float, default=130, help="seconds for each tool")
    args = parser.parse_args()
    if args.child:
        return child(args.backend)
    if args.handover:
        return handover_child(args.handover == "race")
    from gpu import gpu_record

    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on the PATH")
    for backend in {backend for _, backend in RUNS.values()}:  # compiles, without a tool's slowness
        choice = ["--backend", backend] if backend else []
        subprocess.run([sys.executable, "-m", "gpu.sanitize", "--child", *choice], check=True)
    entries, handovers = {}, frozenset()
    for name in args.runs.split(","):
        if name == "racecheck":
            handovers, entries["racecheck of a hand-over"] = ask_about_handovers(args.timeout)
        entries[name] = run_tool(*RUNS[name], args.timeout, handovers)
    for name, entry in entries.items():
        print(name, {key: value for key, value in entry.items() if key != "cases"}, flush=True)
    gpu_record.add("sanitizer", entries)
    return 1 if any(entry["outcome"] == "failed" for entry in entries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
