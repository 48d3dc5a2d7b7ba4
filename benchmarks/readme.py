"""Write the generated parts of README.md: the support table and every measured number.

    PYTHONPATH=. python -m benchmarks.readme

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``. What has no record says so.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cuflash
from benchmarks import compare
from benchmarks.compare import Row, cell_of
from benchmarks.plot import PASS_TITLES, newest
from benchmarks.record import PROBLEM_COLUMNS, RESULTS, ROOT, read_rows

README = ROOT / "README.md"
PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end: \2 -->)", flags=re.DOTALL)


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
    for gpu, driver, nvrtc, day, source_hash in newest((row | {"date": row["date"][:10]} for row in rows), columns):
        versions = "".join(f", {name} {value}" for name, value in (("driver", driver), ("NVRTC", nvrtc)) if value)
        parts.append(f"{gpu.removeprefix('none; ')}{versions}, {day}, code `{source_hash}`")
    return f"\n\n<sub>{'; '.join(parts)}</sub>"


def newest_rows(path: Path, *columns: str) -> list[Row]:
    """The last row of each combination of ``columns``; an absent table has none."""
    return list(newest(read_rows(path), columns).values())


def pass_of(row: Row) -> str:
    return PASS_TITLES.get(row["pass"], row["pass"])


def support(results: Path) -> str:
    """A line for each feature and a column for each backend: the dtypes that it runs with there."""
    by_feature: dict[tuple[str, str], dict[str, str]] = {}
    for row in cuflash.supports():
        by_feature.setdefault((row.keyword, row.feature), {})[row.backend] = ", ".join(row.dtypes) or "not yet"
    found = list(dict.fromkeys(backend for dtypes in by_feature.values() for backend in dtypes))
    lines = [(f"`{keyword}`", feature, *map(dtypes.get, found)) for (keyword, feature), dtypes in by_feature.items()]
    return table(("keyword", "feature", *(f'`backend="{backend}"`' for backend in found)), lines)


def minilm(results: Path) -> str:
    rows = newest_rows(results / "minilm.csv", "arrays", "dtype")
    if not rows:
        return "No record yet: `python -m tests.examples.minilm --record`."
    header = ("arrays", "q, k, v", "passages", "tokens", "seconds", "compared", "smallest cosine", "first answers")
    columns = ("arrays", "dtype", "passages", "tokens", "seconds", "checked", "min_cosine", "top_hits")
    answers = (row | {"top_hits": row["top_hits"].replace("; ", "<br>").replace("->", "→")} for row in rows)
    return table(header, [[row[column] for column in columns] for row in answers]) + taken_on(rows)


def speed(results: Path) -> str:
    """Our rates to those of the peers, per head dim and mask and then per cell, and those of features to plain ones."""
    rows = read_rows(results / "speed.csv")
    runs = compare.by_run(rows)
    parts, used = [], set()
    for comparison in compare.COMPARISONS:
        if compared := compare.compare(comparison, runs):
            cells = f"<details><summary>every cell</summary>\n\n{table(*compare.cell_lines(compared))}\n\n</details>"
            summary = table(*compare.summary_lines(comparison, compared))
            parts.append(f"**{comparison.title}** (`{comparison.ours}`)\n\n{summary}\n\n{cells}")
            used |= {one.run for one in compared}
    if ratios := compare.feature_ratios(runs):
        lines = table(*compare.feature_lines(ratios))
        parts.append(f"**features** (`{compare.HOPPER.ours}`), forward / backward, on as many visible pairs\n\n{lines}")
        used |= {run for run, _ in ratios.values()}
    if not parts:
        return "No record yet: `python -m benchmarks.run`."
    return "\n\n".join(parts) + taken_on(row for row in compare.on_gpu(rows) if row["run"] in used)


def memory(results: Path) -> str:
    """Extra memory, a line a cell, a column a provider."""
    rows = [
        row for row in newest_rows(results / "memory.csv", "provider", "pass", *PROBLEM_COLUMNS) if row["extra_bytes"]
    ]
    if not rows:
        return "No record yet: `python -m benchmarks.memory`."
    extra = {(cell_of(row).name, row["provider"], row["pass"]): float(row["extra_bytes"]) / 2**20 for row in rows}
    providers = dict.fromkeys(row["provider"] for row in rows)

    def entry(cell: str, provider: str) -> str:
        found = (extra.get((cell, provider, pass_)) for pass_ in PASS_TITLES)
        return " / ".join("–" if mib is None else f"{mib:,.0f}" for mib in found)

    lines = [(cell, *(entry(cell, name) for name in providers)) for cell in dict.fromkeys(cell for cell, _, _ in extra)]
    return table(("forward / backward, MiB", *providers), lines) + taken_on(rows)


def host(results: Path) -> str:
    calls = newest_rows(results / "host_overhead.csv", "provider", "arrays", "pass", *PROBLEM_COLUMNS)
    starts = newest_rows(results / "compile.csv", "pass", "start", *PROBLEM_COLUMNS)
    parts = []
    if calls:
        lines = [(row["provider"], row["arrays"], pass_of(row), row["us_per_call"]) for row in calls]
        parts.append(table(("provider", "arrays", "pass", "host time a call, µs"), lines) + taken_on(calls))
    if starts:
        lines = [(cell_of(row).name, pass_of(row), row["start"], row["seconds"]) for row in starts]
        parts.append(table(("cell", "pass", "first call from", "seconds"), lines) + taken_on(starts))
    return "\n\n".join(parts) or "No record yet: `python -m benchmarks.host`."


def energy(results: Path) -> str:
    rows = newest_rows(results / "energy.csv", "provider", "pass", *PROBLEM_COLUMNS)
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
    sections = {name: entries for name, entries in record.items() if isinstance(entries, dict) and name != "counts"}
    outcomes = {name: Counter(entry["outcome"] for entry in entries.values()) for name, entries in sections.items()}
    found = ("passed", "failed", "skipped")
    lines = [(name, *(counts[outcome] for outcome in found)) for name, counts in outcomes.items()]
    every = [entry for entries in sections.values() for entry in entries.values()]
    skipped = Counter(entry["reason"] for entry in every if entry["outcome"] == "skipped")
    reasons = "".join(f"\n- {count} skipped: {reason}" for reason, count in skipped.items())
    return table(("", *found), lines) + (f"\n{reasons}" if reasons else "") + taken_on([record])


def numpy(results: Path) -> str:
    rows = newest_rows(results / "numpy.csv", "provider", "pass", *PROBLEM_COLUMNS)
    if not rows:
        return "No record yet: `python -m benchmarks.numpy_dense`."
    columns = ("dtype", "seqlen_q", "seqlen_k", "head_dim", "mask", "ms_median")
    lines = [(row["provider"], *map(row.get, columns), f"{int(row['peak_bytes']) / 2**20:.1f}") for row in rows]
    return table(("provider", *columns, "peak memory, MiB"), lines) + taken_on(rows)


PARTS: dict[str, Callable[[Path], str]] = {
    "support": support,
    "minilm": minilm,
    "speed": speed,
    "memory": memory,
    "host": host,
    "energy": energy,
    "numpy": numpy,
    "plots": plots,
    "gpu_tests": gpu_tests,
}


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
