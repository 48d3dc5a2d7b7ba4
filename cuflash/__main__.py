"""``python -m cuflash``: is it installed, is it right, what does it save. Subcommands: bench, warmup, explain."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

import cuflash
from cuflash.device import DeviceInfo, require_cupy
from cuflash.problem import Problem, View
from cuflash.testing import Arrays, ErrorReport, check, error_bound, numpy_dtype, random_arrays

LIBRARIES = ("numpy", "ml_dtypes", "cupy-cuda13x", "cupy-cuda12x", "torch", "jax")
ROOT = Path(__file__).resolve().parents[1]
BAR = 40  # characters of the longest bar
CHART_LENGTHS = {"numpy": (512, 1024, 2048, 4096), "cuda": (1024, 2048, 4096, 8192)}
OPTIONAL_OPERANDS = ("alibi_slopes", "sinks", "seqused_q", "seqused_k")

# Odd lengths, every feature once: enough to see that an installation computes the right thing.
SELF_CHECK: dict[str, dict[str, object]] = {
    "full": {},
    "causal, grouped heads": {"causal": True, "num_kv_heads": 2},
    "window, softcap": {"window_size": (37, 21), "softcap": 2.0},
    "ALiBi, sinks": {"alibi_slopes": True, "sinks": True, "causal": True},
    "dropout": {"dropout_p": 0.2, "seed": 7},
    "key padding": {"seqused_k": True, "seqused_q": True},
    "head_dim 111, head_dim_v 40": {"head_dim": 111, "head_dim_v": 40},
}


def versions() -> dict[str, str]:
    """Versions of everything whose version explains a difference between two machines."""
    found = {"cuflash": cuflash.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_line() -> str:
    """The GPU in a few words, or why there is none."""
    try:
        device = DeviceInfo.current(0)
    except RuntimeError as error:
        return f"no GPU: {error}"
    nvrtc = ".".join(map(str, require_cupy().cuda.nvrtc.getVersion()))
    return f"{device.name}, {device.arch}, {device.sm_count} SMs, NVRTC {nvrtc}"


def self_check_problem(keywords: dict[str, object], dtype: str) -> tuple[Problem, dict[str, object]]:
    """A small problem of a feature, and the keywords of the call that are not arrays."""
    options = dict(keywords)
    heads, kv_heads = 4, options.pop("num_kv_heads", 4)
    head_dim = options.pop("head_dim", 64)
    head_dim_v = options.pop("head_dim_v", head_dim)
    shapes = {
        "q": ((2, 113, heads, head_dim), dtype),
        "k": ((2, 143, kv_heads, head_dim), dtype),
        "v": ((2, 143, kv_heads, head_dim_v), dtype),
        "alibi_slopes": ((heads,), "float32"),
        "sinks": ((heads,), "float32"),
        "seqused_q": ((2,), "int32"),
        "seqused_k": ((2,), "int32"),
    }
    optional = {name for name in OPTIONAL_OPERANDS if not options.pop(name, False)}
    views = {name: View.of(*shape) for name, shape in shapes.items() if name not in optional}
    return Problem.build(views, **options), options


def self_check(backend: str) -> Iterable[tuple[str, ErrorReport]]:
    """Compare forward and backward of each feature with the float64 oracle."""
    dtypes = ("float32", "bfloat16") if backend == "numpy" else ("float16", "bfloat16")
    for number, (name, keywords) in enumerate(SELF_CHECK.items()):
        dtype = dtypes[number % 2]
        problem, options = self_check_problem(keywords, dtype)
        arrays = random_arrays(problem, seed=number)
        results = both_passes(arrays, backend, options)
        yield f"{name}, {dtype}", check(results, problem, arrays, error_bound(problem, arrays))


def both_passes(arrays: Arrays, backend: str, options: dict[str, object]) -> dict[str, np.ndarray]:
    """Results of forward and backward by name, on the host."""
    there, back = (np.asarray, np.asarray)
    if backend != "numpy":
        cupy = require_cupy()
        there, back = cupy.asarray, cupy.asnumpy
    q, k, v, dout = (there(x) for x in (arrays.q, arrays.k, arrays.v, arrays.dout))
    keywords = {name: there(x) for name, x in arrays.features.items() if x is not None} | options
    out, lse = cuflash.attention(q, k, v, return_lse=True, backend=backend, **keywords)
    gradients = cuflash.attention_backward(dout, q, k, v, out, lse, backend=backend, **keywords)
    found = {"out": out, "lse": lse, "dq": gradients.dq, "dk": gradients.dk, "dv": gradients.dv}
    if gradients.dsinks is not None:
        found["dsinks"] = gradients.dsinks
    return {name: back(array) for name, array in found.items()}


def standard_attention(xp: ModuleType, q, k, v):
    """The formula as it is written, (batch, heads, seqlen, seqlen) scores and all; causal."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = xp.matmul(q, k.swapaxes(2, 3)) * q.dtype.type(q.shape[-1] ** -0.5)
    scores = xp.where(xp.tri(q.shape[2], k.shape[2], dtype=bool), scores, q.dtype.type(-np.inf))
    scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    return xp.matmul(scores / scores.sum(axis=-1, keepdims=True), v).swapaxes(1, 2)


def measure_host(call: Callable[[], object]) -> tuple[float, float]:
    """(milliseconds, megabytes at the peak) of a NumPy computation."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin), peak / 1e6


def measure_device(call: Callable[[], object]) -> tuple[float, float]:
    """The same on the GPU; the peak is what a pool of its own had to take from the device."""
    cupy = require_cupy()
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        call()
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end), pool.total_bytes() / 1e6


def comparison(backend: str) -> list[tuple[int, str, float, float]]:
    """(length, name, milliseconds, megabytes) of standard and tiled attention, causal, by length."""
    on_host = backend == "numpy"
    xp, dtype, heads = (np, np.float32, 1) if on_host else (require_cupy(), np.float16, 16)
    rows = []
    for seqlen in CHART_LENGTHS[backend]:
        q, k, v = np.random.default_rng(0).standard_normal((3, 1, seqlen, heads, 64), dtype=np.float32).astype(dtype)
        q, k, v = (xp.asarray(x) for x in (q, k, v))
        for name, call in (
            ("standard", lambda: standard_attention(xp, q, k, v)),  # noqa: B023 - called before the next length
            ("tiled", lambda: cuflash.attention(q, k, v, causal=True)),  # noqa: B023
        ):
            rows.append((seqlen, name, *(measure_host if on_host else measure_device)(call)))
    return rows


def chart(rows: Sequence[tuple[int, str, float, float]]) -> str:
    """Bars of time and of memory, for a terminal."""
    lines = []
    for column, unit in ((2, "ms"), (3, "MB")):
        longest = max(row[column] for row in rows)
        lines.append({"ms": "time", "MB": "memory"}[unit])
        for row in rows:
            bar = "█" * max(1, round(BAR * row[column] / longest))
            lines.append(f"  {row[0]:6} {row[1]:8} {bar:{BAR}} {row[column]:9.2f} {unit}")
    return "\n".join(lines)


def usable_backends() -> list[str]:
    """Backends to check here: names that stand for the same kernels only once."""
    return [name for name in cuflash.backends() if name in CHART_LENGTHS]


def show_installation(_: argparse.Namespace) -> int:
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(device_line())
    print(f"backends: {', '.join(cuflash.backends())}")
    failed = 0
    for backend in usable_backends():
        print(f"\n{backend} against the float64 oracle, forward and backward; errors as shares of what is allowed")
        for name, report in self_check(backend):
            worst = max(max(error.max_ratio, error.mean_ratio) for error in report.outputs.values())
            print(f"  {'ok   ' if report.ok else 'WRONG'} {worst:5.2f}  {name}")
            failed += not report.ok
    show_comparison()
    if failed:
        print(f"\n{failed} checks failed")
    return 1 if failed else 0


def show_comparison() -> None:
    for backend in usable_backends():
        print(f"\nstandard attention and cuflash on {backend}, causal, by sequence length")
        print(chart(comparison(backend)))


def bench(arguments: list[str]) -> int:
    """Run the benchmarks of the checkout, or where only the package is installed a small comparison."""
    if (ROOT / "benchmarks" / "run.py").exists():
        sys.path.insert(0, str(ROOT))
        return importlib.import_module("benchmarks.run").main(arguments)
    if arguments:
        print("these arguments are for the benchmarks of a checkout, which this installation does not have")
        return 2
    show_comparison()
    return 0


def problem_arrays(args: argparse.Namespace, xp: ModuleType) -> tuple[list, dict[str, object]]:
    """Unfilled operands of the problem that the command line names, and the other keywords of the call."""
    seqlen_k, kv_heads = args.seqlen_k or args.seqlen_q, args.kv_heads or args.heads
    dtype = numpy_dtype(args.dtype)
    q = xp.empty((args.batch, args.seqlen_q, args.heads, args.head_dim), dtype)
    k = xp.empty((args.batch, seqlen_k, kv_heads, args.head_dim), dtype)
    v = xp.empty((args.batch, seqlen_k, kv_heads, args.head_dim_v or args.head_dim), dtype)
    keywords: dict[str, object] = {"causal": args.causal, "softcap": args.softcap, "deterministic": args.deterministic}
    if args.window:
        keywords["window_size"] = tuple(args.window)
    if args.dropout_p:
        keywords |= {"dropout_p": args.dropout_p, "seed": 0}
    for name in ("alibi_slopes", "sinks"):
        if getattr(args, name):
            keywords[name] = xp.empty((args.heads,), np.float32)
    return [q, k, v], keywords


def explain(args: argparse.Namespace) -> int:
    on_gpu = args.device is None and "cuda" in cuflash.backends()
    operands, keywords = problem_arrays(args, require_cupy() if on_gpu else np)
    print(cuflash.explain(*operands, device=args.device, **keywords))
    return 0


def warmup(args: argparse.Namespace) -> int:
    if "cuda" not in cuflash.backends():
        print(f"nothing to compile: {device_line()}")
        return 1
    operands, keywords = problem_arrays(args, require_cupy())
    plans = cuflash.explain(*operands, **keywords).plans
    specs = {step.spec for plan in plans for step in plan.steps}
    begin = time.perf_counter()
    for _ in _progress(importlib.import_module("cuflash.cuda.module").load_all(specs, 0), len(specs)):
        pass
    print(f"{len(specs)} kernels ready after {time.perf_counter() - begin:.2f} s")
    return 0


def _progress(steps: Iterable, total: int) -> Iterable:
    """A progress bar where rich, of the extra `bench`, is installed."""
    try:
        from rich.progress import track
    except ImportError:
        return steps
    return track(steps, "compiling kernels", total=total)


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="python -m cuflash", description="Check this installation of cuflash.")
    main_parser.set_defaults(run=show_installation)
    commands = main_parser.add_subparsers(title="subcommands")
    commands.add_parser("bench", help="time attention beside its peers")
    for name, run, text in (
        ("warmup", warmup, "compile the kernels of a problem ahead"),
        ("explain", explain, "say which kernels a problem would run, and how"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        _add_problem(command)
    command.add_argument("--device", help="plan for a named architecture, such as sm_90a, whatever this machine has")
    return main_parser


def _add_problem(command: argparse.ArgumentParser) -> None:
    for name, value in (("--batch", 1), ("--seqlen-q", 4096), ("--heads", 16), ("--head-dim", 128)):
        command.add_argument(name, type=int, default=value)
    for name in ("--seqlen-k", "--kv-heads", "--head-dim-v"):
        command.add_argument(name, type=int, help="the same as q's by default")
    command.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32", "float64"))
    command.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    command.add_argument("--softcap", type=float, default=0.0)
    command.add_argument("--dropout-p", type=float, default=0.0)
    for name in ("--causal", "--alibi-slopes", "--sinks", "--deterministic"):
        command.add_argument(name, action="store_true")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    # What follows `bench` is for the benchmarks, options included, which argparse would claim for itself.
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (TypeError, ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
