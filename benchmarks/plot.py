"""Draw the records: PNGs beside the tables, each from the newest rows that belong together.

PYTHONPATH=. python -m benchmarks.plot
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend must be chosen first

from benchmarks import record  # noqa: E402
from benchmarks.run import OURS  # noqa: E402
from benchmarks.workloads import short_length  # noqa: E402

Row = dict[str, str]

LABELS = {
    "cuflash": "cuflash",
    "cuflash_sm80": "cuflash (sm80)",
    "cuflash_numpy": "cuflash (NumPy)",
    "torch_flash": "FlashAttention-2 (PyTorch)",
    "torch_cudnn": "cuDNN (PyTorch)",
    "torch_efficient": "memory-efficient (PyTorch)",
    "torch_math": "standard (PyTorch)",
    "fa3": "FlashAttention-3",
    "fa3_jax": "FlashAttention-3 (JAX)",
    "fa4": "FlashAttention-4",
    "flex": "FlexAttention",
    "jax_cudnn": "cuDNN (JAX)",
    "standard": "standard",
    "numpy_dense": "standard (NumPy)",
}
_PALETTE = plt.get_cmap("tab20").colors
COLORS = dict(zip(LABELS, _PALETTE[::2] + _PALETTE[1::2], strict=False))  # the strong colours first
STEP_COLORS = {
    "matmul": "#4c72b0",
    "mask": "#dd8452",
    "softmax": "#55a868",
    "dropout": "#c44e52",
    "whole pass": "#8172b3",
}
PASS_TITLES = {"fwd": "forward", "bwd": "backward"}
PROBLEM_KEY = ("dtype", "batch", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "head_dim", "head_dim_v")


def newest(rows: Iterable[Row], key: Sequence[str]) -> dict[tuple[str, ...], Row]:
    """The last row of every key: tables are appended to, so that is the newest."""
    return {tuple(row[column] for column in key): row for row in rows}


def newest_runs(rows: Sequence[Row]) -> list[Row]:
    """For every cell the rows of the newest run that measured one of ours: ratios hold within one run only."""
    cell = (*PROBLEM_KEY, "mask", "feature")
    measured = [row for row in rows if row["ok"] == "True"]
    ours = newest((row for row in measured if row["provider"] in OURS), cell)
    return [
        row
        for row in measured
        if (mine := ours.get(tuple(row[column] for column in cell))) and row["run"] == mine["run"]
    ]


def caption(figure, rows: Sequence[Row]) -> None:
    """Where and when the numbers were taken, from the rows themselves."""
    places = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    dates = sorted({row["date"][:10] for row in rows})
    figure.supxlabel(f"{places}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}", x=0.99, ha="right", fontsize=7)


def save(figure, folder: Path, name: str, rows: Sequence[Row]) -> Path:
    caption(figure, rows)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def speed(folder: Path) -> list[Path]:
    """TFLOP/s by length, one panel a head dim and mask, one line a provider, one figure a pass."""
    rows = [
        row
        for row in newest_runs(record.read_rows(folder / "speed.csv"))
        if row["feature"] == "plain" and row["dtype"] == "bfloat16" and row["num_heads"] == row["num_kv_heads"]
        and row["mask"] in ("full", "causal") and row["seqlen_q"] == row["seqlen_k"]
    ]  # fmt: skip
    paths = []
    for pass_ in PASS_TITLES:
        chosen = [row for row in rows if row["pass"] == pass_]
        if not chosen:
            continue
        dims = sorted({int(row["head_dim"]) for row in chosen})
        masks = [mask for mask in ("full", "causal") if any(row["mask"] == mask for row in chosen)]
        figure, axes = plt.subplots(
            len(masks), len(dims), figsize=(4.2 * len(dims), 3.2 * len(masks)), squeeze=False, layout="constrained"
        )
        for axis, (mask, dim) in zip(axes.flat, ((m, d) for m in masks for d in dims), strict=True):
            panel = [row for row in chosen if row["mask"] == mask and int(row["head_dim"]) == dim]
            for provider in (name for name in LABELS if any(row["provider"] == name for row in panel)):
                points = sorted((int(r["seqlen_q"]), float(r["tflops"])) for r in panel if r["provider"] == provider)
                style = {"linewidth": 2.4, "zorder": 3} if provider in OURS else {"linewidth": 1.2}
                axis.plot(
                    *zip(*points, strict=True),
                    "o-",
                    markersize=3,
                    color=COLORS[provider],
                    label=LABELS[provider],
                    **style,
                )
            axis.set_title(f"head_dim {dim}, {mask}", fontsize=10)
            _length_axis(axis, sorted({int(row["seqlen_q"]) for row in panel}))
            axis.set_ylim(bottom=0)
            axis.set_ylabel("TFLOP/s")
        handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        figure.suptitle(f"Attention {PASS_TITLES[pass_]}, bfloat16")
        paths.append(save(figure, folder, f"speed_{pass_}", chosen))
    return paths


def memory(folder: Path) -> list[Path]:
    """Extra memory by length, forward and backward."""
    table = record.read_rows(folder / "memory.csv")
    rows = list(newest((row for row in table if not row["ms"]), (*PROBLEM_KEY, "provider", "pass")).values())
    if not rows:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, (pass_, title) in zip(axes, PASS_TITLES.items(), strict=True):
        for provider in LABELS:
            points = sorted(
                (int(row["seqlen_q"]), int(row["extra_bytes"]) / 2**20)
                for row in rows
                if row["provider"] == provider and row["pass"] == pass_
            )
            if points:
                width = 2.4 if provider in OURS else 1.2
                lengths, sizes = zip(*points, strict=True)
                axis.plot(
                    lengths, sizes, "o-", markersize=3, color=COLORS[provider], label=LABELS[provider], linewidth=width
                )
        axis.set_yscale("log", base=2)
        axis.set_title(title, fontsize=10)
        _length_axis(axis, sorted({int(row["seqlen_q"]) for row in rows}))
    axes[0].set_ylabel("MiB beside the operands")
    axes[1].legend(fontsize=7)
    figure.suptitle(f"Memory, batch 1, {rows[0]['num_heads']} heads of {rows[0]['head_dim']}, causal")
    return [save(figure, folder, "memory", rows)]


def standard_steps(folder: Path) -> list[Path]:
    """Where standard attention's time goes, beside ours."""
    table = record.read_rows(folder / "standard.csv")
    rows = [row for row in table if row["run"] == table[-1]["run"]]
    if not rows:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    for axis, (pass_, title) in zip(axes, PASS_TITLES.items(), strict=True):
        for position, provider in enumerate(("standard", "cuflash")):
            bottom = 0.0
            for row in (row for row in rows if row["provider"] == provider and row["pass"] == pass_):
                height = float(row["ms_median"])
                kind = next(kind for kind in STEP_COLORS if row["step"].startswith(kind))
                axis.bar(position, height, bottom=bottom, color=STEP_COLORS[kind], edgecolor="white", width=0.6)
                if row["step"] != "whole pass":
                    axis.text(position, bottom + height / 2, row["step"], ha="center", va="center", fontsize=7)
                bottom += height
            axis.text(position, bottom, f"{bottom:.2f} ms", ha="center", va="bottom", fontsize=8)
        axis.set_xticks((0, 1), ("standard", "cuflash"))
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("ms")
    row = rows[0]
    shape = f"{row['batch']} x {row['seqlen_q']}, {row['num_heads']} heads of {row['head_dim']}"
    figure.suptitle(f"Where the time goes: {shape}, {row['mask']}, {row['feature']}")
    return [save(figure, folder, "standard_steps", rows)]


def traffic(folder: Path) -> list[Path]:
    """The first figure of the FlashAttention paper: FLOP, bytes of device memory, run time."""
    rows = newest(record.read_rows(folder / "hbm.csv"), ("provider",))
    if {("standard",), ("cuflash",)} - rows.keys():
        return []
    values: dict[str, Callable[[Row], float]] = {
        "GFLOP": lambda row: float(row["gflop"]),
        "GB read and written": lambda row: (float(row["read_bytes"]) + float(row["written_bytes"])) * 1e-9,
        "ms": lambda row: float(row["ms"]),
    }
    both = [rows["standard",], rows["cuflash",]]
    figure, axes = plt.subplots(1, 3, figsize=(8, 3.2), layout="constrained")
    for axis, (title, value) in zip(axes, values.items(), strict=True):
        _bars(axis, both, value)
        axis.set_title(title, fontsize=10)
    row = both[1]
    figure.suptitle(
        f"Forward and backward: {row['batch']} x {row['seqlen_q']}, {row['num_heads']} heads of {row['head_dim']}"
    )
    return [save(figure, folder, "traffic", both)]


def energy(folder: Path) -> list[Path]:
    """Energy of a call, idle subtracted."""
    rows = list(newest(record.read_rows(folder / "energy.csv"), ("provider", "pass")).values())
    if not rows:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (pass_, title) in zip(axes, PASS_TITLES.items(), strict=True):
        chosen = [row for row in rows if row["pass"] == pass_]
        _bars(axis, chosen, lambda row: float(row["joules_per_call"]))
        axis.set_title(f"{title}: J a call", fontsize=10)
        axis.tick_params(axis="x", labelrotation=20)
    return [save(figure, folder, "energy", rows)]


def _bars(axis, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    names = [row["provider"] for row in rows]
    bars = axis.bar(range(len(rows)), [value(row) for row in rows], color=[COLORS[name] for name in names], width=0.6)
    axis.bar_label(bars, fmt="%.3g", fontsize=8)
    axis.set_xticks(range(len(rows)), [LABELS[name] for name in names], fontsize=7)


def _length_axis(axis, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [short_length(length) for length in lengths], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("sequence length")
    axis.grid(alpha=0.3)


FIGURES = (speed, memory, standard_steps, traffic, energy)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    for figure in FIGURES:
        paths = figure(args.results)
        print(*paths or [f"nothing recorded for {figure.__name__}"], sep="\n")


if __name__ == "__main__":
    main()
