"""Ratios between the rows of one run: what the README, the pictures and ``benchmarks.summary`` say about speed.

A ratio is formed within one interleaved run only. Each `Comparison` takes, for every cell, the newest run that measured
ours and the peers that make it this comparison, so that a short run for another purpose does not displace a long one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.record import PROBLEM_COLUMNS
from benchmarks.workloads import GROUPS, Cell, short_length

Row = Mapping[str, str]

PASS_TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both"}

# Builds of one library count as one peer: the faster of them.
FLASH2 = {"FlashAttention-2": ("torch_flash",)}
CUDNN = {"cuDNN": ("torch_cudnn",)}
HOPPER_ONLY = {"FlashAttention-3": ("fa3", "fa3_jax"), "FlashAttention-4": ("fa4",)}


@dataclass(frozen=True)
class Comparison:
    """One of our providers against libraries in some cells."""

    title: str
    groups: tuple[str, ...]
    ours: str
    peers: Mapping[str, tuple[str, ...]]
    needed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a run without any of them is another's

    @property
    def cells(self) -> dict[Cell, None]:
        return dict.fromkeys(cell for group in self.groups for cell in GROUPS[group])

    @property
    def providers(self) -> tuple[str, ...]:
        return self.ours, *(build for builds in self.peers.values() for build in builds)


HOPPER = Comparison("Hopper kernels", ("hopper", "gqa"), "cuflash", {**HOPPER_ONLY, **CUDNN}, needed=HOPPER_ONLY)
PORTABLE = Comparison("portable kernels", ("portable",), "cuflash_sm80", FLASH2)
COMPARISONS = (
    HOPPER,
    Comparison("unequal head dims", ("unequal",), "cuflash", CUDNN),
    Comparison("dropout", ("dropout",), "cuflash", {**FLASH2, **CUDNN}),
    PORTABLE,
    Comparison("dropout, portable kernels", ("dropout",), "cuflash_sm80", FLASH2),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """A pass of a cell in one run: milliseconds of ours, and of each library there."""

    cell: Cell
    pass_: str
    run: str
    ours: float
    peers: Mapping[str, float]

    @property
    def best(self) -> str:
        return min(self.peers, key=self.peers.__getitem__)

    @property
    def ratio(self) -> float:
        """Our rate to the best peer's: above 1 where we are faster."""
        return self.ratio_to(self.best)

    def ratio_to(self, library: str) -> float:
        return self.peers[library] / self.ours

    def tflops(self, milliseconds: float) -> float:
        return self.cell.flops(self.pass_) / milliseconds * 1e-9


Runs = dict[str, dict[tuple[Cell, str], dict[str, float]]]


def cell_of(row: Row) -> Cell:
    is_int = {column: Cell.__annotations__[column] == "int" for column in PROBLEM_COLUMNS}
    return Cell(**{column: int(row[column]) if is_int[column] else row[column] for column in PROBLEM_COLUMNS})


def on_gpu(rows: Iterable[Row]) -> list[Row]:
    """Rows that were measured, on a GPU."""
    return [row for row in rows if row["ok"] == "True" and not row["gpu"].startswith("none")]


def by_run(rows: Iterable[Row]) -> Runs:
    """Milliseconds by run, by cell and pass, by provider; the newest run last."""
    runs: Runs = {}
    for row in on_gpu(rows):
        cells = runs.setdefault(row["run"], {})
        cells.setdefault((cell_of(row), row["pass"]), {})[row["provider"]] = float(row["ms_median"])
    return runs


def compare(comparison: Comparison, runs: Runs) -> list[Compared]:
    """Every pass that the comparison has, in the order of its cells; then passes of both where one run has both."""
    found: dict[tuple[Cell, str], Compared] = {}
    needed = comparison.needed or comparison.peers
    for run, measured in runs.items():
        for (cell, pass_), times in measured.items():
            peers = _libraries(comparison.peers, times)
            if cell in comparison.cells and comparison.ours in times and needed.keys() & peers.keys():
                found[cell, pass_] = Compared(cell, pass_, run, times[comparison.ours], peers)
    for cell in comparison.cells:
        forward, backward = found.get((cell, "fwd")), found.get((cell, "bwd"))
        if forward and backward and forward.run == backward.run:
            peers = {name: forward.peers[name] + ms for name, ms in backward.peers.items() if name in forward.peers}
            if peers:
                both = Compared(cell, "fwd+bwd", forward.run, forward.ours + backward.ours, peers)
                found[cell, "fwd+bwd"] = both
    return [found[cell, pass_] for pass_ in PASS_TITLES for cell in comparison.cells if (cell, pass_) in found]


def _libraries(peers: Mapping[str, Sequence[str]], times: Mapping[str, float]) -> dict[str, float]:
    there = {name: [times[build] for build in builds if build in times] for name, builds in peers.items()}
    return {name: min(found) for name, found in there.items() if found}


def kind_of(cell: Cell) -> str:
    """Cells that are summed up in one line: all lengths of a head dim and a mask."""
    width = f"{cell.head_dim}" if cell.head_dim == cell.head_dim_v else f"{cell.head_dim}/{cell.head_dim_v}"
    heads = "" if cell.num_heads == cell.num_kv_heads else f", {cell.num_heads}/{cell.num_kv_heads} heads"
    return f"D {width}{heads}, {cell.mask}"


Lines = tuple[list[str], list[list[str]]]  # header and lines of a table, for whoever prints it


def summary_lines(comparison: Comparison, compared: Sequence[Compared]) -> Lines:
    """A line a pass and kind: geometric means of the ratios to each library and to the best of each cell."""
    libraries = [name for name in comparison.peers if any(name in one.peers for one in compared)]
    header = ["pass", "cells", "number", *libraries, "best peer", "worst", "in cell"]
    lines = []
    for pass_, title in PASS_TITLES.items():
        chosen = [one for one in compared if one.pass_ == pass_]
        kinds = {kind: [one for one in chosen if kind_of(one.cell) == kind] for kind in _kinds(chosen)}
        for kind, members in (kinds | {"all": chosen} if len(kinds) > 1 else kinds).items():
            worst = min(members, key=lambda one: one.ratio)
            means = (_mean([one.ratio_to(name) for one in members if name in one.peers]) for name in libraries)
            best = _mean([one.ratio for one in members])
            lines.append([title, kind, str(len(members)), *means, best, f"{worst.ratio:.3f}", worst.cell.name])
    return header, lines


def cell_lines(compared: Sequence[Compared]) -> Lines:
    """A line a cell: rates of ours and of the best peer, and their ratio, for each pass."""
    passes = [pass_ for pass_ in PASS_TITLES if any(one.pass_ == pass_ for one in compared)]
    header = ["cell"]
    for pass_ in passes:
        title = PASS_TITLES[pass_]
        header += [f"{title}, TFLOP/s", f"{title}, best peer", f"{title}, ratio"]
    found = {(one.cell, one.pass_): one for one in compared}
    lines = []
    for cell in dict.fromkeys(one.cell for one in compared):
        line = [cell.name]
        for one in (found.get((cell, pass_)) for pass_ in passes):
            if one is None:
                line += ["–"] * 3
            else:
                best = f"{one.tflops(one.peers[one.best]):.0f} ({one.best})"
                line += [f"{one.tflops(one.ours):.0f}", best, f"{one.ratio:.2f}"]
        lines.append(line)
    return header, lines


def feature_ratios(runs: Runs) -> dict[tuple[Cell, str], tuple[str, float]]:
    """Run and ratio of each feature: our rate with it to our plain rate of the same run, per visible pair."""
    ratios = {}
    for run, measured in runs.items():
        for (cell, pass_), times in measured.items():
            plain = measured.get((cell.plain, pass_), {})
            if cell in GROUPS["features"] and cell != cell.plain and HOPPER.ours in times and HOPPER.ours in plain:
                work = cell.flops(pass_) / cell.plain.flops(pass_)
                ratios[cell, pass_] = run, work * plain[HOPPER.ours] / times[HOPPER.ours]
    return ratios


def feature_lines(ratios: Mapping[tuple[Cell, str], tuple[str, float]]) -> Lines:
    """A line a feature, a column a shape: forward / backward."""
    found = {(_change(cell), _shape(cell), pass_): f"{ratio:.2f}" for (cell, pass_), (_, ratio) in ratios.items()}
    cells = [cell for cell in GROUPS["features"] if any((cell, pass_) in ratios for pass_ in PASS_TITLES)]
    shapes = list(dict.fromkeys(map(_shape, cells)))
    lines = [
        [change, *(" / ".join(found.get((change, shape, pass_), "–") for pass_ in ("fwd", "bwd")) for shape in shapes)]
        for change in dict.fromkeys(map(_change, cells))
    ]
    return ["to plain", *shapes], lines


def _change(cell: Cell) -> str:
    """How a cell differs from its plain one."""
    if cell.dtype != cell.plain.dtype:
        return cell.dtype
    return cell.mask if cell.window_left is not None else cell.feature


def _shape(cell: Cell) -> str:
    return f"D {cell.head_dim}, S {short_length(cell.seqlen_q)}"


def _kinds(compared: Iterable[Compared]) -> list[str]:
    return list(dict.fromkeys(kind_of(one.cell) for one in compared))


def _mean(ratios: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.3f}" if ratios else "–"
