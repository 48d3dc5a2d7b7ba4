"""Write the generated parts of README.md: the support table and every measured number.

    PYTHONPATH=. python -m benchmarks.readme

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. What has no record says so.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import cuflash
from benchmarks.record import PROBLEM_COLUMNS, RESULTS, ROOT, read_rows
from benchmarks.workloads import Cell

README = ROOT / "README.md"
PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end: \2 -->)", flags=re.DOTALL)
OURS = ("cuflash", "cuflash_sm80")
PASSES = {"fwd": "forward", "bwd": "backward"}

Row = Mapping[str, str]


def render(text: str, results: Path = RESULTS) -> str:
    """The README with every generated part made anew."""
    unknown = {name for _, name, _, _ in PART.findall(text)} - set(PARTS)
    if unknown:
        raise ValueError(f"README.md has the parts {sorted(unknown)}; known are {sorted(PARTS)}")
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]](results).strip()}\n{match[4]}", text)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(value) for value in line)} |" for line in lines)


def taken_on(rows: Iterable[Row]) -> str:
    """The environments that rows were measured in, for below a table."""
    columns = ("gpu", "driver", "nvrtc", "date", "source_hash")
    parts = []
    for row in newest((row | {"date": row["date"][:10]} for row in rows), *columns):
        gpu, driver, nvrtc, day, source_hash = (row[column] for column in columns)
        versions = "".join(f", {name} {value}" for name, value in (("driver", driver), ("NVRTC", nvrtc)) if value)
        parts.append(f"{gpu.removeprefix('none; ')}{versions}, {day}, code `{source_hash}`")
    return f"\n\n<sub>{'; '.join(parts)}</sub>"


def newest(rows: Iterable[Row], *columns: str) -> list[Row]:
    """The last row of each combination of ``columns``, in order of first appearance."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[tuple(row[column] for column in columns)] = row
    return list(found.values())


def pass_of(row: Row) -> str:
    return PASSES.get(row["pass"], row["pass"])


def cell_of(row: Row) -> Cell:
    is_int = {column: Cell.__annotations__[column] == "int" for column in PROBLEM_COLUMNS}
    return Cell(**{column: int(row[column]) if is_int[column] else row[column] for column in PROBLEM_COLUMNS})


def support(results: Path) -> str:
    """A line for each feature and a column for each backend: the dtypes that it runs with there."""
    by_feature: dict[tuple[str, str], dict[str, str]] = {}
    for row in cuflash.supports():
        by_feature.setdefault((row.keyword, row.feature), {})[row.backend] = ", ".join(row.dtypes) or "not yet"
    found = list(dict.fromkeys(backend for dtypes in by_feature.values() for backend in dtypes))
    lines = [(f"`{keyword}`", feature, *map(dtypes.get, found)) for (keyword, feature), dtypes in by_feature.items()]
    return table(("keyword", "feature", *(f'`backend="{backend}"`' for backend in found)), lines)


def minilm(results: Path) -> str:
    rows = newest(read_rows(results / "minilm.csv"), "arrays", "dtype")
    if not rows:
        return "No record yet: `python -m tests.examples.minilm --record`."
    header = ("arrays", "q, k, v", "passages", "tokens", "seconds", "compared", "smallest cosine", "first answers")
    columns = ("arrays", "dtype", "passages", "tokens", "seconds", "checked", "min_cosine", "top_hits")
    answers = (row | {"top_hits": row["top_hits"].replace("; ", "<br>").replace("->", "→")} for row in rows)
    return table(header, [[row[column] for column in columns] for row in answers]) + taken_on(rows)


def speed(results: Path) -> str:
    """Our rate beside the best peer's of the same run, and the ratios to every peer over all cells."""
    by_call: dict[tuple[Cell, str], dict[str, Row]] = {}
    for run in newest_runs(row for row in read_rows(results / "speed.csv") if not row["gpu"].startswith("none")):
        cell, pass_ = cell_of(run[0]), run[0]["pass"]
        by_call[cell, pass_] = {row["provider"]: row for row in run}
    cells = list(dict.fromkeys(cell for cell, _ in by_call))
    if not cells:
        return "No record yet: `python -m benchmarks.run`."
    lines = []
    for cell in cells:
        line = [cell.name]
        for pass_ in PASSES:
            line += compare(by_call.get((cell, pass_), {}))
        lines.append(line)
    header = ["cell", *(f"{name}{of}" for name in PASSES.values() for of in (", TFLOP/s", ", best peer", ", ratio"))]
    every = [row for rows in by_call.values() for row in rows.values()]
    return f"{ratios(by_call)}\n\n{table(header, lines)}{taken_on(every)}"


def newest_runs(rows: Iterable[Row]) -> list[list[Row]]:
    """For each cell and pass the rows of the newest run that measured it for us: ratios are formed in one run only."""
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = tuple(row[column] for column in (*PROBLEM_COLUMNS, "pass"))
        groups.setdefault(key, {}).setdefault(row["run"], []).append(row)
    newest_of = ([run for run in runs.values() if ours(run)] for runs in groups.values())
    return [runs[-1] for runs in newest_of if runs]


def ours(rows: Iterable[Row]) -> Row | None:
    found = {row["provider"]: row for row in rows}
    return next((found[name] for name in OURS if name in found), None)


def rates(rows: Mapping[str, Row]) -> tuple[float | None, dict[str, float]]:
    """Our TFLOP/s and those of every peer, of results that passed the gate."""
    right = {name: float(row["tflops"]) for name, row in rows.items() if row["ok"] == "True"}
    mine = next((right[name] for name in OURS if name in right), None)
    return mine, {name: rate for name, rate in right.items() if name not in OURS}


def compare(rows: Mapping[str, Row]) -> list[str]:
    mine, peers = rates(rows)
    if mine is None:
        return ["wrong" if rows else "–", "–", "–"]
    if not peers:
        return [f"{mine:.0f}", "–", "–"]
    best = max(peers, key=peers.get)
    return [f"{mine:.0f}", f"{peers[best]:.0f} ({best})", f"{mine / peers[best]:.2f}"]


def ratios(by_call: Mapping[tuple[Cell, str], Mapping[str, Row]]) -> str:
    """Per pass and peer: over how many cells, the geometric mean of ours to theirs, and the worst of them."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (cell, pass_), rows in by_call.items():
        mine, peers = rates(rows)
        if mine is not None:
            for name, rate in peers.items():
                found.setdefault((pass_, name), {})[cell.name] = mine / rate
    lines = []
    for (pass_, name), values in sorted(found.items(), reverse=True):
        worst = min(values, key=values.get)
        mean = statistics.geometric_mean(values.values())
        lines.append((PASSES.get(pass_, pass_), name, len(values), f"{mean:.2f}", f"{values[worst]:.2f} ({worst})"))
    return table(("pass", "cuflash against", "cells", "geometric mean of the ratios", "worst"), lines)


def memory(results: Path) -> str:
    rows = newest(read_rows(results / "memory.csv"), "provider", "pass", *PROBLEM_COLUMNS)
    if not rows:
        return "No record yet: `python -m benchmarks.memory`."
    lines = [
        (row["provider"], cell_of(row).name, pass_of(row), f"{float(row['extra_bytes']) / 2**20:.1f}")
        for row in rows
        if row["extra_bytes"]
    ]
    return table(("provider", "cell", "pass", "extra memory, MiB"), lines) + taken_on(rows)


def host(results: Path) -> str:
    calls = newest(read_rows(results / "host_overhead.csv"), "provider", "arrays", "pass", *PROBLEM_COLUMNS)
    starts = newest(read_rows(results / "compile.csv"), "pass", "start", *PROBLEM_COLUMNS)
    parts = []
    if calls:
        lines = [(row["provider"], row["arrays"], pass_of(row), row["us_per_call"]) for row in calls]
        parts.append(table(("provider", "arrays", "pass", "host time a call, µs"), lines) + taken_on(calls))
    if starts:
        lines = [(cell_of(row).name, pass_of(row), row["start"], row["seconds"]) for row in starts]
        parts.append(table(("cell", "pass", "first call from", "seconds"), lines) + taken_on(starts))
    return "\n\n".join(parts) or "No record yet: `python -m benchmarks.host`."


def energy(results: Path) -> str:
    rows = newest(read_rows(results / "energy.csv"), "provider", "pass", *PROBLEM_COLUMNS)
    if not rows:
        return "No record yet: `python -m benchmarks.energy`."
    lines = [(row["provider"], cell_of(row).name, pass_of(row), row["joules_per_call"]) for row in rows]
    return table(("provider", "cell", "pass", "joules a call, idle subtracted"), lines) + taken_on(rows)


def plots(results: Path) -> str:
    """Every picture beside the records, under the name of its file."""
    pictures = sorted(results.glob("*.png"))
    titles = {path: path.stem.replace("_", " ") for path in pictures}
    found = [f"![{title}](benchmarks/results/{path.name})" for path, title in titles.items()]
    return "\n\n".join(found) or "No pictures yet: `python -m benchmarks.plot`."


def gpu_tests(results: Path) -> str:
    path = results / "gpu_tests.json"
    if not path.exists():
        return "No record yet: `python -m pytest -m gpu`."
    record = json.loads(path.read_text())
    outcomes = ("passed", "failed", "skipped")
    return table(outcomes, [[record[outcome] for outcome in outcomes]]) + taken_on([record])


PARTS: dict[str, Callable[[Path], str]] = {
    "support": support,
    "minilm": minilm,
    "speed": speed,
    "memory": memory,
    "host": host,
    "energy": energy,
    "plots": plots,
    "gpu_tests": gpu_tests,
}


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
