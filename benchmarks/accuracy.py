"""The outlier test of the FlashAttention-3 paper: how far float16 results are from float64, library by library.

    PYTHONPATH=. python -m benchmarks.accuracy

Inputs are standard normal, and one in a thousand has a normal number of standard deviation 10 added.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import record
from benchmarks.inputs import numpy_dtype
from benchmarks.providers import available, reason
from benchmarks.reference import Precision, head_reference, namespace
from benchmarks.run import namespace_of
from benchmarks.workloads import Cell

COLUMNS = (*record.ENVIRONMENT_COLUMNS, "provider", "pass", *record.PROBLEM_COLUMNS, "seed", "rmse", "max_error")
CELL = Cell(1, 4096, 4096, 16, 16, 128, 128, "full", "plain", "float16")
PROVIDERS = ("cuflash", "torch_flash", "torch_cudnn", "fa3", "fa4")
SEEDS = 5
OUTLIERS, OUTLIER_SCALE = 0.001, 10.0


def outlier_inputs(cell: Cell, xp, seed: int) -> dict:
    """q, k, v and dout of a cell with rare large entries."""
    rng = xp.random.default_rng(seed)

    def draw(heads: int, seqlen: int, width: int):
        shape = (cell.batch, seqlen, heads, width)
        normal = rng.standard_normal(shape, dtype=np.float32)
        outliers = rng.standard_normal(shape, dtype=np.float32) * np.float32(OUTLIER_SCALE)
        is_outlier = rng.random(shape, dtype=np.float32) < np.float32(OUTLIERS)
        return (normal + outliers * is_outlier).astype(numpy_dtype(cell.dtype))

    return {
        "q": draw(cell.num_heads, cell.seqlen_q, cell.head_dim),
        "k": draw(cell.num_kv_heads, cell.seqlen_k, cell.head_dim),
        "v": draw(cell.num_kv_heads, cell.seqlen_k, cell.head_dim_v),
        "dout": draw(cell.num_heads, cell.seqlen_q, cell.head_dim_v),
    }


def exact_out(cell: Cell, arrays: dict):
    """float64 out of all heads, canonical."""
    heads = [
        [
            head_reference(cell, arrays, batch, head, Precision.exact(), backward=False)["out"]
            for head in range(cell.num_kv_heads)
        ]
        for batch in range(cell.batch)
    ]
    xp = namespace(arrays["q"])
    return xp.stack([xp.concatenate(of_batch, axis=1) for of_batch in heads])


def errors(actual, exact) -> tuple[float, float]:
    """(root of the mean squared error, largest error)."""
    error = actual.astype(np.float64) - exact
    return float((error * error).mean()) ** 0.5, float(abs(error).max())


def measure(cell: Cell, names: list[str], seeds: int, console: Console) -> list[dict]:
    providers, absent = available(names)
    for name, why in absent.items():
        console.print(f"[yellow]{name} is absent:[/] {why}")
    environment, rows = record.environment(), []
    for seed in range(seeds):
        references: dict[str, tuple] = {}
        for provider in providers:
            if provider.device not in references:
                arrays = outlier_inputs(cell, namespace_of(provider.device), seed)
                references[provider.device] = arrays, exact_out(cell, arrays)
            arrays, exact = references[provider.device]
            try:
                bound = provider.bind(cell, arrays)
                rmse, largest = errors(bound.outputs(bound.forward())["out"], exact)
            except Exception as error:
                console.print(f"[red]{provider.name}:[/] {reason(error)}")
                continue
            row = {**environment, "provider": provider.name, "pass": "fwd", **cell.problem_columns(), "seed": seed}
            rows.append(row | {"rmse": f"{rmse:.4g}", "max_error": f"{largest:.4g}"})
            console.print(f"seed {seed} {provider.name:12} RMSE {rmse:.3g}, largest error {largest:.3g}")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    rows = measure(CELL, args.providers.split(","), args.seeds, Console())
    record.append_rows(args.out / "accuracy.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
