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
from benchmarks.reference import MAX_FACTOR, TINY_FACTOR, Precision, namespace
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
                    console.print(
                        f"{provider.name:12} {cell.name:20} {pass_} {extra / 2**20:10.2f} MiB {row.get('ok', '')}"
                    )
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

    from cuflash import attention, attention_backward, warmup

    cell = million_cell(seqlen)
    arrays = random_inputs(cell, cupy)
    q, k, v, dout = (arrays[name] for name in ("q", "k", "v", "dout"))
    warmup(q, k, v, causal=True)  # a shorter call would have other kernels

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
        console.print(
            f"{seqlen} tokens {pass_}: {row['ms']} ms, {extra / 2**20:.1f} MiB, {ratio:.3f} of the error bound"
        )
        gc.collect()
    return rows


def sampled_row_ratio(cell: Cell, arrays: dict, results: dict, samples: int = 32) -> float:
    """Worst error over bound of ``out`` and ``lse`` at query rows from the first to the last, evenly spread."""
    found = Samples(arrays["q"].dtype, cell.seqlen_k)
    for i in np.linspace(0, cell.seqlen_q - 1, samples).astype(int):
        for head in range(cell.num_heads):
            actual = {"out": results["out"][0, i, head], "lse": results["lse"][0, head, i]}
            found.add(actual, lambda precision: _row(cell, arrays, i, head, precision))  # noqa: B023 - called at once
    return found.worst_ratio()


def sampled_gradient_ratio(cell: Cell, arrays: dict, results: dict, samples: int = 16) -> float:
    """The same for dq at sampled queries, and dk and dv at sampled keys."""
    gradients = results["gradients"]
    found = Samples(arrays["q"].dtype, cell.seqlen_k)
    for position in np.linspace(0, cell.seqlen_q - 1, samples).astype(int):
        for head in range(cell.num_heads):
            actual = {"dq": gradients.dq[0, position, head]}
            found.add(actual, lambda precision: _query_gradient(cell, arrays, position, head, precision))  # noqa: B023
        actual = {"dk": gradients.dk[0, position, 0], "dv": gradients.dv[0, position, 0]}
        found.add(actual, lambda precision: _key_gradients(cell, arrays, results, position, precision))  # noqa: B023
    return found.worst_ratio()


class Samples:
    """Largest errors over all samples, of what is checked and of the low-precision formula, by output."""

    def __init__(self, dtype, keys: int):
        self._low, self._keys = Precision.low(dtype), keys
        self._errors: dict[str, list[tuple[float, float, float]]] = {}

    def add(self, actual: dict, reference: Callable[[Precision], dict]) -> None:
        exact, low = reference(Precision.exact()), reference(self._low)
        for name, value in actual.items():
            errors = (abs(x.astype(np.float64) - exact[name]).max() for x in (value, low[name]))
            self._errors.setdefault(name, []).append((*map(float, errors), float(abs(exact[name]).max())))

    def worst_ratio(self) -> float:
        ratios = []
        for errors in self._errors.values():
            actual, low, largest = (max(column) for column in zip(*errors, strict=True))
            finite = all(np.isfinite(error) for error, _, _ in errors)
            tiny = TINY_FACTOR * np.finfo(self._low.accumulator).eps * (1 + largest) * self._keys**0.5
            ratios.append(actual / (MAX_FACTOR * low + tiny) if finite else float("inf"))
        return max(ratios)


def _probabilities(cell: Cell, arrays: dict, i: int, head: int, precision: Precision) -> tuple:
    """k, v and the softmax of query row ``i``, which sees keys 0..i, and its lse."""
    xp, wide = namespace(arrays["q"]), precision.accumulator
    kv_head = head // (cell.num_heads // cell.num_kv_heads)
    k, v = (arrays[name][0, : i + 1, kv_head].astype(wide) for name in ("k", "v"))
    scores = k @ arrays["q"][0, i, head].astype(wide) * wide(cell.softmax_scale)
    row_max = scores.max()
    probs = xp.exp(scores - row_max)
    row_sum = probs.sum()
    return k, v, probs / row_sum, row_max + xp.log(row_sum)


def _row(cell: Cell, arrays: dict, i: int, head: int, precision: Precision) -> dict:
    """out and lse of query row ``i``."""
    _, v, probs, lse = _probabilities(cell, arrays, i, head, precision)
    return {"out": precision.round(precision.round(probs) @ v), "lse": lse}


def _query_gradient(cell: Cell, arrays: dict, i: int, head: int, precision: Precision) -> dict:
    """dq of query row ``i``."""
    k, v, probs, _ = _probabilities(cell, arrays, i, head, precision)
    dout = arrays["dout"][0, i, head].astype(precision.accumulator)
    delta = (precision.round(precision.round(probs) @ v) * dout).sum()
    dscores = precision.round(probs * (v @ dout - delta))
    return {"dq": precision.round(dscores @ k * precision.accumulator(cell.softmax_scale))}


def _key_gradients(cell: Cell, arrays: dict, results: dict, j: int, precision: Precision) -> dict:
    """dk and dv of key ``j``, which queries j.. of its whole group see; lse and out as the forward gave them."""
    xp, wide = namespace(arrays["q"]), precision.accumulator
    k, v = (arrays[name][0, j, 0].astype(wide) for name in ("k", "v"))
    dk, dv = xp.zeros_like(k), xp.zeros_like(v)
    for head in range(cell.num_heads):
        q, dout, out = (x[0, j:, head].astype(wide) for x in (arrays["q"], arrays["dout"], results["out"]))
        probs = xp.exp(q @ k * wide(cell.softmax_scale) - results["lse"][0, head, j:].astype(wide))
        dscores = precision.round(probs * (dout @ v - (dout * out).sum(axis=-1)))
        dv += precision.round(probs) @ dout
        dk += dscores @ q * wide(cell.softmax_scale)
    return {"dk": precision.round(dk), "dv": precision.round(dv)}


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
