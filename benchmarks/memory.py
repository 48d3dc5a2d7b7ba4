"""Memory that attention needs beside its operands, by length and library, and one run at a million tokens.

    PYTHONPATH=. python -m benchmarks.memory
    PYTHONPATH=. python -m benchmarks.memory --million
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import record
from benchmarks.inputs import random_inputs
from benchmarks.providers import PROVIDERS, available, reason
from benchmarks.reference import MAX_FACTOR, TINY_FACTOR
from benchmarks.run import release_memory
from benchmarks.workloads import Cell, square

COLUMNS = (
    *record.ENVIRONMENT_COLUMNS, "provider", "pass", *record.PROBLEM_COLUMNS,
    "extra_bytes", "allowed_bytes", "ms", "max_error_ratio", "ok",
)  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
MEASURED = ("cuflash", "torch_flash", "torch_cudnn", "torch_math", "fa3", "fa4")
ALLOCATION_STEP = 512  # CuPy's pool rounds every allocation up to this
MAX_BLOCK = 128  # query rows that per-row values may be padded to


def allowed_bytes(cell: Cell, pass_: str) -> int:
    """What the contract allows: out and lse; gradients, one float32 dq and two float32 values a row."""
    itemsize = 2  # of float16 and bfloat16
    rows = cell.batch * cell.num_heads * cell.seqlen_q
    keys = cell.batch * cell.num_kv_heads * cell.seqlen_k
    if pass_ == "fwd":
        return rows * (itemsize * cell.head_dim_v + 4) + 2 * ALLOCATION_STEP
    padded = cell.batch * cell.num_heads * -(-cell.seqlen_q // MAX_BLOCK) * MAX_BLOCK
    wide = -(-cell.head_dim // 32) * 32
    gradients = itemsize * (rows * cell.head_dim + keys * (cell.head_dim + cell.head_dim_v))
    return gradients + padded * (4 * wide + 2 * 4) + 8 * ALLOCATION_STEP


def cupy_peak(call: Callable[[], object]) -> int:
    """Most bytes that ``call`` held at once in CuPy's pool, results included."""
    import cupy

    class Peak(cupy.cuda.MemoryHook):
        name = "peak"
        live = peak = 0

        def malloc_postprocess(self, device_id, size, mem_size, mem_ptr, pmem_id):
            self.live += mem_size
            self.peak = max(self.peak, self.live)

        def free_postprocess(self, device_id, mem_size, mem_ptr, pmem_id):
            self.live -= mem_size

    with Peak() as hook:
        result = call()
        cupy.cuda.Device().synchronize()
        del result
    return hook.peak


def torch_peak(call: Callable[[], object]) -> int:
    """The same in PyTorch's allocator."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def by_length(names: list[str], lengths: list[int], console: Console) -> list[dict]:
    import cupy

    providers, absent = available(names)
    for name, why in absent.items():
        console.print(f"[yellow]{name} is absent:[/] {why}")
    environment, rows = record.environment(), []
    for cell in (square(128, seqlen, "causal", batch=1) for seqlen in lengths):
        arrays = random_inputs(cell, cupy)
        for provider in providers:
            if provider.unsupported(cell, "fwd"):
                continue
            peak = cupy_peak if provider.name.startswith("cuflash") else torch_peak
            try:
                bound = provider.bind(cell, arrays)
                for pass_, call in (("fwd", bound.forward), ("bwd", bound.backward)):
                    call()  # what is kept from the first call (the forward's graph, workspaces) is not counted again
                    extra = peak(call)
                    row = {**environment, "provider": provider.name, "pass": pass_, **cell.problem_columns()}
                    row["extra_bytes"] = extra
                    if provider.name.startswith("cuflash"):
                        row |= {"allowed_bytes": allowed_bytes(cell, pass_), "ok": extra <= allowed_bytes(cell, pass_)}
                    rows.append(row)
                    console.print(f"{provider.name:12} {cell.name:20} {pass_} {extra / 2**20:10.2f} MiB {row.get('ok', '')}")
            except Exception as error:
                console.print(f"[red]{provider.name} {cell.name}:[/] {reason(error)}")
            bound = None
            release_memory()
    return rows


def million_cell(seqlen: int) -> Cell:
    """One group of two query heads on one key/value head."""
    return Cell(1, seqlen, seqlen, 2, 1, 128, 128, "causal")


def million(seqlen: int, console: Console) -> list[dict]:
    """Forward and backward at a million tokens, sampled rows and keys checked against float64."""
    import cupy

    from cuflash import attention, attention_backward

    cell = million_cell(seqlen)
    arrays = random_inputs(cell, cupy)
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    small = {name: array[:, :256] for name, array in arrays.items()}
    warm_out, warm_lse = attention(small["q"], small["k"], small["v"], causal=True, return_lse=True)
    attention_backward(small["dout"], small["q"], small["k"], small["v"], warm_out, warm_lse, causal=True)

    results: dict = {}

    def forward():
        results["out"], results["lse"] = attention(q, k, v, causal=True, return_lse=True)

    def backward():
        results["gradients"] = attention_backward(dout, q, k, v, results["out"], results["lse"], causal=True)

    environment, rows = record.environment(), []
    for pass_, call in (("fwd", forward), ("bwd", backward)):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        extra = cupy_peak(call)
        end.record()
        end.synchronize()
        check = sampled_row_ratio if pass_ == "fwd" else sampled_gradient_ratio
        ratio = check(cell, arrays, results)
        allowed = allowed_bytes(cell, pass_)
        row = {
            **environment, "provider": "cuflash", "pass": pass_, **cell.problem_columns(), "extra_bytes": extra,
            "allowed_bytes": allowed, "ms": f"{cupy.cuda.get_elapsed_time(begin, end):.6g}",
            "max_error_ratio": f"{ratio:.4g}", "ok": ratio <= 1 and extra <= allowed,
        }  # fmt: skip
        rows.append(row)
        console.print(f"{seqlen} tokens {pass_}: {row['ms']} ms, {extra / 2**20:.1f} MiB, {ratio:.3f} of the error bound")
        gc.collect()
    return rows


def sampled_row_ratio(cell: Cell, arrays: dict, results: dict, samples: int = 32) -> float:
    """Worst error over bound of ``out`` and ``lse`` at query rows spread over the sequence, the first and last included."""
    worst = 0.0
    for i in np.linspace(0, cell.seqlen_q - 1, samples).astype(int):
        for head in range(cell.num_heads):
            exact = _row(cell, arrays, i, head, np.float64)
            low = _row(cell, arrays, i, head, np.float32, round_to=arrays["q"].dtype)
            actual = results["out"][0, i, head], results["lse"][0, head, i]
            worst = max(worst, *(_ratio(*triple, i + 1) for triple in zip(actual, low, exact, strict=True)))
    return worst


def sampled_gradient_ratio(cell: Cell, arrays: dict, results: dict, samples: int = 16) -> float:
    """The same for dq at sampled queries, and dk and dv at sampled keys from the lse of every query."""
    gradients, worst = results["gradients"], 0.0
    for position in np.linspace(0, cell.seqlen_q - 1, samples).astype(int):
        for gradients_of, actual in (
            (_key_gradients, (gradients.dk[0, position, 0], gradients.dv[0, position, 0])),
            (_query_gradients, tuple(gradients.dq[0, position, head] for head in range(cell.num_heads))),
        ):
            exact = gradients_of(cell, arrays, results, position, np.float64, None)
            low = gradients_of(cell, arrays, results, position, np.float32, arrays["q"].dtype)
            worst = max(worst, *(_ratio(*triple, cell.seqlen_k) for triple in zip(actual, low, exact, strict=True)))
    return worst


def _rounder(round_to):
    return (lambda x: x) if round_to is None else (lambda x: x.astype(round_to).astype(x.dtype))


def _row(cell: Cell, arrays: dict, i: int, head: int, wide, round_to=None):
    """out and lse of query row ``i``, which sees keys 0..i."""
    import cupy

    rounded = _rounder(round_to)
    kv_head = head // (cell.num_heads // cell.num_kv_heads)
    k, v = (arrays[name][0, : i + 1, kv_head].astype(wide) for name in ("k", "v"))
    scores = k @ arrays["q"][0, i, head].astype(wide) * wide(cell.softmax_scale)
    row_max = scores.max()
    probs = cupy.exp(scores - row_max)
    row_sum = probs.sum()
    return rounded(rounded(probs / row_sum) @ v), row_max + cupy.log(row_sum)


def _query_gradients(cell: Cell, arrays: dict, results: dict, i: int, wide, round_to):
    """dq of row ``i`` for every head; ``results`` take no part in it."""
    import cupy

    rounded, found = _rounder(round_to), []
    for head in range(cell.num_heads):
        kv_head = head // (cell.num_heads // cell.num_kv_heads)
        k, v = (arrays[name][0, : i + 1, kv_head].astype(wide) for name in ("k", "v"))
        scores = k @ arrays["q"][0, i, head].astype(wide) * wide(cell.softmax_scale)
        probs = cupy.exp(scores - scores.max())
        probs /= probs.sum()
        dout = arrays["dout"][0, i, head].astype(wide)
        delta = (rounded(rounded(probs) @ v) * dout).sum()
        dscores = rounded(probs * (v @ dout - delta))
        found.append(rounded(dscores @ k * wide(cell.softmax_scale)))
    return tuple(found)


def _key_gradients(cell: Cell, arrays: dict, results: dict, j: int, wide, round_to):
    """dk and dv of key ``j``, which queries j.. of every head of its group see; lse and out as the forward gave them."""
    import cupy

    rounded = _rounder(round_to)
    k, v = (arrays[name][0, j, 0].astype(wide) for name in ("k", "v"))
    dk, dv = cupy.zeros_like(k), cupy.zeros_like(v)
    for head in range(cell.num_heads):
        q, dout, out = (x[0, j:, head].astype(wide) for x in (arrays["q"], arrays["dout"], results["out"]))
        probs = cupy.exp(q @ k * wide(cell.softmax_scale) - results["lse"][0, head, j:].astype(wide))
        dscores = rounded(probs * (dout @ v - (dout * out).sum(axis=-1)))
        dv += rounded(probs) @ dout
        dk += dscores @ q * wide(cell.softmax_scale)
    return rounded(dk), rounded(dv)


def _ratio(actual, low, exact, keys: int) -> float:
    """Largest error over the bound of the low-precision formula."""
    tiny = TINY_FACTOR * np.finfo(np.float32).eps * (1 + float(abs(exact).max())) * keys**0.5
    bound = MAX_FACTOR * float(abs(low.astype(np.float64) - exact).max()) + tiny
    error = float(abs(actual.astype(np.float64) - exact).max())
    return error / bound if np.isfinite(error) else float("inf")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--million", action="store_true", help="only the run at a million tokens")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="length of that run")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--providers", default=",".join(MEASURED), help=f"some of {', '.join(PROVIDERS)}")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    console = Console()
    if args.million:
        rows = million(args.tokens, console)
    else:
        rows = by_length(args.providers.split(","), [int(length) for length in args.lengths.split(",")], console)
    record.append_rows(args.out / "memory.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
