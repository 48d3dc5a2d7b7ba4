"""Draw the records: PNGs beside the tables, each from the newest rows that belong together.

PYTHONPATH=. python -m benchmarks.plot
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend must be chosen first

from benchmarks import compare, record  # noqa: E402
from benchmarks.run import OURS  # noqa: E402
from benchmarks.workloads import Cell, short_length  # noqa: E402

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
    """TFLOP/s by length of the planner's choice, beside everything that was in the same run."""
    return _speed(folder, "speed", compare.HOPPER, LABELS)


def portable(folder: Path) -> list[Path]:
    """TFLOP/s by length of the portable kernels, beside the peer that uses the same instructions."""
    return _speed(folder, "portable", compare.PORTABLE, compare.PORTABLE.providers)


def _speed(folder: Path, name: str, comparison: compare.Comparison, providers: Collection[str]) -> list[Path]:
    """One panel a head dim and mask, one line a provider, one figure a pass."""
    rows = compare.on_gpu(record.read_rows(folder / "speed.csv"))
    chosen = {(one.cell, one.pass_): one.run for one in compare.compare(comparison, compare.by_run(rows))}
    measured = [(compare.cell_of(row), row) for row in rows if row["provider"] in providers]
    paths = []
    for pass_, title in PASS_TITLES.items():
        of_pass = [(cell, row) for cell, row in measured if row["pass"] == pass_]
        drawn = [(cell, row) for cell, row in of_pass if chosen.get((cell, pass_)) == row["run"]]
        if not drawn:
            continue
        kinds = list(dict.fromkeys(compare.kind_of(cell) for cell, _ in sorted(drawn, key=_panel)))
        columns = -(-len(kinds) // 2)
        figure, axes = plt.subplots(2, columns, figsize=(4.2 * columns, 6.4), squeeze=False, layout="constrained")
        for axis, kind in zip(axes.T.flat, kinds, strict=False):
            panel = [(cell, row) for cell, row in drawn if compare.kind_of(cell) == kind]
            for provider in (label for label in LABELS if any(row["provider"] == label for _, row in panel)):
                points = sorted((c.seqlen_q, float(row["tflops"])) for c, row in panel if row["provider"] == provider)
                style = {"linewidth": 2.4, "zorder": 3} if provider in OURS else {"linewidth": 1.2}
                color, label = COLORS[provider], LABELS[provider]
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, color=color, label=label, **style)
            axis.set_title(kind, fontsize=10)
            _length_axis(axis, sorted({cell.seqlen_q for cell, _ in panel}))
            axis.set_ylim(bottom=0)
            axis.set_ylabel("TFLOP/s")
        for axis in axes.T.flat[len(kinds) :]:
            axis.set_axis_off()
        handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        figure.suptitle(f"Attention {title}, bfloat16: {comparison.title}")
        paths.append(save(figure, folder, f"{name}_{pass_}", [row for _, row in drawn]))
    return paths


def _panel(measured: tuple[Cell, Row]) -> tuple[bool, int, bool]:
    """Order of the panels: equal heads first, by head dim, full above causal."""
    cell, _ = measured
    return cell.num_heads != cell.num_kv_heads, cell.head_dim, cell.causal


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


FIGURES = (speed, portable, memory, standard_steps, traffic, energy)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    for figure in FIGURES:
        paths = figure(args.results)
        print(*paths or [f"nothing recorded for {figure.__name__}"], sep="\n")


if __name__ == "__main__":
    main()
